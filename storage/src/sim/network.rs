//! How calls travel: when a delivery reaches a replica, when an answer reaches a client, if at all.
//!
//! All chances of a call are drawn when it is made; its events then happen in the order of their times.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until};

use super::{Link, Mutation, REPLICAS, Shared, State};
use crate::{cells::Cells, model::StoreError};

/// Takes the outcome of a write.
pub(super) type Answer = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// What happens to a call, by the time since it was made. The number orders events of one moment.
type Events = BTreeMap<(Duration, usize), Event>;

#[derive(Clone)]
enum Event {
    Deliver { replica: usize },
    Answer(Result<(), StoreError>),
    GiveUp,
}

fn unconfirmed(why: &str) -> StoreError {
    StoreError::Unconfirmed(why.into())
}

impl State {
    fn link(&self, client: &str) -> Link {
        self.links.get(client).copied().unwrap_or_default()
    }

    /// How long a delivery takes and whether it counts; nothing if it never comes.
    fn delivery(&mut self) -> Option<(Duration, bool)> {
        let prompt = self.dice.duration(&self.faults.latency);
        let fate = self.dice.below(1000);
        let lost = u64::from(self.faults.lost_permille);
        let hint = lost + u64::from(self.faults.hint_permille);
        let late = hint + u64::from(self.faults.late_permille);
        if fate < lost {
            None
        } else if fate < hint {
            Some((prompt + self.dice.duration(&self.faults.hint_after), false))
        } else if fate < late {
            Some((prompt + self.dice.duration(&self.faults.late_by), true))
        } else {
            Some((prompt, true))
        }
    }

    /// Draws the course of a write.
    fn write_events(&mut self, link: Link) -> Events {
        let mut events = Events::new();
        let timeout = self.faults.timeout;
        events.insert((timeout, usize::MAX), Event::GiveUp);
        if link.requests_cut {
            return events;
        }
        let mut attempt = link.slower_by;
        if self.dice.permille(self.faults.again_permille) {
            self.attempt(attempt, &mut events);
            attempt += self.dice.duration(&self.faults.again_after);
        }
        let mut counted = self.attempt(attempt, &mut events);
        counted.sort_unstable();
        // Two of three confirm. What is lost on the way back is the client's timeout.
        if let Some(confirmed) = counted.get(1)
            && !self.dice.permille(self.faults.answer_lost_permille)
        {
            let at = *confirmed + self.dice.duration(&self.faults.latency) + link.slower_by;
            events.insert((at, events.len()), Event::Answer(Ok(())));
        }
        events
    }

    /// Draws one attempt at a write; gives the times that count.
    fn attempt(&mut self, at: Duration, events: &mut Events) -> Vec<Duration> {
        let mut counted = Vec::new();
        for replica in 0..REPLICAS {
            if let Some((after, counts)) = self.delivery() {
                events.insert((at + after, events.len()), Event::Deliver { replica });
                counted.extend(counts.then_some(at + after));
            }
        }
        counted
    }
}

impl Shared {
    /// Starts a write. It goes on whatever becomes of the client.
    pub(super) fn write(self: &Arc<Self>, client: &str, mutation: Mutation, answer: Answer) {
        let mut state = self.state.lock();
        let mut link = state.link(client);
        link.requests_cut |= link.state_cut && matches!(mutation, Mutation::Cells(_));
        let events = state.write_events(link);
        drop(state);
        let (shared, client) = (self.clone(), client.to_owned());
        self.tasks.spawn(Box::pin(async move { shared.run(&client, mutation, events, answer).await }));
    }

    async fn run(self: Arc<Self>, client: &str, mutation: Mutation, events: Events, answer: Answer) {
        let begun = Instant::now();
        let mut answer = Some(answer);
        for ((at, _), event) in events {
            sleep_until(begun + at).await;
            match event {
                Event::Deliver { replica } => {
                    let mut state = self.state.lock();
                    state.stale_deliveries += u64::from(mutation.is_stale(&state.replicas[replica]));
                    mutation.apply(&mut state.replicas[replica]);
                }
                Event::Answer(outcome) => {
                    if !self.state.lock().link(client).answers_cut
                        && let Some(answer) = answer.take()
                    {
                        answer(outcome);
                    }
                }
                Event::GiveUp => {
                    if let Some(answer) = answer.take() {
                        answer(Err(unconfirmed("no answer in time")));
                    }
                }
            }
        }
    }

    /// Looks at two replicas, at two moments, and merges. `repair` says what to copy back of what is returned.
    pub(super) async fn read<L, T>(
        self: &Arc<Self>,
        client: &str,
        look: impl Fn(&Cells) -> L,
        merge: impl FnOnce(L, L) -> (T, Option<Mutation>),
    ) -> Result<T, StoreError> {
        let (begun, (timeout, slower_by, looks)) = (Instant::now(), self.draw_read(client));
        let Some([(first_at, first), (second_at, second)]) = looks else {
            sleep_until(begun + timeout).await;
            return Err(unconfirmed("no answer in time"));
        };
        sleep_until(begun + slower_by + first_at).await;
        let one = look(&self.state.lock().replicas[first]);
        sleep_until(begun + slower_by + second_at).await;
        let two = look(&self.state.lock().replicas[second]);
        let (result, repair) = merge(one, two);
        if let Some(repair) = repair {
            self.repair(&repair, [first, second]);
        }
        let (back, lost) = {
            let mut state = self.state.lock();
            let faults = state.faults.clone();
            let lost = state.dice.permille(faults.answer_lost_permille);
            (state.dice.duration(&faults.latency) + slower_by, lost)
        };
        let arrives = begun + slower_by + second_at + back;
        sleep_until(arrives.min(begun + timeout)).await;
        let cut = self.state.lock().link(client).answers_cut;
        if lost || cut || arrives > begun + timeout {
            sleep_until(begun + timeout).await;
            return Err(unconfirmed("no answer in time"));
        }
        Ok(result)
    }

    /// Two replicas and when each is looked at, in this order; nothing if one of them does not answer.
    #[allow(clippy::type_complexity, reason = "one use")]
    fn draw_read(&self, client: &str) -> (Duration, Duration, Option<[(Duration, usize); 2]>) {
        let mut state = self.state.lock();
        let (link, timeout) = (state.link(client), state.faults.timeout);
        let left_out = usize::try_from(state.dice.below(REPLICAS as u64)).unwrap_or(0);
        let mut looks = Vec::new();
        for replica in (0..REPLICAS).filter(|replica| *replica != left_out) {
            // A read is never handed over by a hint: what does not come in time does not come.
            looks.extend(state.delivery().filter(|(_, counts)| *counts).map(|(after, _)| (after, replica)));
        }
        looks.sort_unstable();
        let looks = looks.try_into().ok().filter(|_| !link.requests_cut);
        (timeout, link.slower_by, looks)
    }

    /// Copies what a read returned to the replicas that it looked at, as unreliably as any delivery.
    fn repair(self: &Arc<Self>, repair: &Mutation, replicas: [usize; 2]) {
        for replica in replicas {
            let Some((after, _)) = self.state.lock().delivery() else { continue };
            let (shared, repair, at) = (self.clone(), repair.clone(), Instant::now() + after);
            self.tasks.spawn(Box::pin(async move {
                sleep_until(at).await;
                repair.apply(&mut shared.state.lock().replicas[replica]);
            }));
        }
    }
}
