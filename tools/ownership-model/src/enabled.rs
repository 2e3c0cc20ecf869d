//! Which steps are possible in a state.

use crate::model::{Action, Claimant, Ownership};
use crate::owner::{CLAIMS, Owner, Phase};
use crate::rules::{Grain, LeaveOut};
use crate::state::{State, is_quorum};
use crate::storage::{EVERY_REPLICA, REPLICAS, Rows, SEQS};

impl Ownership {
    /// All that can happen next. The order is fixed, because a path is kept as positions in this list.
    pub(crate) fn enabled(&self, state: &State, actions: &mut Vec<Action>) {
        self.claims(state, actions);
        if state.left.recoveries > 0 && state.instances > 0 {
            actions.push(Action::Recover);
        }
        for owner in 0..CLAIMS {
            self.steps_of(state, owner, actions);
        }
        let is_fine = self.grain == Grain::Fine;
        if is_fine || self.rules.lack(LeaveOut::Timestamp) || self.rules.lack(LeaveOut::Repair) {
            for replica in 0..REPLICAS {
                let pending = state.storage.pending(replica);
                let writes = (0..state.storage.writes.len()).filter(|write| pending & 1 << write != 0);
                actions.extend(writes.map(|write| Action::Deliver { write, replica }));
            }
        }
        if is_fine {
            fence_arrivals(state, actions);
        }
    }

    fn claims(&self, state: &State, actions: &mut Vec<Action>) {
        let made = state.owners.iter().filter(|owner| owner.phase != Phase::Unclaimed).count();
        // `imd cluster recover` returns when a quorum holds the generation, and nobody claims before.
        if made >= usize::from(self.bounds.claims) || !is_quorum(state.fences.generation_on) {
            return;
        }
        actions.push(Action::Claim(Claimant::New));
        if state.fences.generation > 0 {
            actions.push(Action::Claim(Claimant::Old));
        }
        for claim in (0..made).filter(|claim| state.owners[*claim].phase == Phase::Released) {
            actions.push(Action::Claim(Claimant::Again { claim }));
        }
    }

    fn steps_of(&self, state: &State, owner: usize, actions: &mut Vec<Action>) {
        let holds_claim = state.holds_claim(owner, self.rules);
        let is_coarse = self.grain == Grain::Coarse;
        let Owner { phase, fences, replica: first, .. } = state.owners[owner];
        if self.rules.lack(LeaveOut::ReadOrder) && fences != 0 && (is_coarse || state.fences.confirmed(fences)) {
            actions.push(Action::FenceAndCut { owner });
        }
        match phase {
            Phase::Fencing if is_coarse => actions.push(Action::FenceAndCut { owner }),
            Phase::Fencing if state.fences.confirmed(fences) => actions.push(Action::FenceConfirmed { owner }),
            Phase::Cutting => actions.push(Action::Cut { owner }),
            Phase::Reading => {
                for replica in 0..REPLICAS {
                    self.arrivals(state, replica, |arriving| {
                        actions.push(Action::ReadFirst { owner, replica, arriving });
                    });
                }
                if self.rules.lack(LeaveOut::Repair) {
                    for (first, second) in [(0, 1), (0, 2), (1, 2)] {
                        actions.push(Action::RepairTop { owner, first, second });
                    }
                }
            }
            Phase::HalfRead => {
                for replica in (0..REPLICAS).filter(|replica| *replica != usize::from(first)) {
                    self.arrivals(state, replica, |arriving| {
                        actions.push(Action::ReadSecond { owner, replica, arriving });
                    });
                }
                if state.left.retries > 0 {
                    actions.push(Action::RestartOpen { owner });
                }
            }
            Phase::Rewriting | Phase::Appending => self.endings_of_a_write(state, owner, holds_claim, actions),
            Phase::Checking => actions.extend((0..REPLICAS).map(|replica| Action::CheckFirst { owner, replica })),
            Phase::HalfChecked => {
                let others = (0..REPLICAS).filter(|replica| *replica != usize::from(first));
                actions.extend(others.map(|replica| Action::CheckSecond { owner, replica }));
            }
            Phase::Serving => self.appends(state, owner, actions),
            Phase::Fencing | Phase::Unclaimed | Phase::Released | Phase::Stopped => {}
        }
        let is_active =
            !matches!(phase, Phase::Unclaimed | Phase::Released | Phase::Stopped | Phase::Fencing | Phase::Cutting);
        if holds_claim && state.left.releases > 0 && is_active {
            actions.push(Action::Release { owner });
        }
    }

