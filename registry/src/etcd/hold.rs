//! Anti-flap: a view that loses more than half of the instances at once is more likely a trouble of the registry than the death of
//! half of the cluster, and acting on it (moving users and shards) would make a trouble of it.
//!
//! "At once" is within one hold (one lease TTL): of the instances that lived in the last hold, at most half may disappear from the
//! view. Those beyond stay in it, with their claims, until enough are back or the hold is over. New instances, changes and new
//! claims are never held back. A view may lag in any case, so this costs no safety, only time.
//!
//! Who said beforehand that it leaves is not lost: an instance that was draining when it was last seen, and a registration that this
//! process ended itself, are neither held nor counted. Nothing else is excused, whatever its role.
//!
//! Pure: time comes in as an argument.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use im_proto::InstanceId;
use tokio::time::Instant;

use crate::{Claim, Instance, View};

/// An instance that disappeared from the registry less than a hold ago.
struct Gone {
    instance: Instance,
    claims: Vec<Claim>,
    at: Instant,
    /// Still shown.
    held: bool,
}

pub(super) struct Hold {
    hold: Duration,
    truth: Arc<View>,
    shown: Arc<View>,
    gone: BTreeMap<InstanceId, Gone>,
    /// Registrations of this process that it ended and that were not seen to go yet: few, since each is seen to go, at the latest
    /// with its lease.
    leaving: BTreeSet<InstanceId>,
}

/// What to show, and until when.
pub(super) struct Shown {
    pub(super) view: Arc<View>,
    /// When to look again without a change of the registry.
    pub(super) until: Option<Instant>,
    /// How many instances are shown that are gone.
    pub(super) held: usize,
    /// Instances began to be held back.
    pub(super) began: bool,
}

impl Hold {
    pub(super) fn new(hold: Duration) -> Self {
        Self { hold, truth: Arc::default(), shown: Arc::default(), gone: BTreeMap::new(), leaving: BTreeSet::new() }
    }

    /// Takes over what the registry says now.
    pub(super) fn observe(&mut self, truth: View, now: Instant) -> Shown {
        let held_before = self.held();
        self.gone.retain(|id, gone| gone.at + self.hold > now && !truth.instances.contains_key(id));
        let fresh = self.note_gone(&truth, now);
        let lived = truth.instances.len() + self.gone.len();
        let too_many = self.gone.len() * 2 > lived;
        for (id, gone) in &mut self.gone {
            gone.held = too_many && (gone.held || fresh.contains(id));
        }
        self.show(&truth);
        self.truth = Arc::new(truth);
        let held = self.held();
        let until = self.gone.values().map(|gone| gone.at + self.hold).min();
        Shown { view: self.shown.clone(), until, held, began: held > 0 && held_before == 0 }
    }

    /// A registration of this process ends by its own wish.
    pub(super) fn leaves(&mut self, id: &InstanceId) {
        if self.truth.instances.contains_key(id) {
            self.leaving.insert(id.clone());
        }
    }

    fn held(&self) -> usize {
        self.gone.values().filter(|gone| gone.held).count()
    }

    fn note_gone(&mut self, truth: &View, now: Instant) -> Vec<InstanceId> {
        let mut fresh = Vec::new();
        for (id, instance) in &self.truth.instances {
            if truth.instances.contains_key(id) {
                continue;
            }
            if self.leaving.remove(id) || instance.draining {
                continue;
            }
            let claims = self.truth.claims.values().filter(|claim| claim.owner == *id).cloned().collect();
            self.gone.insert(id.clone(), Gone { instance: instance.clone(), claims, at: now, held: false });
            fresh.push(id.clone());
        }
        fresh
    }

