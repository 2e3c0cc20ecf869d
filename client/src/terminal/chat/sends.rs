//! Messages on their way to the server: handed over one after the other, and counted until their outcome is known.

use std::time::Duration;

use bytes::Bytes;
use im_proto::environment::Environment;
use tokio::sync::mpsc;

use crate::{client::Client, config::Target, error::SendError};

use super::{log::PENDING_MAX, state::Input};

/// Messages that wait to be handed over; what finds no place was not sent, and its writer is told so.
const QUEUE_MAX: usize = 2 * PENDING_MAX;
/// How long whoever leaves waits for what is under way.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);

/// A message. Index and local number come back with the outcome.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) index: usize,
    pub(super) local: u64,
    pub(super) target: Target,
    pub(super) body: Bytes,
}

pub(super) struct Sends {
    queue: mpsc::Sender<Outgoing>,
    /// Handed over, without an outcome.
    under_way: usize,
}

impl Sends {
    pub(super) fn start(client: Client, environment: &Environment, answer: mpsc::Sender<Input>) -> Self {
        let (queue, messages) = mpsc::channel(QUEUE_MAX);
        environment.spawn(hand_over(client, environment.clone(), messages, answer));
        Self { queue, under_way: 0 }
    }

    /// Takes a message on. What finds no place has its outcome already.
    pub(super) fn send(&mut self, message: Outgoing) -> Option<Input> {
        use mpsc::error::TrySendError;
        let (message, why) = match self.queue.try_send(message) {
            Ok(()) => {
                self.under_way += 1;
                return None;
            }
            Err(TrySendError::Full(message)) => (message, "too many messages wait for the server"),
            Err(TrySendError::Closed(message)) => (message, "the client was closed"),
        };
        Some(Input::Sent(message.index, message.local, Err(why.to_owned())))
    }

    /// Every answer passes here.
    pub(super) fn answered(&mut self, answer: &Input) {
        if matches!(answer, Input::Sent(..)) {
            self.under_way = self.under_way.saturating_sub(1);
        }
    }

    /// Waits, but not for ever, for the outcomes of what is under way. How many of these messages were not sent.
    pub(super) async fn finish(
        &mut self,
        answers: &mut mpsc::Receiver<Input>,
        hurry: impl Future<Output = ()>,
    ) -> usize {
        let mut refused = 0;
        let outcomes = async {
            while self.under_way > 0 {
                let Some(answer) = answers.recv().await else { return };
                self.answered(&answer);
                refused += usize::from(matches!(answer, Input::Sent(_, _, Err(_))));
            }
        };
        tokio::select! {
            biased;
            () = outcomes => {}
            () = hurry => {}
            () = tokio::time::sleep(LEAVE_PATIENCE) => {}
        }
        self.under_way + refused
    }
}

/// In the few words for which the status line has room beside the list.
pub(super) fn why(error: &SendError) -> String {
    match error {
        SendError::Refused(status) => status.to_string(),
        SendError::BodySize { .. } => "it is too long, send it in parts".to_owned(),
        SendError::Closed(reason) => reason.to_string(),
    }
}

/// Hands messages over one after the other, so that they keep their order.
async fn hand_over(
    client: Client,
    environment: Environment,
    mut messages: mpsc::Receiver<Outgoing>,
    answer: mpsc::Sender<Input>,
) {
    while let Some(Outgoing { index, local, target, body }) = messages.recv().await {
        match client.enqueue(target, body).await {
            Ok(pending) => {
                let answer = answer.clone();
                environment.spawn(async move {
                    let outcome = pending.await.map_err(|error| why(&error));
                    let _ = answer.send(Input::Sent(index, local, outcome)).await;
                });
            }
            Err(error) => {
                let _ = answer.send(Input::Sent(index, local, Err(why(&error)))).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use im_proto::{ConversationId, Timestamp};

    use super::*;
    use crate::client::Sent;

    fn sends(places: usize) -> (Sends, mpsc::Receiver<Outgoing>) {
        let (queue, messages) = mpsc::channel(places);
        (Sends { queue, under_way: 0 }, messages)
    }

    fn message(local: u64) -> Outgoing {
        Outgoing { index: 3, local, target: Target::Me, body: Bytes::from_static(b"x") }
    }

    fn stored(local: u64) -> Input {
        let conversation = ConversationId::from_slice(&[1; 16]).unwrap();
        Input::Sent(3, local, Ok(Sent { conversation, seq: local, sent_at: Timestamp::from_millis(0) }))
    }

    #[test]
    fn a_message_without_a_place_has_its_outcome_at_once() {
        let (mut sends, messages) = sends(1);
        assert!(sends.send(message(1)).is_none());
        let Some(Input::Sent(3, 2, Err(why))) = sends.send(message(2)) else { panic!("no outcome") };
        assert!(why.contains("too many"), "{why}");
        drop(messages);
        let Some(Input::Sent(3, 4, Err(why))) = sends.send(message(4)) else { panic!("no outcome") };
        assert!(why.contains("closed"), "{why}");
        assert_eq!(sends.under_way, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_waits_for_outcomes_and_learns_what_was_not_sent() {
        let (mut sends, _messages) = sends(8);
        let (answer, mut answers) = mpsc::channel(8);
        let before = tokio::time::Instant::now();
        assert_eq!(sends.finish(&mut answers, std::future::pending()).await, 0);
        for local in 1..=3 {
            assert!(sends.send(message(local)).is_none());
        }
        answer.try_send(stored(1)).unwrap();
        answer.try_send(Input::Sent(3, 2, Err("no".to_owned()))).unwrap();
        answer.try_send(stored(3)).unwrap();
        assert_eq!(sends.finish(&mut answers, std::future::pending()).await, 1, "the refused one");
        assert_eq!(before.elapsed(), Duration::ZERO, "there was nothing to wait for");

        for local in 4..=6 {
            assert!(sends.send(message(local)).is_none());
        }
        answer.try_send(stored(4)).unwrap();
        assert_eq!(sends.finish(&mut answers, std::future::pending()).await, 2, "those without an outcome");
        assert_eq!(before.elapsed().as_secs(), LEAVE_PATIENCE.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_in_a_hurry_leaves_at_once() {
        let (mut sends, _messages) = sends(8);
        let (_answer, mut answers) = mpsc::channel(8);
        assert!(sends.send(message(1)).is_none());
        let before = tokio::time::Instant::now();
        assert_eq!(sends.finish(&mut answers, std::future::ready(())).await, 1);
        assert_eq!(before.elapsed(), Duration::ZERO);
    }
}
