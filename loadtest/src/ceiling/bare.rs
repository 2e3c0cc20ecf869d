//! The bare router's frames as the traffic's wire.

use super::{FrameSizes, Measurement, Workload, frames};
use crate::{
    bench::{Part, Seen, Wire},
    crowd::MessageId,
    driver::each_frame,
};

/// A heartbeat of the product: a frame with an empty ping.
const HEARTBEAT_BYTES: usize = 6;

pub(super) struct Bare {
    workload: Workload,
    /// Connection number of the first receiver.
    receivers: u32,
    send_bytes: usize,
}

impl Bare {
    pub(super) fn new(measurement: &Measurement) -> Self {
        Self {
            workload: measurement.workload,
            receivers: u32::try_from(measurement.size.max(1)).unwrap_or(u32::MAX),
            send_bytes: FrameSizes::of(measurement.body_bytes).send,
        }
    }
}

impl Wire for Bare {
    fn greet(&mut self, connection: usize, _: Part, out: &mut Vec<u8>) {
        let number = u32::try_from(connection).unwrap_or(u32::MAX);
        frames::put(out, 0, frames::HELLO, number, &[0; MessageId::BYTES]);
    }

    fn send(&mut self, part: Part, id: MessageId, out: &mut Vec<u8>) {
        let flow = if let Part::Sender(flow) = part { flow } else { 0 };
        let (size, kind, destination) = match self.workload {
            Workload::Echo => (self.send_bytes, frames::ECHO, flow),
            Workload::Pairs => (self.send_bytes, frames::SEND, self.receivers + flow),
            Workload::Fanout => (self.send_bytes, frames::FAN, 0),
            Workload::Idle => (HEARTBEAT_BYTES, frames::ECHO, 0),
        };
        frames::put(out, size, kind, destination, &id.to_bytes());
    }

    fn take(&mut self, _: usize, _: Part, bytes: &[u8], seen: &mut Vec<Seen>, _: &mut Vec<u8>) -> Result<usize, usize> {
        each_frame(bytes, |payload| {
            let Some((kind, _, id)) = frames::parse(payload) else { return };
            let id = MessageId::parse(id);
            seen.extend(match (kind, id) {
                (frames::HELLO, _) => Some(Seen::Ready),
                (frames::ACK, Some(id)) => Some(Seen::Ack(id)),
                (frames::MESSAGE, Some(id)) => Some(Seen::Message(id)),
                (_, Some(id)) => Some(Seen::Echo(id)),
                (_, None) => None,
            });
        })
    }
}
