//! What each step does to the state.

use crate::model::{Action, Claimant, Ownership};
use crate::owner::{Opening, Owner, Phase, open};
use crate::rules::{Grain, LeaveOut};
use crate::state::{Fences, Registry, State, Violation};
use crate::storage::{EVERY_REPLICA, NO_ROWS, REPLICAS, Replicas, Rows, merge};

impl Ownership {
    pub(crate) fn apply(&self, state: &mut State, action: Action) {
        match action {
            Action::Claim(claimant) => self.claim(state, claimant),
            Action::FenceAndCut { owner } => {
                let fences = std::mem::take(&mut state.owners[owner].fences);
                for (_, on) in
                    state.fences.on.iter_mut().enumerate().filter(|(instance, _)| fences & 1 << instance != 0)
                {
                    *on = EVERY_REPLICA;
                }
                self.cut(state, owner);
            }
            Action::FenceConfirmed { owner } => {
                state.owners[owner].fences = 0;
                state.owners[owner].enter(Phase::Cutting);
            }
            Action::Cut { owner } => self.cut(state, owner),
            Action::ReadFirst { owner, replica, arriving } => {
                let rows = self.answer(state, replica, arriving);
                state.owners[owner].enter(Phase::HalfRead);
                state.owners[owner].rows = rows;
                state.owners[owner].replica = replica as u8;
            }
            Action::ReadSecond { owner, replica, arriving } => {
                let rows = self.answer(state, replica, arriving);
                self.complete_read(state, owner, replica, &rows);
            }
            Action::RestartOpen { owner } | Action::Reopen { owner } => {
                state.left.retries -= 1;
                state.owners[owner].top = NO_ROWS;
                state.owners[owner].enter(Phase::Reading);
            }
            Action::Append { owner, batch } => self.append(state, owner, batch),
            Action::Commit { owner, arriving_at } => self.commit(state, owner, arriving_at),
            Action::Confirmed { owner } if state.owners[owner].is_checked => self.commit(state, owner, 0),
            Action::Confirmed { owner } => {
                state.owners[owner].take_batch();
                state.owners[owner].enter(Phase::Checking);
            }
            Action::CheckFirst { owner, replica } | Action::CheckSecond { owner, replica } => {
                self.check(state, owner, replica)
            }
            Action::Release { owner } => {
                state.left.releases -= 1;
                state.registry.claim = 0;
                state.registry.remove(state.owners[owner].instance);
                state.owners[owner].end(Phase::Released);
            }
            Action::Raise { owner } => {
                state.left.raises -= 1;
                state.owners[owner].epoch = state.put_claim(owner, state.owners[owner].generation, self.rules);
                state.owners[owner].enter(Phase::Reading);
            }
            Action::Recover => self.recover(state),
            Action::CheckEarly { owner } => state.owners[owner].is_checked = true,
            Action::Refuse { owner } => {
                state.left.raises -= 1;
                state.owners[owner].enter(Phase::Serving);
            }
            Action::RepairTop { first, second, .. } => repair_top(state, first, second),
            Action::Deliver { write, replica } => self.deliver(state, write, replica),
            Action::DeliverFence { instance, replica } => state.fences.on[usize::from(instance)] |= 1 << replica,
            Action::DeliverGeneration { replica } => state.fences.generation_on |= 1 << replica,
        }
    }

    /// One registry transaction: the claim, and the instance at the end of the predecessor list. The fence rows go
    /// out at once.
    fn claim(&self, state: &mut State, claimant: Claimant) {
        let Some(number) = state.owners.iter().position(|owner| owner.phase == Phase::Unclaimed) else { return };
        let (instance, generation) = match claimant {
            Claimant::Again { claim } => {
                let Owner { instance, generation, .. } = state.owners[claim];
                state.owners[claim].end(Phase::Stopped);
                (instance, generation)
            }
            Claimant::New => (state.instances + 1, state.fences.generation),
            Claimant::Old => (state.instances + 1, state.fences.generation - 1),
        };
        state.instances = state.instances.max(instance);
        let epoch = state.put_claim(number, generation, self.rules);
        let mut listed = state.registry.predecessors.into_iter().filter(|listed| *listed != 0);
        let mut fences = listed.clone().filter(|listed| *listed != instance).fold(0, |bits, listed| bits | 1 << listed);
        if self.rules.lack(LeaveOut::Predecessors) {
            fences &= listed.next_back().map_or(0, |last| 1 << last);
        }
        if self.rules.lack(LeaveOut::Fence) {
            fences = 0;
        }
        state.registry.append(instance);
        if self.grain == Grain::Fine {
            state.fences.written |= fences;
        }
        // With nobody to fence, the cut at once leaves the list as it is, and only a cut without its guard does harm
        // later.
        let is_cut_late =
            self.grain == Grain::Fine || self.rules.lack(LeaveOut::Guard) || self.rules.lack(LeaveOut::Identity);
        let is_read_next = fences == 0 && !is_cut_late || self.rules.lack(LeaveOut::ReadOrder);
        let phase = if is_read_next { Phase::Reading } else { Phase::Fencing };
        state.owners[number] = Owner { phase, instance, generation, epoch, fences, ..Owner::default() };
        // A quorum held the generation before anybody could claim, so both halves of this fence read agree.
        if !self.rules.lack(LeaveOut::OwnCheck) && state.is_fenced(number, self.rules) {
            state.owners[number].end(Phase::Stopped);
        }
    }

