//! What a router holds, in words, for whoever looks for what does not come back: its shards, what its conversations wait for, and whose
//! sessions it has.

use std::fmt::Write as _;

use im_proto::ConversationId;
use tokio::sync::oneshot;

use super::{Worker, input::Input, waiting::Slot};
use crate::{
    Router,
    conversation::{Busy, Conversation},
};

impl Router {
    /// A line for each shard, for each conversation that waits for something, and for each user with a session; nothing of a router that
    /// has ended.
    pub async fn describe(&self) -> Vec<String> {
        let cluster = &self.cluster;
        let mut lines = Vec::new();
        for worker in 0..cluster.config.workers {
            let (answer, described) = oneshot::channel();
            let step = move |worker: &mut Worker| {
                // Whoever asked may have gone.
                let _ = answer.send(worker.describe());
            };
            cluster.to_worker(worker, Input::Run(Box::new(step)));
            lines.extend(described.await.unwrap_or_default());
        }
        lines
    }
}

impl Worker {
    fn describe(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (shard, state) in self.context.describe_shards() {
            lines.push(format!("shard {}: {state}", shard.0));
            let ids = self.conversations.of_shard(shard);
            lines.extend(ids.into_iter().filter_map(|id| Some(format!("{id}: {}", self.waits_for(&id)?))));
        }
        let left = self.context.left_bursts();
        if left > 0 {
            lines.push(format!("{left} conversations left memory before their bursts could end"));
        }
        let opens = &self.context.opens;
        let (running, stuck) = (opens.running(), opens.stuck());
        if running + stuck > 0 {
            lines.push(format!("{running} opens are under way, {stuck} get no answer, {} wait", opens.waiting()));
        }
        lines.extend(self.context.describe_sessions());
        lines
    }

    fn waits_for(&self, id: &ConversationId) -> Option<String> {
        match self.conversations.get(id)? {
            Slot::Opening { attempt, waiting } => Some(format!("is opened, try {attempt}, {} wait", waiting.len())),
            Slot::Raising { waiting } => Some(format!("its epoch is raised, {} wait", waiting.len())),
            Slot::Open(conversation) => in_words(conversation),
        }
    }
}

/// What an open conversation waits for, if anything.
fn in_words(conversation: &Conversation) -> Option<String> {
    let mut text = String::new();
    if !conversation.is_settled() {
        let (committed, assigned) = (conversation.committed, conversation.assigned);
        let _ = write!(text, "committed to {committed} of {assigned}, ");
    }
    if let Some(in_flight) = &conversation.in_flight {
        let (attempts, confirmed) = (in_flight.attempts, in_flight.confirmed);
        let _ = write!(text, "a batch repeated {attempts} times, confirmed: {confirmed}, ");
    }
    if matches!(conversation.busy, Busy::Writing | Busy::Ending) {
        let _ = write!(text, "busy row: {:?}, ", conversation.busy);
    }
    if let Some(first) = conversation.unwritten.first() {
        let _ = write!(text, "rows unwritten from {first}, ");
    }
    if let Some(first) = conversation.outbox.first_waiting() {
        let _ = write!(text, "effects from {first}, ");
    }
    if conversation.marks_writing {
        text.push_str("marks are written, ");
    }
    if !conversation.waiters.is_empty() {
        let _ = write!(text, "waited for at {} seqs, ", conversation.waiters.len());
    }
    (!text.is_empty()).then(|| format!("open, {text}epoch {:?}", conversation.epoch))
}
