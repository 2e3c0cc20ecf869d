//! An item of a link over gRPC, whose decoder is written by hand: it decodes again from its own encoding, is as long as it says, and
//! holds no part of the buffer that it was read from.
#![no_main]

use std::sync::Arc;

use bytes::Bytes;
use im_proto::{
    link::{Batch, wire::WireItem},
    v1,
};
use libfuzzer_sys::fuzz_target;
use prost::Message;

fn read<B: Message + Default + Clone>(data: &[u8])
where
    Arc<B>: Batch,
{
    let buffer = Bytes::copy_from_slice(data);
    let Ok(item) = WireItem::<B>::decode(buffer.clone()) else { return };
    assert!(data.is_empty() || buffer.is_unique(), "somebody still holds the read buffer");
    let encoded = item.encode_to_vec();
    assert_eq!(encoded.len(), item.encoded_len());
    let again = WireItem::<B>::decode(encoded.as_slice()).expect("its own encoding is refused");
    assert_eq!(again.encode_to_vec(), encoded);
    // A field that comes twice is one message merged of both, and never a panic.
    let twice = WireItem::<B>::decode([data, data].concat().as_slice()).expect("each half decodes");
    assert_eq!(twice.0.is_some(), item.0.is_some());
}

fuzz_target!(|data: &[u8]| {
    read::<v1::GatewayBatch>(data);
    read::<v1::RouterBatch>(data);
    read::<v1::PeerBatch>(data);
});
