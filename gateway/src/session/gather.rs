//! Messages of one step, by link, pushed once each.

use std::sync::Arc;

use im_proto::v1::{GatewayMessage, gateway_message::Message};

use crate::link::Link;

/// A step touches few links, so a list is enough.
#[derive(Default)]
pub(crate) struct Gather {
    lists: Vec<(Arc<Link>, Vec<GatewayMessage>)>,
}

impl Gather {
    pub fn add(&mut self, link: &Arc<Link>, message: Message) {
        let message = GatewayMessage { message: Some(message) };
        match self.lists.iter_mut().find(|(known, _)| Arc::ptr_eq(known, link)) {
            Some((_, list)) => list.push(message),
            None => self.lists.push((link.clone(), vec![message])),
        }
    }

    /// Pushes everything. The caller still holds the session's lock.
    pub fn flush(&mut self) {
        for (link, mut list) in self.lists.drain(..) {
            link.push(&mut list);
        }
    }
}
