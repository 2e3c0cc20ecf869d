//! Messages on their way from one sender, counted across threads.
//!
//! A message is complete when its sender has the ack and every receiver has the message. The closed loop's window counts messages
//! that are not complete, so the rate of a run is one of messages acknowledged *and* delivered, as in `docs/performance.md`.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use futures::task::AtomicWaker;

/// More than any sender may have un-acknowledged in a session.
const RING: usize = 512;

/// The messages of one sender to one conversation.
pub struct Flow {
    /// Messages in flight, each at the place that its number gives: the number, and below it how many arrivals it still needs.
    missing: Vec<AtomicU64>,
    /// The same of messages whose place was taken. In an open loop only what is un-acknowledged is bounded: as long as a receiver is away
    /// this grows by what is sent to it, which the history keeps as well.
    beyond: Mutex<BTreeMap<u32, u32>>,
    arrivals: u32,
    begun: AtomicU64,
    complete: AtomicU64,
    /// The sender's connection.
    pub waker: AtomicWaker,
}

impl Flow {
    /// A flow whose messages reach this many receivers besides the sender.
    pub fn new(receivers: usize) -> Self {
        Self {
            missing: (0..RING).map(|_| AtomicU64::new(0)).collect(),
            beyond: Mutex::default(),
            arrivals: u32::try_from(receivers).unwrap_or(u32::MAX - 1) + 1,
            begun: AtomicU64::new(0),
            complete: AtomicU64::new(0),
            waker: AtomicWaker::new(),
        }
    }

    fn slot(&self, number: u32) -> &AtomicU64 {
        &self.missing[usize::try_from(number).unwrap_or(0) % RING]
    }

    /// A message is sent for the first time. Only its sender calls this, so that nobody else takes a place that is free.
    pub fn begin(&self, number: u32) {
        let slot = self.slot(number);
        if missing(slot.load(Ordering::Acquire)) == 0 {
            slot.store(u64::from(number) << 32 | u64::from(self.arrivals), Ordering::Release);
        } else {
            let mut beyond = self.beyond.lock().unwrap_or_else(PoisonError::into_inner);
            beyond.insert(number, self.arrivals);
        }
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    /// The sender has the ack, or one receiver has the message.
    pub fn arrived(&self, number: u32) {
        self.lessen(number, 1);
    }

    /// The message was refused for good: nobody waits for it.
    pub fn abandoned(&self, number: u32) {
        self.lessen(number, u32::MAX);
    }

    /// Takes this many off what a message needs. One that needs nothing any more stays as it is.
    fn lessen(&self, number: u32, by: u32) {
        let taken = self.slot(number).fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| {
            let needed = missing(state);
            let left = u64::from(needed.saturating_sub(by));
            (state >> 32 == u64::from(number) && needed > 0).then_some(state >> 32 << 32 | left)
        });
        let left = match taken {
            Ok(before) => Some(missing(before).saturating_sub(by)),
            Err(_) => self.lessen_beyond(number, by),
        };
        if left == Some(0) {
            self.completed();
        }
    }

    fn lessen_beyond(&self, number: u32, by: u32) -> Option<u32> {
        let mut beyond = self.beyond.lock().unwrap_or_else(PoisonError::into_inner);
        let needed = beyond.get_mut(&number)?;
        *needed = needed.saturating_sub(by);
        let left = *needed;
        if left == 0 {
            beyond.remove(&number);
        }
        Some(left)
    }

    fn completed(&self) {
        self.complete.fetch_add(1, Ordering::Release);
        self.waker.wake();
    }

    /// Messages begun and not complete.
    pub fn in_flight(&self) -> u64 {
        let complete = self.complete.load(Ordering::Acquire);
        self.begun.load(Ordering::Relaxed).saturating_sub(complete)
    }
}

