//! The status table: number, name, text, whether a retry helps, whether the connection stays open. Written once, here.

use std::fmt;

use crate::{environment::Random, v1};

/// The metadata in which an answer over gRPC carries the number of its status, beside the code of gRPC, which says less.
pub const GRPC_METADATA: &str = "im-status";
/// The metadata in which it carries the correlation id, if it has one.
pub const GRPC_CORRELATION_METADATA: &str = "im-correlation-id";

/// Names one event in the server's log to whoever it befell: the same in the status and in the field `correlation_id` of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CorrelationId(u64);

impl CorrelationId {
    /// A new one.
    pub fn draw(random: &dyn Random) -> Self {
        Self(random.next_u64())
    }

    /// The status of the event.
    pub fn of(self, status: v1::Status) -> v1::Status {
        v1::Status { correlation_id: self.to_string(), ..status }
    }
}

impl fmt::Display for CorrelationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What the receiver of a status may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The same request fails again.
    Never,
    /// Later, after `retry_after_ms` or the client's own back-off.
    Later,
    /// After something named by the status was done first (renew the token, sync, re-order).
    After,
}

impl Retry {
    /// The word for SPEC.md and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Retry::Never => "never",
            Retry::Later => "later",
            Retry::After => "after",
        }
    }
}

macro_rules! statuses {
    ($($(#[doc = $doc:literal])* $name:ident = $number:literal, $text:literal, $retry:ident, $closes:literal;)*) => {
        /// A status of the protocol. A retired number stays in the table.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum StatusCode {
            $($(#[doc = $doc])* $name,)*
        }

        impl StatusCode {
            /// All statuses in the order of their numbers.
            pub const ALL: &'static [StatusCode] = &[$(StatusCode::$name),*];

            /// The number in `Status.code`.
            pub const fn number(self) -> u32 {
                match self { $(StatusCode::$name => $number,)* }
            }

            /// The stable text in `Status.text`.
            pub const fn text(self) -> &'static str {
                match self { $(StatusCode::$name => $text,)* }
            }

            /// What it means, for SPEC.md.
            pub const fn meaning(self) -> &'static str {
                match self { $(StatusCode::$name => concat!($($doc),*),)* }
            }

            /// Whether and when a retry helps.
            pub const fn retry(self) -> Retry {
                match self { $(StatusCode::$name => Retry::$retry,)* }
            }

            /// Whether the server closes the connection after it.
            pub const fn closes(self) -> bool {
                match self { $(StatusCode::$name => $closes,)* }
            }

            /// The status of a number, if there is one.
            pub const fn from_number(number: u32) -> Option<StatusCode> {
                match number { $($number => Some(StatusCode::$name),)* _ => None }
            }
        }
    };
}

statuses! {
    /// The bytes or fields break a rule of SPEC.md.
    Malformed = 1, "malformed", Never, false;
    /// A frame, body, id or list is over its limit.
    TooLarge = 2, "too large", Never, false;
    /// A frame that this version does not know.
    UnknownFrame = 3, "unknown frame", Never, false;
    /// No common protocol version.
    WrongVersion = 4, "wrong version", Never, true;
    /// The token is missing, malformed, not signed by a known key, for another cluster, or lasts too long.
    Unauthenticated = 5, "unauthenticated", After, true;
    /// The token was good and has expired.
    TokenExpired = 6, "token expired", After, true;
    /// The device or token was revoked.
    Revoked = 7, "revoked", Never, true;
    /// A newer session of the same device or platform took this one's place, or another device of the user ended it.
    KickedByAnotherDevice = 8, "kicked by another device", Never, true;
    /// The caller may not do this.
    Forbidden = 9, "forbidden", Never, false;
    /// The receiver does not take messages from the sender.
    Blocked = 10, "blocked", Never, false;
    /// The sender may not write here now.
    Muted = 11, "muted", Never, false;
    /// The sender, or somebody whom the message mentions, is not in the conversation.
    NotAMember = 12, "not a member", Never, false;
    /// There is no such thing, or the caller may not know of it. For a quote: the entry that it answers.
    NotFound = 13, "not found", Never, false;
    /// There is such a thing already.
    AlreadyExists = 14, "already exists", Never, false;
    /// The request contradicts what was stored before: for a repeated client message id, another body.
    PreconditionFailed = 15, "precondition failed", Never, false;
    /// `after` names a send that the owner does not have. Send that one again first.
    OutOfOrder = 16, "out of order", After, false;
    /// The owner cannot tell whether this was sent before. Read the log from `known_seq + 1`, look for the id, then send again.
    SyncFirst = 17, "sync first", After, false;
    /// What was asked for is no longer kept.
    Gone = 18, "gone", Never, false;
    /// Over the rate limit.
    RateLimited = 19, "rate limited", Later, false;
    /// A queue is full.
    Overloaded = 20, "overloaded", Later, false;
    /// The owner or the store cannot answer now. Whether the request took effect is not known; a repeat is safe.
    Unavailable = 21, "unavailable", Later, false;
    /// The server is shutting down. Connect to another endpoint.
    Draining = 22, "draining", Later, true;
    /// No frame arrived within the deadline.
    TimedOut = 23, "timed out", Later, true;
    /// A mistake of the server. The correlation id finds it in the log.
    Internal = 24, "internal", Later, false;
    /// The method number is not in the table.
    UnknownMethod = 25, "unknown method", Never, false;
}

impl StatusCode {
    /// The message for the wire.
    pub fn to_status(self) -> v1::Status {
        v1::Status { code: self.number(), text: self.text().to_owned(), ..v1::Status::default() }
    }

    /// The message for the wire with the time after which a retry makes sense.
    pub fn retry_after(self, retry_after: std::time::Duration) -> v1::Status {
        let retry_after_ms = u32::try_from(retry_after.as_millis()).unwrap_or(u32::MAX);
        v1::Status { retry_after_ms, ..self.to_status() }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn numbers_ascend_without_a_hole_so_none_was_taken_out() {
        let numbers: Vec<u32> = StatusCode::ALL.iter().map(|code| code.number()).collect();
        let expected: Vec<u32> = (1..).take(numbers.len()).collect();
        assert_eq!(numbers, expected);
    }

    #[test]
    fn a_status_is_found_by_its_number_and_0_is_none() {
        for code in StatusCode::ALL {
            assert_eq!(StatusCode::from_number(code.number()), Some(*code));
        }
        assert_eq!(StatusCode::from_number(0), None);
        assert_eq!(StatusCode::from_number(u32::MAX), None);
    }

    #[test]
    fn texts_are_distinct_and_short() {
        for (i, code) in StatusCode::ALL.iter().enumerate() {
            assert!((1..=32).contains(&code.text().len()));
            assert!(StatusCode::ALL[..i].iter().all(|other| other.text() != code.text()));
        }
    }

    #[test]
    fn a_status_on_the_wire_has_number_text_and_when_to_retry() {
        let status = StatusCode::RateLimited.retry_after(Duration::from_millis(1500));
        assert_eq!((status.code, status.text.as_str(), status.retry_after_ms), (19, "rate limited", 1500));
        assert_eq!(StatusCode::RateLimited.retry_after(Duration::MAX).retry_after_ms, u32::MAX);
        assert_eq!(StatusCode::Malformed.to_status().retry_after_ms, 0);
    }

    #[test]
    fn a_correlation_id_is_the_same_word_in_the_log_and_in_the_status() {
        let id = CorrelationId(0xab);
        let status = id.of(StatusCode::Unavailable.retry_after(Duration::from_millis(200)));
        assert_eq!((status.code, status.retry_after_ms), (StatusCode::Unavailable.number(), 200));
        assert_eq!(
            (status.correlation_id.as_str(), id.to_string()),
            ("00000000000000ab", "00000000000000ab".to_owned())
        );
    }
}
