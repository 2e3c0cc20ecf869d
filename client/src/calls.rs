//! Calls of the api over the connection: matched to their replies by request id, at most so many in flight.
//!
//! The application's calls go out again after a reconnect (every method may be repeated). The client's own calls do not: what they
//! were for is decided anew after the sync.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Bytes, BytesMut};
use im_proto::{ConversationId, StatusCode, limits, method::Method, v1};
use tokio::{sync::oneshot, time::Instant};

use crate::{
    error::{CallError, ClosedReason, Status},
    pending::LaneId,
};

/// Bytes of a call in a frame, its request not counted, at most: two tags and lengths, two numbers with their tags.
pub(crate) const ENVELOPE_BYTES_MAX: usize = 32;
/// A reply larger than this breaks the protocol: a full history page of the largest bodies is 64 MiB.
const REPLY_BYTES_MAX: usize = 80 * 1024 * 1024;

/// What a reply is for.
pub(crate) enum Purpose {
    Application(oneshot::Sender<Result<Bytes, CallError>>),
    Sync,
    CatchUp(ConversationId),
    Search(LaneId),
    Watch,
}

pub(crate) struct Request {
    pub(crate) method: Method,
    pub(crate) request: Bytes,
    pub(crate) purpose: Purpose,
}

struct InFlight {
    request: Request,
    /// Parts of the reply so far.
    parts: BytesMut,
}

#[derive(Default)]
pub(crate) struct Calls {
    next_id: u32,
    in_flight: BTreeMap<u32, InFlight>,
    own: VecDeque<Request>,
    application: VecDeque<Request>,
    /// When replies were last known to come.
    progress: Option<Instant>,
}

impl Calls {
    /// Queues a call. The application's wait in a queue that the number of its permits bounds.
    pub(crate) fn push(&mut self, request: Request) {
        match request.purpose {
            Purpose::Application(_) => self.application.push_back(request),
            _ => self.own.push_back(request),
        }
    }

    /// The next call to send, the client's own first; those are made to fit. One of the application that no frame takes is refused:
    /// the server would end the connection, and it would be repeated in the next one.
    pub(crate) fn next_call(&mut self, in_flight_max: usize, frame_bytes_max: usize, now: Instant) -> Option<v1::Call> {
        if self.in_flight.len() >= in_flight_max {
            return None;
        }
        self.application.retain(|request| match &request.purpose {
            Purpose::Application(reply) => !reply.is_closed(),
            _ => true,
        });
        let request = loop {
            let request = self.own.pop_front().or_else(|| self.application.pop_front())?;
            let found = request.request.len() + ENVELOPE_BYTES_MAX;
            match request.purpose {
                Purpose::Application(reply) if found > frame_bytes_max => {
                    // The caller may have lost interest.
                    let _ = reply.send(Err(CallError::RequestSize { found, limit: frame_bytes_max }));
                }
                _ => break request,
            }
        };
        if self.in_flight.is_empty() {
            self.progress = Some(now);
        }
        self.next_id = self.next_id.wrapping_add(1);
        let call =
            v1::Call { request_id: self.next_id, method: request.method.number(), request: request.request.clone() };
        self.in_flight.insert(self.next_id, InFlight { request, parts: BytesMut::new() });
        Some(call)
    }

    /// A part of a reply; the whole one when it is complete. Parts of unknown calls are ignored.
    pub(crate) fn replied(&mut self, reply: v1::Reply, now: Instant) -> Option<(Purpose, Result<Bytes, Status>)> {
        let call = self.in_flight.get_mut(&reply.request_id)?;
        self.progress = Some(now);
        let status = Status::from_wire(reply.status).or_else(|| {
            let bytes = call.parts.len() + reply.payload.len();
            (bytes > REPLY_BYTES_MAX).then(|| Status::from_code(StatusCode::TooLarge))
        });
        if status.is_none() && !reply.last {
            call.parts.extend_from_slice(&reply.payload);
            return None;
        }
        let InFlight { request, mut parts } = self.in_flight.remove(&reply.request_id)?;
        let result = match status {
            Some(status) => Err(status),
            // The usual case: one part, not copied.
            None if parts.is_empty() => Ok(reply.payload),
            None => {
                parts.extend_from_slice(&reply.payload);
                Ok(parts.freeze())
            }
        };
        Some((request.purpose, result))
    }

    /// Since when replies are due and none came.
    pub(crate) fn stalled_since(&self) -> Option<Instant> {
        self.progress.filter(|_| !self.in_flight.is_empty())
    }

    /// The session ended.
    pub(crate) fn disconnected(&mut self) {
        self.own.clear();
        for (_, call) in std::mem::take(&mut self.in_flight).into_iter().rev() {
            if matches!(call.request.purpose, Purpose::Application(_)) {
                self.application.push_front(call.request);
            }
        }
    }

    /// The client has ended: nobody will reply.
    pub(crate) fn close(&mut self, reason: &ClosedReason) {
        self.disconnected();
        for request in std::mem::take(&mut self.application) {
            if let Purpose::Application(reply) = request.purpose {
                let _ = reply.send(Err(CallError::Closed(reason.clone())));
            }
        }
    }
}

/// Calls in flight that this session allows.
pub(crate) fn in_flight_max(limits: Option<&v1::Limits>) -> usize {
    let told = limits.and_then(|limits| usize::try_from(limits.calls_in_flight).ok()).filter(|told| *told > 0);
    told.unwrap_or(limits::CALLS_IN_FLIGHT_MAX)
}

/// Bytes of a frame that the server takes in this session.
pub(crate) fn frame_bytes_max(limits: Option<&v1::Limits>) -> usize {
    let told = limits.and_then(|limits| usize::try_from(limits.frame_bytes).ok()).filter(|told| *told > 0);
    told.unwrap_or(limits::FRAME_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use im_proto::v1::client_frame;
    use prost::Message as _;

    use super::*;

    #[test]
    fn no_call_has_more_around_its_request_than_is_counted() {
        let request = Bytes::from(vec![0; 16 * 1024 * 1024]);
        let call = v1::Call { request_id: u32::MAX, method: u32::MAX, request: request.clone() };
        let frame = v1::ClientFrame::from(client_frame::Frame::Call(call));
        assert!(frame.encoded_len() - request.len() <= ENVELOPE_BYTES_MAX);
    }
}
