//! A page of history.

use im_proto::{ConversationId, UserId, v1};

use crate::event::Entry;

/// A history reply whose entries were parsed.
#[derive(Debug)]
pub(crate) struct HistoryPage {
    pub(crate) conversation: Option<ConversationId>,
    pub(crate) entries: Vec<Entry>,
    pub(crate) head: u64,
    pub(crate) first_seq: u64,
}

impl HistoryPage {
    /// Entries that break the protocol end the page: what follows is asked for again.
    pub(crate) fn from_wire(reply: v1::HistoryReply, me: Option<&UserId>) -> Self {
        let entries = reply.entries.into_iter().map_while(|entry| {
            let gone_reason = entry.gone_reason;
            entry.message.and_then(|message| Entry::from_wire(message, gone_reason, me))
        });
        Self {
            conversation: ConversationId::from_slice(&reply.conversation_id).ok(),
            entries: entries.collect(),
            head: reply.head,
            first_seq: reply.first_seq,
        }
    }
}
