//! Named sets of sessions that a router keeps here, so that a message to many of them names the set and not each session.
//!
//! A set has a version that each delta raises. A delta or a message of another version than the one that is here means that
//! something was lost: the whole set is asked for once, and when it comes its sessions are told to resync.

use std::collections::BTreeMap;

use im_proto::{ConversationId, v1};

/// Sessions in all sets of one link: 32 MiB of ids. Beyond it those of all sets are forgotten, and come again as they are used.
const SESSIONS_MAX: usize = 4 * 1024 * 1024;

/// The sets of one link.
#[derive(Default)]
pub(super) struct Audiences {
    sets: BTreeMap<ConversationId, Set>,
    /// In all of them.
    sessions: usize,
}

#[derive(Default)]
struct Set {
    version: u64,
    /// Ascending.
    sessions: Vec<u64>,
    /// The whole set was asked for.
    wanted: bool,
}

/// What to do about a change.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Changed {
    Taken,
    /// It is the whole set that was asked for: its sessions may have missed pushes.
    Repaired,
    /// The whole set has to be asked for.
    Ask,
}

/// Who gets a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found<'a> {
    Sessions(&'a [u64]),
    /// The whole set has to be asked for.
    Ask,
    /// It was asked for already.
    Waits,
}

impl Audiences {
    /// Takes over a whole set or a delta.
    pub fn change(&mut self, id: ConversationId, change: &v1::AudienceSet) -> Changed {
        if self.sessions.saturating_add(change.joined.len()) > SESSIONS_MAX {
            self.forget_sessions();
        }
        let set = self.sets.entry(id).or_default();
        let (before, whole) = (set.sessions.len(), change.from_version == 0);
        if !whole && (set.version != change.from_version || set.wanted) {
            return if std::mem::replace(&mut set.wanted, true) { Changed::Taken } else { Changed::Ask };
        }
        if whole {
            set.sessions.clear();
        }
        set.version = change.version;
        set.sessions.retain(|session| !change.left.contains(session));
        set.sessions.extend_from_slice(&change.joined);
        set.sessions.sort_unstable();
        set.sessions.dedup();
        let (after, repaired) = (set.sessions.len(), std::mem::take(&mut set.wanted));
        if after == 0 {
            self.sets.remove(&id);
        }
        self.sessions = self.sessions + after - before;
        if repaired { Changed::Repaired } else { Changed::Taken }
    }

    /// The sessions of a set, if it has this version.
    pub fn find(&mut self, id: ConversationId, version: u64) -> Found<'_> {
        let set = self.sets.entry(id).or_default();
        if set.version == version && !set.wanted {
            return Found::Sessions(&set.sessions);
        }
        if std::mem::replace(&mut set.wanted, true) { Found::Waits } else { Found::Ask }
    }

    /// The sessions of a set, of whatever version.
    pub fn sessions(&self, id: &ConversationId) -> &[u64] {
        self.sets.get(id).map_or(&[], |set| &set.sessions)
    }

    /// Forgets the sessions of all sets. Of a set that was asked for it stays known that its sessions may have missed pushes.
    fn forget_sessions(&mut self) {
        self.sets.retain(|_, set| {
            set.sessions = Vec::new();
            set.wanted
        });
        self.sessions = 0;
    }

    /// Forgets everything.
    pub fn forget(&mut self) {
        self.sets.clear();
        self.sessions = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: ConversationId = ConversationId::from_bytes([1; 16]);

    fn change(from_version: u64, version: u64, joined: &[u64], left: &[u64]) -> v1::AudienceSet {
        v1::AudienceSet {
            conversation_id: ID.to_bytes(),
            version,
            from_version,
            joined: joined.to_vec(),
            left: left.to_vec(),
        }
    }

    #[test]
    fn deltas_that_follow_each_other_are_taken() {
        let mut audiences = Audiences::default();
        assert_eq!(audiences.change(ID, &change(0, 1, &[3, 1, 2], &[])), Changed::Taken);
        assert_eq!(audiences.change(ID, &change(1, 2, &[9], &[2])), Changed::Taken);
        assert_eq!(audiences.find(ID, 2), Found::Sessions(&[1, 3, 9]));
    }

    #[test]
    fn a_set_that_was_asked_for_is_repaired_although_the_bound_was_reached_meanwhile() {
        let mut audiences = Audiences::default();
        audiences.change(ID, &change(0, 1, &[1], &[]));
        assert_eq!(audiences.find(ID, 2), Found::Ask, "its sessions missed a push");
        audiences.sessions = SESSIONS_MAX;
        let other = ConversationId::from_bytes([2; 16]);
        assert_eq!(audiences.change(other, &change(0, 1, &[7, 8], &[])), Changed::Taken);
        assert_eq!(audiences.sessions, 2, "all others were forgotten");
        assert_eq!(audiences.change(ID, &change(0, 2, &[1, 2], &[])), Changed::Repaired);
        assert_eq!(audiences.find(ID, 2), Found::Sessions(&[1, 2]));
        assert_eq!(audiences.sessions, 4);
    }

    #[test]
    fn a_lost_delta_is_repaired_by_the_whole_set_asked_for_once() {
        let mut audiences = Audiences::default();
        audiences.change(ID, &change(0, 1, &[1], &[]));
        assert_eq!(audiences.change(ID, &change(2, 3, &[2], &[])), Changed::Ask);
        assert_eq!(audiences.find(ID, 3), Found::Waits);
        assert_eq!(audiences.change(ID, &change(3, 4, &[5], &[])), Changed::Taken);
        assert_eq!(audiences.find(ID, 1), Found::Waits);
        assert_eq!(audiences.change(ID, &change(0, 4, &[1, 2, 5], &[])), Changed::Repaired);
        assert_eq!(audiences.find(ID, 4), Found::Sessions(&[1, 2, 5]));
    }

    #[test]
    fn an_unknown_set_is_asked_for() {
        let mut audiences = Audiences::default();
        assert_eq!(audiences.find(ID, 7), Found::Ask);
        assert_eq!(audiences.find(ID, 7), Found::Waits);
        audiences.forget();
        assert_eq!(audiences.find(ID, 7), Found::Ask);
    }

    proptest! {
        /// Against a plain set: whatever is lost, a set with the right version has the right sessions.
        #[test]
        fn a_set_of_the_right_version_has_the_right_sessions(
            steps in proptest::collection::vec((any::<bool>(), 0u64..6, 0u64..6, any::<bool>()), 1..60)
        ) {
            let mut audiences = Audiences::default();
            let (mut model, mut version) = (std::collections::BTreeSet::new(), 0);
            for (lost, joins, leaves, looks) in steps {
                model.remove(&leaves);
                model.insert(joins);
                version += 1;
                let left: &[u64] = if leaves == joins { &[] } else { &[leaves] };
                let from = if version == 1 { 0 } else { version - 1 };
                let mut ask = !lost && audiences.change(ID, &change(from, version, &[joins], left)) == Changed::Ask;
                if looks {
                    match audiences.find(ID, version) {
                        Found::Sessions(found) => {
                            prop_assert_eq!(found, &model.iter().copied().collect::<Vec<_>>()[..]);
                        }
                        Found::Ask => ask = true,
                        Found::Waits => {}
                    }
                }
                if ask {
                    let whole: Vec<u64> = model.iter().copied().collect();
                    prop_assert_eq!(audiences.change(ID, &change(0, version, &whole, &[])), Changed::Repaired);
                }
            }
            prop_assert_eq!(audiences.sessions, audiences.sets.values().map(|set| set.sessions.len()).sum::<usize>());
        }
    }
}