    /// The truth and what is held. Its revision grows with each change, also where the registry's own does not: at the end of a
    /// hold and after a recovery.
    fn show(&mut self, truth: &View) {
        let mut view = truth.clone();
        for gone in self.gone.values().filter(|gone| gone.held) {
            view.instances.insert(gone.instance.id.clone(), gone.instance.clone());
            for claim in &gone.claims {
                view.claims.entry(claim.shard).or_insert_with(|| claim.clone());
            }
        }
        if view.instances == self.shown.instances && view.claims == self.shown.claims {
            return;
        }
        view.revision = view.revision.max(self.shown.revision + 1);
        self.shown = Arc::new(view);
    }
}

#[cfg(test)]
mod tests {
    use im_proto::{BootId, Epoch, ShardId};

    use super::*;
    use crate::Role;

    const HOLD: Duration = Duration::from_secs(10);

    fn id(name: &str) -> InstanceId {
        InstanceId::parse(name).expect("an instance id")
    }

    /// A registry with these instances; each owns the shard of its position in the alphabet.
    fn truth(revision: u64, names: &str) -> View {
        let mut view = View { revision, ..View::default() };
        for name in names.chars() {
            let id = id(&name.to_string());
            let instance = Instance {
                id: id.clone(),
                boot: BootId(1),
                role: Role::Router,
                endpoints: Vec::new(),
                zone: String::new(),
                version: String::new(),
                draining: false,
            };
            let shard = ShardId(u32::from(name) - u32::from('a'));
            let claim = Claim { shard, owner: id.clone(), epoch: Epoch(u64::from(shard.0)), predecessors: Vec::new() };
            view.instances.insert(id, instance);
            view.claims.insert(shard, claim);
        }
        view
    }

    /// The same, some of them draining.
    fn draining(revision: u64, names: &str, leaving: &str) -> View {
        let mut view = truth(revision, names);
        for name in leaving.chars() {
            view.instances.get_mut(&id(&name.to_string())).expect("it is there").draining = true;
        }
        view
    }

    fn names(shown: &Shown) -> String {
        shown.view.instances.keys().map(InstanceId::as_str).collect()
    }

    #[test]
    fn up_to_half_disappear_at_once() {
        let (mut hold, now) = (Hold::new(HOLD), Instant::now());
        assert_eq!(names(&hold.observe(truth(1, "abcdef"), now)), "abcdef");
        let shown = hold.observe(truth(2, "abc"), now);
        assert_eq!((names(&shown).as_str(), shown.held, shown.began), ("abc", 0, false));
    }

    #[test]
    fn more_than_half_are_held_for_one_hold_with_their_claims() {
        let (mut hold, now) = (Hold::new(HOLD), Instant::now());
        hold.observe(truth(1, "abcdef"), now);
        let shown = hold.observe(truth(2, "ab"), now);
        assert_eq!((names(&shown).as_str(), shown.held, shown.began), ("abcdef", 4, true));
        assert_eq!(shown.view.owner(ShardId(5)), Some(&id("f")));
        assert_eq!(shown.until, Some(now + HOLD));
        let revision = shown.view.revision;
        let shown = hold.observe(truth(2, "ab"), now + HOLD / 2);
        assert_eq!((names(&shown).as_str(), shown.began), ("abcdef", false), "held once, told once");
        let shown = hold.observe(truth(2, "ab"), now + HOLD);
        assert_eq!((names(&shown).as_str(), shown.held, shown.until), ("ab", 0, None));
        assert!(shown.view.revision > revision, "the end of a hold is a change");
        assert_eq!(shown.view.owner(ShardId(5)), None);
    }

    #[test]
    fn losses_one_after_the_other_within_a_hold_count_together() {
        let (mut hold, now) = (Hold::new(HOLD), Instant::now());
        hold.observe(truth(1, "abcd"), now);
        hold.observe(truth(2, "abc"), now + Duration::from_secs(1));
        assert_eq!(names(&hold.observe(truth(3, "ab"), now + Duration::from_secs(2))), "ab");
        assert_eq!(names(&hold.observe(truth(4, "a"), now + Duration::from_secs(3))), "ab", "the third of four");
        let mut slow = Hold::new(HOLD);
        for (step, names_left) in ["abcd", "abc", "ab", "a"].into_iter().enumerate() {
            let at = now + HOLD * u32::try_from(step).expect("small");
            assert_eq!(names(&slow.observe(truth(step as u64, names_left), at)), names_left, "one in each hold");
        }
    }

