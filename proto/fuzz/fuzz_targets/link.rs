//! Batches of links: decoding, the size that the replay buffer counts, and numbers of any value.
#![no_main]

use std::sync::Arc;

use im_proto::{
    link::{Arrival, Batch, Incoming, Outgoing},
    v1,
};
use libfuzzer_sys::fuzz_target;
use prost::Message;

fn take<M: Message + Default>(data: &[u8], numbers: impl Fn(&M) -> (u64, u64))
where
    Arc<M>: Batch,
{
    let Ok(batch) = M::decode(data).map(Arc::new) else { return };
    let (first, acknowledged) = numbers(&batch);
    let mut incoming = Incoming::default();
    for (first, count) in [(1, 3), (first, batch.messages()), (first, batch.messages()), (first.wrapping_add(1), 2)] {
        let before = incoming.received_through();
        if let Arrival::Handle { skip } = incoming.arrive(first, count) {
            assert!(skip <= count);
        }
        assert!(incoming.received_through() >= before);
    }
    let mut outgoing = Outgoing::new(batch.bytes());
    outgoing.push(batch.clone());
    outgoing.push(batch.clone());
    outgoing.acknowledge(acknowledged);
    let _ = outgoing.replay(acknowledged);
    outgoing.push(batch);
}

fuzz_target!(|data: &[u8]| {
    let _ = v1::LinkHello::decode(data);
    take::<v1::GatewayBatch>(data, |batch| (batch.first_number, batch.acknowledged_through));
    take::<v1::RouterBatch>(data, |batch| (batch.first_number, batch.acknowledged_through));
    take::<v1::PeerBatch>(data, |batch| (batch.first_number, batch.acknowledged_through));
});
