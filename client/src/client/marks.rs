//! What people see of each other beside messages: read marks, who is typing; replies and forwards.

use im_proto::{ConversationId, UserId, limits, method::Method, v1};

use super::{Client, Sent};
use crate::{
    catch_up::wire_target,
    compose,
    config::Target,
    core::Command,
    error::{CallError, ClosedReason, ForwardError, SendError},
};

impl Client {
    /// Moves the read cursor forward to `seq`. The other members and the user's other devices learn it as a signal.
    pub async fn mark_read(&self, target: Target, seq: u64) -> Result<v1::MarkReadReply, CallError> {
        let target = Some(wire_target(&self.resolved(target).await?));
        self.call(Method::ConversationMarkRead, &v1::MarkReadRequest { target, seq }).await
    }

    /// Says that everything through `seq` has arrived. Unless [`crate::ClientConfig::receipts`] is off the client does this by itself
    /// for every entry that it hands over as an event. While the user is invisible it is held back.
    pub async fn received(&self, conversation: ConversationId, seq: u64) -> Result<(), ClosedReason> {
        let sent = self.inner.commands.send(Command::Received { conversation, seq }).await;
        sent.map_err(|_| self.closed_reason())
    }

    /// Tells the other members that the user types, or has stopped. Send it again every few seconds while it goes on: it is never
    /// stored, and what exceeds [`limits::SIGNALS_PER_SECOND_MAX`] is dropped. While the user is invisible it is not sent at all.
    pub async fn typing(&self, target: Target, active: bool) -> Result<(), ClosedReason> {
        self.signal(target, v1::signal::Signal::Typing(v1::Typing { active })).await
    }

    /// Sends a signal: to the other members who are connected, once at most, without an answer. Without a connection it is lost.
    pub async fn signal(&self, target: Target, signal: v1::signal::Signal) -> Result<(), ClosedReason> {
        let sent = self.inner.commands.send(Command::Signal { target, signal }).await;
        sent.map_err(|_| self.closed_reason())
    }

    /// Answers an entry of the same conversation. An entry that does not exist is refused with `not found`.
    pub async fn reply(&self, target: Target, seq: u64, text: &str) -> Result<Sent, SendError> {
        self.send(target, compose::Text::new(text).reply(seq)).await
    }

    /// Sends copies of entries of one conversation to others, as one message each. What the user may not read, or what is gone,
    /// cannot be forwarded. Gives what was stored, in the order of `to`.
    pub async fn forward(
        &self,
        from: Target,
        seqs: &[u64],
        to: &[Target],
        title: &str,
    ) -> Result<Vec<Sent>, ForwardError> {
        let mut entries = Vec::with_capacity(seqs.len().min(limits::HISTORY_ENTRIES_MAX as usize));
        for seq in seqs {
            let page = self.history(from.clone(), *seq, *seq, 1, false).await?;
            let entry = page.entries.into_iter().find(|entry| entry.seq == *seq && entry.gone_reason == 0);
            let entry = entry.filter(|entry| entry.kind == v1::EntryKind::Message);
            let entry = entry.ok_or(ForwardError::NothingThere { seq: *seq })?;
            entries.push(v1::ForwardedEntry {
                sender: entry.sender.as_ref().map(UserId::to_string).unwrap_or_default(),
                sent_at_ms: entry.sent_at.as_millis(),
                body: entry.body,
            });
        }
        let body = compose::forward(title, entries);
        let mut sent = Vec::with_capacity(to.len());
        for target in to {
            sent.push(self.send(target.clone(), body.clone()).await?);
        }
        Ok(sent)
    }
}