    #[test]
    fn those_that_come_back_or_are_replaced_end_the_hold() {
        let (mut hold, now) = (Hold::new(HOLD), Instant::now());
        hold.observe(truth(1, "abcd"), now);
        assert_eq!(names(&hold.observe(truth(2, "a"), now)), "abcd");
        assert_eq!(names(&hold.observe(truth(3, "ab"), now)), "ab", "half are there again");
        let mut hold = Hold::new(HOLD);
        hold.observe(truth(1, "abcd"), now);
        hold.observe(truth(2, ""), now);
        assert_eq!(names(&hold.observe(truth(3, "efgh"), now)), "efgh", "all were replaced");
    }

    #[test]
    fn new_instances_and_new_claims_are_shown_during_a_hold() {
        let (mut hold, now) = (Hold::new(HOLD), Instant::now());
        hold.observe(truth(1, "abcd"), now);
        hold.observe(truth(2, "a"), now);
        let mut claimed = truth(3, "ae");
        let claim = Claim { shard: ShardId(3), owner: id("a"), epoch: Epoch(99), predecessors: Vec::new() };
        claimed.claims.insert(ShardId(3), claim);
        let shown = hold.observe(claimed, now);
        assert_eq!(names(&shown), "abcde");
        assert_eq!(shown.view.owner(ShardId(3)), Some(&id("a")), "somebody else has it now");
    }

    #[test]
    fn those_that_had_said_that_they_leave_are_never_held() {
        let (mut hold, now) = (Hold::new(HOLD), Instant::now());
        hold.observe(truth(1, "abcd"), now);
        hold.observe(draining(2, "abcd", "abc"), now);
        let shown = hold.observe(truth(3, "d"), now);
        assert_eq!((names(&shown).as_str(), shown.held, shown.until), ("d", 0, None));
        let shown = hold.observe(draining(4, "d", "d"), now);
        assert_eq!(names(&shown), "d");
        let shown = hold.observe(truth(5, ""), now);
        assert_eq!((names(&shown).as_str(), shown.held), ("", 0), "the last one too");
    }

    #[test]
    fn one_that_leaves_excuses_nobody_else() {
        let (mut hold, now) = (Hold::new(HOLD), Instant::now());
        hold.observe(draining(1, "abcd", "a"), now);
        let shown = hold.observe(truth(2, "d"), now);
        assert_eq!((names(&shown).as_str(), shown.held), ("bcd", 2), "two of the three that stay");
    }

    #[test]
    fn an_own_registration_that_was_ended_is_not_held() {
        let (mut hold, now) = (Hold::new(HOLD), Instant::now());
        hold.observe(truth(1, "ab"), now);
        hold.leaves(&id("a"));
        hold.leaves(&id("b"));
        let shown = hold.observe(truth(2, ""), now);
        assert_eq!((names(&shown).as_str(), shown.held), ("", 0));
        // Each word is for one departure.
        hold.observe(truth(3, "abc"), now);
        assert_eq!(names(&hold.observe(truth(4, ""), now)), "abc");
    }

    #[test]
    fn nothing_changed_is_nothing_new() {
        let (mut hold, now) = (Hold::new(HOLD), Instant::now());
        let first = hold.observe(truth(1, "ab"), now).view;
        let second = hold.observe(truth(7, "ab"), now).view;
        assert!(Arc::ptr_eq(&first, &second));
        let restored = hold.observe(truth(2, "abc"), now).view;
        assert!(restored.revision > second.revision, "revisions of the registry may start over, those of views do not");
    }
}
