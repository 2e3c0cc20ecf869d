//! Shard by shard: who owns it, under which epoch, and who is about to take it.

use std::{collections::BTreeMap, fmt::Write as _};

use im_proto::{ConversationId, InstanceId, ShardCount, ShardId, shard::rendezvous_owner};
use im_registry::{Instance, Role, View};
use serde::Serialize;

/// Routers that take shards.
pub struct Takers<'a>(Vec<&'a InstanceId>);

impl<'a> Takers<'a> {
    pub fn of(view: &'a View) -> Self {
        let takers = view.of_role(Role::Router).filter(|router| !router.draining);
        Self(takers.map(|router| &router.id).collect())
    }

    /// Who will have a shard, if its present owner should not; with nobody to take it, it stays.
    pub fn next_owner(&self, shard: ShardId, owner: &InstanceId) -> Option<&'a InstanceId> {
        rendezvous_owner(shard, self.0.iter().copied()).filter(|next| *next != owner)
    }
}

/// A router and what it owns.
#[derive(Debug, Serialize)]
pub struct Owner {
    router: String,
    claims: Vec<Held>,
}

#[derive(Debug, Serialize)]
struct Held {
    shard: u32,
    epoch: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    moves_to: Option<String>,
}

/// All that own anything.
pub fn all(view: &View) -> Vec<Owner> {
    let takers = Takers::of(view);
    let mut owners: BTreeMap<&InstanceId, Vec<Held>> = BTreeMap::new();
    for (shard, claim) in &view.claims {
        let moves_to = takers.next_owner(*shard, &claim.owner).map(InstanceId::to_string);
        owners.entry(&claim.owner).or_default().push(Held { shard: shard.0, epoch: claim.epoch.0, moves_to });
    }
    owners.into_iter().map(|(router, claims)| Owner { router: router.to_string(), claims }).collect()
}

impl Owner {
    /// A line for each epoch: shards that were claimed together share one.
    pub fn write(&self, text: &mut String) {
        let _ = writeln!(text, "\n  {}  {}", self.router, super::counted(self.claims.len(), "shard"));
        let mut groups: BTreeMap<(u64, Option<&str>), Vec<u32>> = BTreeMap::new();
        for held in &self.claims {
            groups.entry((held.epoch, held.moves_to.as_deref())).or_default().push(held.shard);
        }
        for ((epoch, moves_to), shards) in groups {
            let to = moves_to.map(|router| format!(", moving to {router}")).unwrap_or_default();
            let _ = writeln!(text, "    epoch {epoch}{to}: {}", ranges(&shards));
        }
    }
}

/// Ascending numbers, neighbours as `first-last`.
fn ranges(numbers: &[u32]) -> String {
    let neighbours = numbers.chunk_by(|one, next| one.checked_add(1) == Some(*next));
    let shown: Vec<String> = neighbours
        .map(|range| match range {
            [only] => only.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => String::new(),
        })
        .collect();
    shown.join(" ")
}

/// Where a conversation is.
#[derive(Debug, Serialize)]
pub struct Conversation {
    id: String,
    shard: u32,
    owner: Option<String>,
    epoch: Option<u64>,
    /// The owner's address for links.
    address: Option<String>,
    moves_to: Option<String>,
}

/// The owner of a conversation, existing or not.
pub fn of(id: ConversationId, shards: ShardCount, view: &View) -> Conversation {
    let shard = shards.shard_of(&id);
    let claim = view.claims.get(&shard);
    let instance = claim.and_then(|claim| view.instances.get(&claim.owner));
    let link = |instance: &Instance| instance.endpoints.iter().find(|endpoint| endpoint.transport == "link").cloned();
    Conversation {
        id: id.to_string(),
        shard: shard.0,
        owner: claim.map(|claim| claim.owner.to_string()),
        epoch: claim.map(|claim| claim.epoch.0),
        address: instance.and_then(link).map(|endpoint| endpoint.address),
        moves_to: claim.and_then(|claim| Takers::of(view).next_owner(shard, &claim.owner)).map(InstanceId::to_string),
    }
}

impl Conversation {
    pub fn write(&self, text: &mut String) {
        let _ = write!(text, "\nconversation {}: shard {}, ", self.id, self.shard);
        let _ = match (&self.owner, self.epoch) {
            (Some(owner), Some(epoch)) => write!(text, "owner {owner}, epoch {epoch}"),
            _ => write!(text, "without owner"),
        };
        for (what, value) in [("link", &self.address), ("moving to", &self.moves_to)] {
            if let Some(value) = value {
                let _ = write!(text, ", {what} {value}");
            }
        }
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_range() {
        assert_eq!(ranges(&[]), "");
        assert_eq!(ranges(&[7]), "7");
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8, u32::MAX]), "0-2 5 7-8 4294967295");
    }
}