    /// Which of the pending writes may reach `replica` just before it answers a tail read.
    fn arrivals(&self, state: &State, replica: usize, mut visit: impl FnMut(u32)) {
        let pending = if self.grain == Grain::Fine { 0 } else { state.storage.pending(replica) };
        let mut subset = pending;
        loop {
            visit(subset);
            if subset == 0 {
                return;
            }
            subset = (subset - 1) & pending;
        }
    }

    fn endings_of_a_write(&self, state: &State, owner: usize, holds_claim: bool, actions: &mut Vec<Action>) {
        let is_rewrite = state.owners[owner].phase == Phase::Rewriting;
        let is_early = self.rules.lack(LeaveOut::CheckOrder);
        let Owner { is_checked, fences, .. } = state.owners[owner];
        if is_early && !is_checked && !state.is_fenced(owner, self.rules) {
            actions.push(Action::CheckEarly { owner });
        }
        let is_clean = if is_early { is_checked } else { !state.is_fenced(owner, self.rules) };
        let on = self.parts(state, owner).fold(EVERY_REPLICA, |on, part| on & state.storage.holders(&part));
        if self.grain == Grain::Fine {
            let is_confirmed = self.parts(state, owner).all(|part| is_quorum(state.storage.holders(&part)));
            if is_confirmed && fences == 0 && (is_checked || !is_early) {
                actions.push(Action::Confirmed { owner });
            }
        } else if is_clean && fences == 0 {
            if is_quorum(on) {
                actions.push(Action::Commit { owner, arriving_at: 0 });
            } else {
                let pairs = [0b011, 0b101, 0b110].into_iter().filter(|pair| pair & on == on);
                actions.extend(pairs.map(|arriving_at| Action::Commit { owner, arriving_at }));
            }
        }
        if !is_rewrite && self.rules.lack(LeaveOut::Freed) {
            if state.left.raises > 0 {
                actions.push(Action::Refuse { owner });
            }
        } else if holds_claim && state.left.raises > 0 {
            actions.push(Action::Raise { owner });
        }
        if is_rewrite && self.rules.lack(LeaveOut::Reopen) && state.left.retries > 0 {
            actions.push(Action::Reopen { owner });
        }
    }

    /// Every batch of messages that the owner's log lacks. Of the messages nobody has sent yet, only the lowest is
    /// offered: they are alike.
    fn appends(&self, state: &State, owner: usize, actions: &mut Vec<Action>) {
        let log = state.owners[owner].log;
        let room = SEQS - state.owners[owner].head();
        let last = self.bounds.messages.min(state.messages + 1);
        for first in (1..=last).filter(|message| room >= 1 && !log.contains(message)) {
            actions.push(Action::Append { owner, batch: [first, 0] });
            if self.bounds.batch_rows < 2 || room < 2 {
                continue;
            }
            let last = self.bounds.messages.min(state.messages.max(first) + 1);
            for second in (1..=last).filter(|message| *message != first && !log.contains(message)) {
                actions.push(Action::Append { owner, batch: [first, second] });
            }
        }
    }

    /// The writes that the rows in flight were handed to the driver as: one, but for the leave-out `whole`.
    pub(crate) fn parts(&self, state: &State, owner: usize) -> impl Iterator<Item = Rows> + use<> {
        let Owner { rows, phase, .. } = state.owners[owner];
        let row_by_row = phase == Phase::Appending && self.rules.lack(LeaveOut::Whole);
        let single = move |seq: usize| {
            let mut single = Rows::default();
            single[seq] = rows[seq];
            single
        };
        let singles = (0..SEQS).filter(move |seq| row_by_row && !rows[*seq].is_empty()).map(single);
        std::iter::once(rows).filter(move |_| !row_by_row).chain(singles)
    }
}

fn fence_arrivals(state: &State, actions: &mut Vec<Action>) {
    for replica in 0..REPLICAS {
        for instance in (1..=CLAIMS as u8).filter(|instance| state.fences.written & 1 << instance != 0) {
            if state.fences.on[usize::from(instance)] & 1 << replica == 0 {
                actions.push(Action::DeliverFence { instance, replica });
            }
        }
        if state.fences.generation_on & 1 << replica == 0 {
            actions.push(Action::DeliverGeneration { replica });
        }
    }
}
