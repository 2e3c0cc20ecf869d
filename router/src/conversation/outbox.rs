//! Effects of a conversation's entries on other logs, until their owners have answered.

use std::collections::{BTreeMap, VecDeque};

use im_proto::ConversationId;

use crate::message::Effect;

/// Effects that were not answered yet, for each target in the order of their entries.
#[derive(Debug, Default)]
pub struct Outbox {
    targets: BTreeMap<ConversationId, Target>,
    /// Targets that have an effect to send and none on its way. Whoever failed goes to the end.
    ready: VecDeque<ConversationId>,
    outstanding: usize,
    /// How many effects wait, by the entry that they are of.
    origins: BTreeMap<u64, usize>,
}

#[derive(Debug, Default)]
struct Target {
    effects: VecDeque<Effect>,
    /// The first one is on its way.
    outstanding: bool,
}

impl Outbox {
    /// Queues an effect behind those of the same target, unless it is there already.
    pub fn push(&mut self, effect: Effect) {
        let target = self.targets.entry(effect.target).or_default();
        if target.effects.back().is_some_and(|last| last.origin_seq >= effect.origin_seq) {
            return;
        }
        if target.effects.is_empty() {
            self.ready.push_back(effect.target);
        }
        *self.origins.entry(effect.origin_seq).or_default() += 1;
        target.effects.push_back(effect);
    }

    /// The first effects of targets that have none on its way, now on their way; at most `limit` are.
    pub fn take_sendable(&mut self, limit: usize) -> Vec<Effect> {
        let mut out = Vec::new();
        while self.outstanding < limit {
            let Some(id) = self.ready.pop_front() else { break };
            if let Some(target) = self.targets.get_mut(&id)
                && let Some(first) = target.effects.front()
            {
                target.outstanding = true;
                self.outstanding += 1;
                out.push(first.clone());
            }
        }
        out
    }

    /// An answer came; a failed effect is sent again by a later [`Self::take_sendable`].
    pub fn answered(&mut self, id: &ConversationId, origin_seq: u64, done: bool) {
        let Some(target) = self.targets.get_mut(id) else { return };
        let was_outstanding = std::mem::take(&mut target.outstanding);
        self.outstanding -= usize::from(was_outstanding);
        while done && target.effects.front().is_some_and(|effect| effect.origin_seq <= origin_seq) {
            if let Some(effect) = target.effects.pop_front()
                && let Some(count) = self.origins.get_mut(&effect.origin_seq)
            {
                *count -= 1;
                if *count == 0 {
                    self.origins.remove(&effect.origin_seq);
                }
            }
        }
        if target.effects.is_empty() {
            self.targets.remove(id);
            if !was_outstanding {
                self.ready.retain(|ready| ready != id);
            }
        } else if was_outstanding {
            self.ready.push_back(*id);
        }
    }

    /// The first entry with an effect that is not done.
    pub fn first_waiting(&self) -> Option<u64> {
        self.origins.keys().next().copied()
    }

    /// Nothing is outstanding.
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }
}
