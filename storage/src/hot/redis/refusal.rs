//! Errors that Redis answers with, as far as it matters here which.

use metrics::Counter;
use redis::RedisError;

/// Why a command was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// By a replica, for instance a primary that was demoted.
    ReadOnly,
    /// By a node of a Redis Cluster that has other keys.
    Moved,
    /// By a server that still reads its data.
    Loading,
    /// By a replica without its primary, or a cluster without enough nodes.
    Down,
    NoMemory,
    NoPermission,
    /// Somebody else has written there.
    WrongType,
    Other,
}

impl Refusal {
    const ALL: [Self; 8] = [
        Self::ReadOnly,
        Self::Moved,
        Self::Loading,
        Self::Down,
        Self::NoMemory,
        Self::NoPermission,
        Self::WrongType,
        Self::Other,
    ];

    /// What an error is.
    pub(super) fn of(error: &RedisError) -> Self {
        // Redis before 7 puts the error of a command of a script behind words of its own.
        let of_script = || error.detail()?.split_whitespace().find_map(|word| Self::of_code(word.strip_prefix('-')?));
        error.code().and_then(Self::of_code).or_else(of_script).unwrap_or(Self::Other)
    }

    fn of_code(code: &str) -> Option<Self> {
        Some(match code {
            "READONLY" => Self::ReadOnly,
            "MOVED" | "ASK" => Self::Moved,
            "LOADING" => Self::Loading,
            "MASTERDOWN" | "CLUSTERDOWN" => Self::Down,
            "OOM" => Self::NoMemory,
            "NOPERM" | "NOAUTH" => Self::NoPermission,
            "WRONGTYPE" => Self::WrongType,
            _ => return None,
        })
    }

    /// As a label of a metric.
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::ReadOnly => "read_only",
            Self::Moved => "moved",
            Self::Loading => "loading",
            Self::Down => "down",
            Self::NoMemory => "no_memory",
            Self::NoPermission => "no_permission",
            Self::WrongType => "wrong_type",
            Self::Other => "other",
        }
    }

    /// Whether this is not the server to talk to, or not yet: the address may lead to another one by now.
    pub(super) const fn is_of_the_wrong_server(self) -> bool {
        matches!(self, Self::ReadOnly | Self::Moved | Self::Loading | Self::Down)
    }
}

/// A counter for each kind.
pub(super) struct Refusals([Counter; Refusal::ALL.len()]);

impl Refusals {
    pub(super) fn new() -> Self {
        Self(Refusal::ALL.map(|refusal| metrics::counter!("im_storage_redis_errors_total", "kind" => refusal.label())))
    }

    pub(super) fn count(&self, refusal: Refusal) {
        self.0[refusal as usize].increment(1);
    }
}

/// Kinds that something was said about.
#[derive(Default)]
pub(super) struct Said([bool; Refusal::ALL.len()]);

impl Said {
    /// Whether this is the first of its kind.
    pub(super) fn is_first(&mut self, refusal: Refusal) -> bool {
        !std::mem::replace(&mut self.0[refusal as usize], true)
    }
}

#[cfg(test)]
mod tests {
    use redis::{FromRedisValue as _, RedisResult, Value, parse_redis_value};

    use super::*;

    fn refusal(line: &str) -> Refusal {
        let value = parse_redis_value(format!("-{line}\r\n").as_bytes()).expect("an answer");
        let result = RedisResult::<Value>::from_redis_value(value).expect("a result");
        Refusal::of(&result.expect_err("an error"))
    }

    #[test]
    fn errors_are_told_apart_by_their_codes_also_from_within_scripts_of_older_servers() {
        let script = "ERR Error running script (call to f_1): @user_script:1: @user_script: 1: ";
        for (code, expected) in [
            ("READONLY You can't write against a read only replica.", Refusal::ReadOnly),
            ("MOVED 3999 127.0.0.1:6381", Refusal::Moved),
            ("ASK 3999 127.0.0.1:6381", Refusal::Moved),
            ("LOADING Redis is loading the dataset in memory", Refusal::Loading),
            ("MASTERDOWN Link with MASTER is down", Refusal::Down),
            ("CLUSTERDOWN Hash slot not served", Refusal::Down),
            ("OOM command not allowed when used memory > 'maxmemory'.", Refusal::NoMemory),
            ("NOPERM User u has no permissions to run the 'get' command", Refusal::NoPermission),
            ("NOAUTH Authentication required.", Refusal::NoPermission),
            ("WRONGTYPE Operation against a key", Refusal::WrongType),
            ("ERR unknown command", Refusal::Other),
            ("NEWERR whatever", Refusal::Other),
        ] {
            assert_eq!(refusal(code), expected, "{code}");
            assert_eq!(refusal(&format!("{script}-{code}")), expected, "{code} in a script");
        }
    }

    #[test]
    fn each_kind_has_a_place_of_its_own() {
        let mut said = Said::default();
        for (at, refusal) in Refusal::ALL.into_iter().enumerate() {
            assert_eq!(refusal as usize, at);
            assert!(said.is_first(refusal) && !said.is_first(refusal));
        }
    }
}
