//! A copy of the cluster's keys as of one revision, made by a full reading and kept up by events.
//!
//! Invariant: after every call it equals etcd's content at [`Mirror::revision`], keys that cannot be read aside. Events at or below
//! that revision are passed over, so readings and events may overlap. Pure: no I/O.

use std::collections::{BTreeMap, BTreeSet};

use im_proto::{Epoch, InstanceId, ShardId};

use super::keys::{self, ClaimValue, ClusterRecord, Key, Keys, Unreadable};
use crate::{Claim, Instance, Role, View};

/// A key as etcd shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) key: Vec<u8>,
    /// `None`: deleted.
    pub(super) value: Option<Vec<u8>>,
    pub(super) mod_revision: u64,
    pub(super) lease: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct InstanceRow {
    instance: Instance,
    lease: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct ClaimRow {
    value: ClaimValue,
    mod_revision: u64,
}

/// A predecessor list as it was read. A shard that nobody ever claimed has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ListRow {
    pub(super) instances: Vec<InstanceId>,
    /// The value as it stands in etcd.
    pub(super) bytes: Vec<u8>,
    /// 0 if the key is absent.
    pub(super) mod_revision: u64,
}

impl ListRow {
    pub(super) fn read(value: &[u8], mod_revision: u64) -> Result<Self, Unreadable> {
        Ok(Self { instances: keys::decode_list(value)?, bytes: value.to_vec(), mod_revision })
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Mirror {
    revision: u64,
    instances: BTreeMap<(Role, InstanceId), InstanceRow>,
    claims: BTreeMap<ShardId, ClaimRow>,
    lists: BTreeMap<ShardId, ListRow>,
    record: Option<(ClusterRecord, Vec<u8>)>,
    unreadable: BTreeSet<Vec<u8>>,
}

impl Mirror {
    /// From a full reading at `revision`.
    pub(super) fn read(keys: &Keys, revision: u64, entries: &[Entry]) -> Self {
        let mut mirror = Self { revision, ..Self::default() };
        for entry in entries {
            mirror.put(keys, entry);
        }
        mirror
    }

    /// Takes over events in the order of their revisions; `false` if all of them were known.
    pub(super) fn apply(&mut self, keys: &Keys, events: &[Entry]) -> bool {
        let known = self.revision;
        for event in events.iter().filter(|event| event.mod_revision > known) {
            self.put(keys, event);
            self.revision = self.revision.max(event.mod_revision);
        }
        self.revision > known
    }

    fn put(&mut self, keys: &Keys, entry: &Entry) {
        let Some(key) = keys.parse(&entry.key) else {
            tracing::debug!(key = %String::from_utf8_lossy(&entry.key), "a key of another version in the registry");
            return;
        };
        self.remove(&key);
        self.unreadable.remove(&entry.key);
        let Some(value) = &entry.value else { return };
        if let Err(error) = self.insert(key, value, entry) {
            tracing::error!(key = %String::from_utf8_lossy(&entry.key), %error, "a key of the registry cannot be read");
            self.unreadable.insert(entry.key.clone());
        }
    }

    fn remove(&mut self, key: &Key) {
        match key {
            Key::Cluster => self.record = None,
            Key::Instance(role, id) => {
                self.instances.remove(&(*role, id.clone()));
            }
            Key::Claim(shard) => {
                self.claims.remove(shard);
            }
            Key::Predecessors(shard) => {
                self.lists.remove(shard);
            }
        }
    }

    fn insert(&mut self, key: Key, value: &[u8], entry: &Entry) -> Result<(), Unreadable> {
        match key {
            Key::Cluster => self.record = Some((ClusterRecord::decode(value)?, value.to_vec())),
            Key::Instance(role, id) => {
                let instance = keys::decode_instance(value, (role, &id))?;
                self.instances.insert((role, id), InstanceRow { instance, lease: entry.lease });
            }
            Key::Claim(shard) => {
                let row = ClaimRow { value: ClaimValue::decode(value)?, mod_revision: entry.mod_revision };
                self.claims.insert(shard, row);
            }
            Key::Predecessors(shard) => {
                self.lists.insert(shard, ListRow::read(value, entry.mod_revision)?);
            }
        }
        Ok(())
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// The cluster record and its exact bytes.
    pub(super) fn record(&self) -> Option<&(ClusterRecord, Vec<u8>)> {
        self.record.as_ref()
    }

    /// The predecessor list of a shard, as of some moment.
    pub(super) fn list(&self, shard: ShardId) -> ListRow {
        self.lists.get(&shard).cloned().unwrap_or_default()
    }

    /// Whether an instance stands registered under this lease.
    pub(super) fn is_registered(&self, role: Role, id: &InstanceId, lease: u64) -> bool {
        self.instances.get(&(role, id.clone())).is_some_and(|row| row.lease == lease)
    }

    pub(super) fn unreadable(&self) -> usize {
        self.unreadable.len()
    }

    /// What the processes are shown.
    pub(super) fn view(&self) -> View {
        let instances = self.instances.iter().map(|((_, id), row)| (id.clone(), row.instance.clone())).collect();
        let claims = self.claims.iter().map(|(shard, row)| (*shard, row.claim(*shard))).collect();
        View { revision: self.revision, instances, claims }
    }
}

impl ClaimRow {
    fn claim(&self, shard: ShardId) -> Claim {
        let epoch = Epoch::new(self.value.generation, self.mod_revision);
        Claim { shard, owner: self.value.instance.clone(), epoch, predecessors: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use im_proto::BootId;

    use super::*;

    fn id(name: &str) -> InstanceId {
        InstanceId::parse(name).expect("an instance id")
    }

    fn instance(name: &str) -> Instance {
        Instance {
            id: id(name),
            boot: BootId(1),
            role: Role::Router,
            endpoints: Vec::new(),
            zone: String::new(),
            version: String::new(),
            draining: false,
        }
    }

    struct World {
        keys: Keys,
    }

    impl World {
        fn new() -> Self {
            Self { keys: Keys::new("t").expect("a cluster id") }
        }

        fn entry(&self, key: &Key, value: Option<Vec<u8>>, mod_revision: u64) -> Entry {
            Entry { key: self.keys.of(key).into_bytes(), value, mod_revision, lease: 5 }
        }

        fn instance(&self, name: &str, revision: u64) -> Entry {
            let value = keys::encode_instance(&instance(name));
            self.entry(&Key::Instance(Role::Router, id(name)), Some(value), revision)
        }

        fn claim(&self, shard: u32, name: &str, revision: u64) -> Entry {
            let value = ClaimValue { instance: id(name), boot: BootId(1), lease: 5, generation: 2 };
            self.entry(&Key::Claim(ShardId(shard)), Some(value.encode()), revision)
        }
    }

    #[test]
    fn events_after_a_reading_give_what_a_later_reading_gives() {
        let world = World::new();
        let before = [world.instance("a", 3), world.claim(1, "a", 4)];
        let mut mirror = Mirror::read(&world.keys, 5, &before);
        let view = mirror.view();
        assert_eq!(view.claims[&ShardId(1)].epoch, Epoch::new(2, 4));
        assert_eq!(view.revision, 5);

        let deleted = world.entry(&Key::Claim(ShardId(1)), None, 7);
        let events = [world.instance("b", 6), deleted, world.claim(2, "b", 8)];
        assert!(mirror.apply(&world.keys, &events));
        let after = [world.instance("a", 3), world.instance("b", 6), world.claim(2, "b", 8)];
        assert_eq!(mirror, Mirror::read(&world.keys, 8, &after));
    }

    #[test]
    fn events_that_a_reading_has_overtaken_change_nothing() {
        let world = World::new();
        let mut mirror = Mirror::read(&world.keys, 9, &[world.claim(1, "b", 9)]);
        let unchanged = mirror.clone();
        assert!(!mirror.apply(&world.keys, &[world.claim(1, "a", 4), world.entry(&Key::Claim(ShardId(1)), None, 8)]));
        assert_eq!(mirror, unchanged);
    }

    #[test]
    fn all_events_of_one_revision_are_taken() {
        let world = World::new();
        let mut mirror = Mirror::default();
        mirror.apply(&world.keys, &[world.claim(1, "a", 4), world.claim(2, "a", 4)]);
        assert_eq!(mirror.view().claims.len(), 2);
    }

    #[test]
    fn what_cannot_be_read_is_counted_and_left_out() {
        let world = World::new();
        let damaged = world.entry(&Key::Claim(ShardId(1)), Some(b"{".to_vec()), 3);
        let unknown =
            Entry { key: b"/im/t/v1/colours/red".to_vec(), value: Some(Vec::new()), mod_revision: 3, lease: 0 };
        let mut mirror = Mirror::read(&world.keys, 3, &[damaged, unknown]);
        assert_eq!((mirror.unreadable(), mirror.view().claims.len()), (1, 0));
        mirror.apply(&world.keys, &[world.claim(1, "a", 4)]);
        assert_eq!((mirror.unreadable(), mirror.view().claims.len()), (0, 1));
    }

    #[test]
    fn an_instance_is_registered_under_one_lease() {
        let world = World::new();
        let mirror = Mirror::read(&world.keys, 3, &[world.instance("a", 3)]);
        assert!(mirror.is_registered(Role::Router, &id("a"), 5));
        assert!(!mirror.is_registered(Role::Router, &id("a"), 6));
        assert!(!mirror.is_registered(Role::Gateway, &id("a"), 5));
    }
}
