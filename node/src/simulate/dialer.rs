//! The connections of the clients of a run, and what is read along on them: what was acknowledged, and what was tried how often.

use std::{
    pin::Pin,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use im_client::{DialError, Dialer, Endpoint, Stream};
use im_proto::{
    frame::{self, Decoded},
    limits,
    v1::{self, client_frame, server_frame},
};
use parking_lot::Mutex;
use tokio::time::timeout;

use super::{people::Record, world::World};

/// Bytes in each piece of a simulated stream.
const STREAM_BYTES: usize = 4 * 1024;

/// Dials gateways by their names.
pub struct SimDialer {
    world: Weak<World>,
    record: Weak<Mutex<Record>>,
    from: String,
}

impl SimDialer {
    /// For the device of that name.
    pub fn new(world: &Arc<World>, record: &Arc<Mutex<Record>>, from: &str) -> Self {
        Self { world: Arc::downgrade(world), record: Arc::downgrade(record), from: from.to_owned() }
    }
}

impl Dialer for SimDialer {
    fn dial<'a>(
        &'a self,
        endpoint: &'a Endpoint,
    ) -> Pin<Box<dyn Future<Output = Result<Stream, DialError>> + Send + 'a>> {
        Box::pin(async move {
            let refused = |why: &str| DialError(format!("{}: {why}", endpoint.address));
            let world = self.world.upgrade().ok_or_else(|| refused("the run is over"))?;
            let gateway = endpoint.server_name();
            let reached = timeout(Duration::from_secs(3), world.network.reach(&self.from, gateway)).await;
            if reached != Ok(true) {
                return Err(refused("no answer"));
            }
            let (end, near) = tokio::io::duplex(STREAM_BYTES);
            let (far, server_end) = tokio::io::duplex(STREAM_BYTES);
            if !world.accept(gateway, server_end) {
                return Err(refused("connection refused"));
            }
            let connection = self.record.upgrade().map_or(0, |record| {
                let mut record = record.lock();
                record.connections += 1;
                record.connections
            });
            let (record, from) = (self.record.clone(), self.from.clone());
            let sent = frames(self.record.clone(), move |record, payload| note_send(record, connection, payload));
            let heard = frames(record, move |record, payload| note_ack(record, &from, payload));
            world.network.join_stream(&self.from, gateway, (near, sent), (far, heard));
            Ok(Box::new(end) as Stream)
        })
    }
}

/// Reads along the frames of one direction.
fn frames(
    record: Weak<Mutex<Record>>,
    mut note: impl FnMut(&mut Record, Bytes) + Send + 'static,
) -> impl FnMut(&[u8]) + Send + 'static {
    let mut input = BytesMut::new();
    move |bytes| {
        input.extend_from_slice(bytes);
        let Some(record) = record.upgrade() else { return };
        while let Ok(Some(payload)) = frame::split_frame(&mut input, limits::FRAME_BYTES_MAX) {
            note(&mut record.lock(), payload);
        }
    }
}

fn note_send(record: &mut Record, connection: u64, payload: Bytes) {
    if let Ok(Decoded::Frame(client_frame::Frame::Send(send))) = frame::decode_client_frame(payload) {
        record.tried.entry(send.body).or_default().insert(connection);
    }
}

fn note_ack(record: &mut Record, from: &str, payload: Bytes) {
    let Ok(Decoded::Frame(server_frame::Frame::SendAck(ack))) = frame::decode_server_frame(payload) else { return };
    if ack.status.as_ref().is_some_and(|status: &v1::Status| status.code != 0) {
        return;
    }
    let before = *record.acknowledged.entry((ack.conversation_id, ack.client_message_id)).or_insert(ack.seq);
    if before != ack.seq {
        record.broken.push(format!("{from} was told seq {before}, then seq {} of one message", ack.seq));
    }
}