/// The arrivals that a place of the ring still needs.
fn missing(state: u64) -> u32 {
    u32::try_from(state & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

/// What a client message id of the harness says: which flow, which message, when it was to be sent. So any receiver in any thread
/// knows the latency without asking the sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageId {
    pub flow: u32,
    pub number: u32,
    /// Microseconds since the run began.
    pub scheduled: u64,
}

impl MessageId {
    pub const BYTES: usize = 16;

    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.flow.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.number.to_be_bytes());
        bytes[8..].copy_from_slice(&self.scheduled.to_be_bytes());
        bytes
    }

    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let number = u128::from_be_bytes(*bytes);
        let part = |shift: u32| u32::try_from((number >> shift) & u128::from(u32::MAX)).unwrap_or(0);
        Some(Self { flow: part(96), number: part(64), scheduled: u64::from(part(32)) << 32 | u64::from(part(0)) })
    }
}

/// Bodies of one size whose text names sender and message, so that no two are the same.
#[derive(Clone, Debug)]
pub struct BodyTemplate {
    bytes: Vec<u8>,
    /// Where the 16 hexadecimal digits of the name begin; none: the body is too small for them.
    digits: Option<usize>,
}

impl BodyTemplate {
    const DIGITS: usize = 16;

    /// Text of this many bytes.
    pub fn new(text_bytes: usize) -> Self {
        let text: String =
            "the quick brown fox jumps over the lazy dog, ".chars().cycle().take(text_bytes.max(1)).collect();
        let bytes = im_proto::body::text(text).to_vec();
        let digits = (text_bytes >= Self::DIGITS).then(|| bytes.len() - text_bytes);
        Self { bytes, digits }
    }

    /// The encoded body of one message. The same message has the same body each time.
    pub fn of(&mut self, id: MessageId) -> &[u8] {
        if let Some(start) = self.digits {
            let name = u64::from(id.flow) << 32 | u64::from(id.number);
            for (place, digit) in self.bytes[start..start + Self::DIGITS].iter_mut().enumerate() {
                let nibble = usize::try_from(name >> (60 - 4 * place) & 15).unwrap_or(0);
                *digit = b"0123456789abcdef"[nibble];
            }
        }
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_complete_after_its_ack_and_all_its_receivers() {
        let flow = Flow::new(2);
        flow.begin(0);
        flow.begin(1);
        for _ in 0..3 {
            assert_eq!(flow.in_flight(), 2);
            flow.arrived(1);
        }
        assert_eq!(flow.in_flight(), 1);
        flow.abandoned(0);
        assert_eq!(flow.in_flight(), 0);
    }

    #[test]
    fn however_many_are_acknowledged_and_not_delivered_all_are_complete_in_the_end() {
        let flow = Flow::new(2);
        let all = 0..2000;
        for number in all.clone() {
            flow.begin(number);
            flow.arrived(number);
        }
        assert_eq!(flow.in_flight(), 2000);
        // Of the two receivers one comes back later.
        all.clone().for_each(|number| flow.arrived(number));
        assert_eq!(flow.in_flight(), 2000);
        all.for_each(|number| flow.arrived(number));
        assert_eq!(flow.in_flight(), 0);
    }

    #[test]
    fn what_arrives_once_more_or_after_a_refusal_counts_for_no_other_message() {
        let flow = Flow::new(0);
        for number in [1, 1 + u32::try_from(RING).unwrap(), 2] {
            flow.begin(number);
        }
        flow.abandoned(1);
        flow.arrived(1);
        flow.abandoned(1);
        assert_eq!(flow.in_flight(), 2);
        flow.arrived(1 + u32::try_from(RING).unwrap());
        flow.arrived(2);
        flow.arrived(2);
        assert_eq!(flow.in_flight(), 0);
        flow.begin(3);
        assert_eq!(flow.in_flight(), 1);
    }

    #[test]
    fn ids_and_bodies_say_which_message_they_are() {
        let id = MessageId { flow: 7, number: 0xfedc_ba98, scheduled: 0x0123_4567_89ab_cdef };
        assert_eq!(MessageId::parse(&id.to_bytes()), Some(id));
        assert_eq!(MessageId::parse(b"short"), None);
        let mut template = BodyTemplate::new(100);
        let one = template.of(id).to_vec();
        im_proto::body::validate(&one).unwrap();
        assert!(String::from_utf8_lossy(&one).contains("00000007fedcba98"));
        assert_ne!(one, template.of(MessageId { number: 1, ..id }));
        im_proto::body::validate(BodyTemplate::new(3).of(id)).unwrap();
    }
}
