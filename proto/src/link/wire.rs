//! A [`LinkItem`] as a protobuf message: `GatewayLinkItem`, `RouterLinkItem` and `PeerLinkItem` of link.proto.
//!
//! Written by hand, because a batch is shared with its sender's replay buffer: it is encoded from there, and never copied before.
//! Decoding copies each field of bytes out of the read buffer. A field that were a slice of it would hold a whole batch in memory
//! for as long as the slowest reader of one message takes.

use std::sync::Arc;

use bytes::{Buf, BufMut};
use prost::{
    DecodeError, Message,
    encoding::{DecodeContext, WireType, message, skip_field},
};

use super::channel::LinkItem;
use crate::v1;

const HELLO_TAG: u32 = 1;
const BATCH_TAG: u32 = 2;

/// An item on the wire; `None` if it is of a kind that this build does not know.
#[derive(Debug)]
pub struct WireItem<B>(pub Option<LinkItem<B>>);

impl<B> Default for WireItem<B> {
    fn default() -> Self {
        Self(None)
    }
}

impl<B: Message + Default + Clone> Message for WireItem<B> {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        match &self.0 {
            Some(LinkItem::Hello(hello)) => message::encode(HELLO_TAG, hello, buf),
            Some(LinkItem::Batch(batch)) => message::encode(BATCH_TAG, &**batch, buf),
            None => {}
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        let buf = &mut Copying(buf);
        match tag {
            HELLO_TAG => {
                let mut hello = match self.0.take() {
                    Some(LinkItem::Hello(hello)) => hello,
                    _ => v1::LinkHello::default(),
                };
                message::merge(wire_type, &mut hello, buf, ctx)?;
                self.0 = Some(LinkItem::Hello(hello));
                Ok(())
            }
            BATCH_TAG => {
                let mut batch = match self.0.take() {
                    Some(LinkItem::Batch(batch)) => batch,
                    _ => Arc::default(),
                };
                message::merge(wire_type, Arc::make_mut(&mut batch), buf, ctx)?;
                self.0 = Some(LinkItem::Batch(batch));
                Ok(())
            }
            _ => skip_field(wire_type, tag, buf, ctx),
        }
    }

    fn encoded_len(&self) -> usize {
        match &self.0 {
            Some(LinkItem::Hello(hello)) => message::encoded_len(HELLO_TAG, hello),
            Some(LinkItem::Batch(batch)) => message::encoded_len(BATCH_TAG, &**batch),
            None => 0,
        }
    }

    fn clear(&mut self) {
        self.0 = None;
    }
}

/// A buffer whose bytes are copied out, never shared: it leaves `copy_to_bytes` to the trait, which allocates.
struct Copying<'a, B>(&'a mut B);

impl<B: Buf> Buf for Copying<'_, B> {
    fn remaining(&self) -> usize {
        self.0.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.0.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.0.advance(count);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn with_body(body: &Bytes) -> WireItem<v1::GatewayBatch> {
        let send = v1::Send { body: body.clone(), ..v1::Send::default() };
        let message = v1::gateway_message::Message::Send(v1::SessionSend { send: Some(send), ..Default::default() });
        let batch = v1::GatewayBatch {
            first_number: 7,
            messages: vec![v1::GatewayMessage { message: Some(message) }],
            ..v1::GatewayBatch::default()
        };
        WireItem(Some(LinkItem::Batch(Arc::new(batch))))
    }

    fn body_of(item: &WireItem<v1::GatewayBatch>) -> Option<&Bytes> {
        let Some(LinkItem::Batch(batch)) = &item.0 else { return None };
        match batch.messages.first()?.message.as_ref()? {
            v1::gateway_message::Message::Send(send) => Some(&send.send.as_ref()?.body),
            _ => None,
        }
    }

    #[test]
    fn what_is_decoded_holds_no_part_of_the_read_buffer() {
        let body = Bytes::from(vec![b'x'; 100]);
        let read = Bytes::from(with_body(&body).encode_to_vec());
        let item = WireItem::<v1::GatewayBatch>::decode(read.clone()).expect("it decodes");
        assert_eq!(body_of(&item), Some(&body));
        assert!(read.is_unique(), "somebody still holds the read buffer");
    }

    #[test]
    fn an_item_of_an_unknown_kind_is_no_item() {
        let unknown = [0x1a, 0x02, 0x08, 0x01];
        let item = WireItem::<v1::PeerBatch>::decode(unknown.as_slice()).expect("it is skipped");
        assert!(item.0.is_none());
    }
}