    fn cut(&self, state: &mut State, number: usize) {
        if !state.holds_claim(number, self.rules) && !self.rules.lack(LeaveOut::Guard) {
            state.owners[number].end(Phase::Stopped);
            return;
        }
        state.registry.cut_to(state.owners[number].instance);
        if !self.rules.lack(LeaveOut::ReadOrder) {
            state.owners[number].enter(Phase::Reading);
        }
    }

    fn deliver(&self, state: &mut State, write: usize, replica: usize) {
        let arrival_decides = self.rules.lack(LeaveOut::Timestamp);
        state.clock += u8::from(arrival_decides);
        state.storage.deliver(write, replica, arrival_decides.then_some(state.clock));
    }

    fn answer(&self, state: &mut State, replica: usize, arriving: u32) -> Rows {
        for write in (0..32).filter(|write| arriving & 1 << write != 0) {
            self.deliver(state, write, replica);
        }
        state.storage.replicas[replica]
    }

    /// The second replica has answered: the read is complete, and the open is decided.
    fn complete_read(&self, state: &mut State, number: usize, replica: usize, answer: &Rows) {
        let owner = &mut state.owners[number];
        let mut rows = merge(owner.rows, answer);
        if self.grain == Grain::Fine {
            state.storage.repair(rows, usize::from(owner.replica), replica);
        }
        if self.rules.lack(LeaveOut::Split) {
            let top = rows.iter().rposition(|row| !row.is_empty());
            if let (Some(top), true) = (top, owner.top == NO_ROWS) {
                owner.top[top] = rows[top];
                owner.enter(Phase::Reading);
                return;
            }
            if let Some(top) = owner.top.iter().position(|row| !row.is_empty()) {
                rows[top + 1..].fill(NO_ROWS[0]);
                rows = merge(rows, &owner.top);
                owner.top = NO_ROWS;
            }
        }
        match open(&rows, owner.epoch, self.rules) {
            Opening::Superseded => owner.end(Phase::Stopped),
            Opening::Hole => state.violation = Some(Violation::Hole { owner: number as u8 }),
            Opening::Open { log, rewrite } if rewrite == NO_ROWS => self.open_unwritten(state, number, log),
            Opening::Open { log, rewrite } => {
                owner.enter(Phase::Rewriting);
                owner.log = log;
                owner.rows = rewrite;
                state.storage.issue(rewrite);
            }
        }
    }

    /// There is nothing to write again, so only the fence is left to read.
    fn open_unwritten(&self, state: &mut State, number: usize, log: [u8; crate::SEQS]) {
        let phase = if self.grain == Grain::Fine { Phase::Checking } else { Phase::Serving };
        state.owners[number].enter(phase);
        state.owners[number].log = log;
        if phase == Phase::Checking {
            return;
        }
        if state.is_fenced(number, self.rules) {
            state.owners[number].end(Phase::Stopped);
        } else {
            state.commit_log(number);
        }
    }

    fn append(&self, state: &mut State, number: usize, batch: [u8; 2]) {
        let messages = if batch[1] == 0 { &batch[..1] } else { &batch[..] };
        state.messages = messages.iter().fold(state.messages, |most, message| most.max(*message));
        let rows = state.owners[number].batch(messages);
        state.owners[number].enter(Phase::Appending);
        state.owners[number].rows = rows;
        for part in self.parts(state, number) {
            state.storage.issue(part);
        }
    }

    fn commit(&self, state: &mut State, number: usize, arriving_at: Replicas) {
        for part in self.parts(state, number) {
            let Some(write) = state.storage.writes.iter().position(|write| write.rows == part) else { continue };
            for replica in (0..REPLICAS).filter(|replica| arriving_at & 1 << replica != 0) {
                self.deliver(state, write, replica);
            }
        }
        state.owners[number].take_batch();
        state.owners[number].enter(Phase::Serving);
        state.commit_log(number);
    }

    /// One replica answers the fence read. The first of two clean answers decides nothing yet.
    fn check(&self, state: &mut State, number: usize, replica: usize) {
        if state.is_fenced_at(number, replica, self.rules) {
            state.owners[number].end(Phase::Stopped);
        } else if state.owners[number].phase == Phase::Checking {
            state.owners[number].enter(Phase::HalfChecked);
            state.owners[number].replica = replica as u8;
        } else {
            state.owners[number].enter(Phase::Serving);
            state.commit_log(number);
        }
    }

    /// The registry comes back from a snapshot that is older than every claim, which is the worst one: a later
    /// snapshot lists more instances to fence. Its revisions are counted from there again.
    fn recover(&self, state: &mut State) {
        state.left.recoveries -= 1;
        state.registry = Registry::default();
        if !self.rules.lack(LeaveOut::Recover) {
            let generation_on = if self.grain == Grain::Fine { 0 } else { EVERY_REPLICA };
            state.fences = Fences { generation: state.fences.generation + 1, generation_on, ..state.fences };
        }
    }
}

fn repair_top(state: &mut State, first: usize, second: usize) {
    let [one, other] = [first, second].map(|replica| state.storage.replicas[replica]);
    let merged = merge(one, &other);
    if let Some(top) = merged.iter().rposition(|row| !row.is_empty()) {
        state.storage.replicas[first][top] = merged[top];
        state.storage.replicas[second][top] = merged[top];
    }
}
