//! Requests as commands of Redis, and its answers.

use std::{fmt::Write as _, time::Duration};

use redis::{Pipeline, Value};
use tokio::sync::oneshot;

use super::super::{Hint, HintKey};

/// Stores a hint unless there is one of a greater version. Versions are compared as texts of one length.
const RAISE: &str = "local old = redis.call('GET', KEYS[1]) \
                     if not old or string.sub(old, 1, 20) <= string.sub(ARGV[1], 1, 20) then \
                     redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end return 0";

/// Adds to the count of a window; gives it and that of the window before.
const COUNT: &str = "local current = redis.call('INCRBY', KEYS[1], ARGV[1]) \
                     redis.call('PEXPIRE', KEYS[1], ARGV[2]) \
                     return {current, tonumber(redis.call('GET', KEYS[2]) or '0')}";

/// What is asked. Answers go to nobody if they come too late; a request that is dropped is answered by that.
pub(super) enum Request {
    Raise(Vec<(HintKey, Hint, Duration)>),
    Read { keys: Vec<HintKey>, answer: oneshot::Sender<Vec<Option<Hint>>> },
    Count { subject: String, cost: u32, window: u64, lifetime: Duration, answer: oneshot::Sender<Counts> },
}

/// What a subject has used.
#[derive(Debug)]
pub(super) struct Counts {
    pub(super) current: u64,
    pub(super) previous: u64,
}

impl Request {
    /// Whether nobody waits for the answer any more. A count counts all the same.
    pub(super) fn is_abandoned(&self) -> bool {
        matches!(self, Self::Read { answer, .. } if answer.is_closed())
    }

    /// Commands that it takes.
    pub(super) fn commands(&self) -> usize {
        match self {
            Self::Raise(hints) => hints.len(),
            Self::Read { keys, .. } => keys.len(),
            Self::Count { .. } => 1,
        }
    }

    /// Puts its commands behind the others.
    pub(super) fn put(&self, prefix: &str, pipeline: &mut Pipeline) {
        match self {
            Self::Raise(hints) => {
                for (key, hint, lifetime) in hints {
                    let [one, two] = hint.numbers;
                    let value = format!("{:020} {one} {two}", hint.version);
                    pipeline.cmd("EVAL").arg(RAISE).arg(1).arg(hint_key(prefix, key)).arg(value).arg(millis(*lifetime));
                }
            }
            Self::Read { keys, .. } => {
                for key in keys {
                    pipeline.cmd("GET").arg(hint_key(prefix, key));
                }
            }
            Self::Count { subject, cost, window, lifetime, .. } => {
                let subject = format!("{prefix}:l:{{{}}}", hexadecimal(subject.as_bytes()));
                let (current, before) =
                    (format!("{subject}:{window}"), format!("{subject}:{}", window.wrapping_sub(1)));
                pipeline.cmd("EVAL").arg(COUNT).arg(2).arg(current).arg(before).arg(*cost).arg(millis(*lifetime));
            }
        }
    }

    /// Takes the answers to its commands, each of which may have been refused.
    pub(super) fn answer(self, values: &mut impl Iterator<Item = Option<Value>>) {
        match self {
            Self::Raise(hints) => values.by_ref().take(hints.len()).for_each(drop),
            Self::Read { keys, answer } => {
                let values: Vec<_> = values.by_ref().take(keys.len()).collect();
                // If all are refused nothing is known, and that is not the same as nothing there. One key that somebody else has
                // written in a way of his own leaves the others their answers.
                if keys.is_empty() || values.iter().any(Option::is_some) {
                    // The waiter may have gone.
                    let _ = answer.send(values.into_iter().map(|value| hint(&value?)).collect());
                }
            }
            Self::Count { answer, .. } => {
                if let Some(counts) = values.next().flatten().and_then(|value| counts(&value)) {
                    let _ = answer.send(counts);
                }
            }
        }
    }
}

fn hint_key(prefix: &str, key: &HintKey) -> String {
    match key {
        HintKey::Head(conversation) => format!("{prefix}:h:{{{}}}", hexadecimal(conversation.as_bytes())),
        HintKey::Presence(user) => format!("{prefix}:p:{{{}}}", hexadecimal(user.as_str().as_bytes())),
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).clamp(1, 1 << 50)
}

/// Whatever is not a hint is nothing: somebody else may have written there.
fn hint(value: &Value) -> Option<Hint> {
    let Value::BulkString(bytes) = value else { return None };
    let mut numbers = std::str::from_utf8(bytes).ok()?.split(' ');
    let version = numbers.next()?.parse().ok()?;
    let (one, two) = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
    numbers.next().is_none().then_some(Hint { version, numbers: [one, two] })
}

fn counts(value: &Value) -> Option<Counts> {
    let Value::Array(values) = value else { return None };
    let [Value::Int(current), Value::Int(previous)] = values[..] else { return None };
    Some(Counts { current: u64::try_from(current).ok()?, previous: u64::try_from(previous).ok()? })
}

#[cfg(test)]
mod tests {
    use im_proto::UserId;

    use super::*;

    #[test]
    fn what_is_no_answer_is_nothing() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        assert_eq!(hint(&text("00000000000000000007 -1 9")), Some(Hint { version: 7, numbers: [-1, 9] }));
        for bad in ["", "7", "7 1", "7 1 2 3", "x 1 2", "7  1 2", "-7 1 2"] {
            assert_eq!(hint(&text(bad)), None, "{bad:?}");
        }
        assert_eq!(hint(&Value::Nil), None);
        assert!(counts(&Value::Array(vec![Value::Int(-1), Value::Int(0)])).is_none());
        assert!(counts(&Value::Array(vec![Value::Int(1)])).is_none());
    }

    #[test]
    fn keys_of_one_script_share_the_tag_whatever_the_subject_holds() {
        let (answer, _waiter) = oneshot::channel();
        let subject = "user:}{".to_owned();
        let request = Request::Count { subject, cost: 1, window: 7, lifetime: Duration::from_secs(1), answer };
        let mut pipeline = Pipeline::new();
        request.put("im", &mut pipeline);
        let packed = String::from_utf8(pipeline.get_packed_pipeline()).expect("text");
        for key in ["im:l:{757365723a7d7b}:7", "im:l:{757365723a7d7b}:6"] {
            assert!(packed.contains(key), "{packed}");
        }
        let user = HintKey::Presence(UserId::parse("u").expect("an id"));
        assert_eq!(hint_key("im", &user), "im:p:{75}");
    }
}
