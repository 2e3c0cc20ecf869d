//! What can be chosen about a CQL store, and what is checked before anything is sent.

use std::{fmt, time::Duration};

use crate::model::StoreError;

/// Compaction of all tables. Size-tiered exists on ScyllaDB and on Cassandra and does not look at write timestamps, which here are
/// epochs and seqs and no times: never use time-window compaction.
pub const COMPACTION: &str = "{'class':'SizeTieredCompactionStrategy','min_threshold':4,'max_threshold':32}";

/// How to reach a ScyllaDB or Cassandra cluster, and what to ask of it.
#[derive(Clone, Debug)]
pub struct ScyllaOptions {
    /// `host:port` of some nodes; the others are learned from them.
    pub nodes: Vec<String>,
    /// Lower-case letters, digits and underscores; all tables are in it.
    pub keyspace: String,
    /// The data centre that holds the copies and gets the requests. `None`: that of the first node that answers.
    pub datacenter: Option<String>,
    /// Copies, for `schema::apply` when it creates the keyspace. Three survive the loss of any one.
    pub replication_factor: u32,
    /// Appended to `CREATE KEYSPACE`, for what only one of the servers has, as `AND tablets = {'enabled': false}`.
    pub keyspace_suffix: String,
    /// The compaction of the tables that `schema::apply` creates, as a CQL map.
    pub compaction: String,
    pub credentials: Option<ScyllaCredentials>,
    /// From the call to its answer, waiting for a place included. Above the servers' own limits (2 s for writes, 5 s for reads by
    /// default), so that their answer comes first.
    pub request_timeout: Duration,
    pub connect_timeout: Duration,
    /// A request without an answer for so long is also sent to another node: what a frozen node would hold up goes on. About the
    /// 99.9th percentile of a healthy cluster; much lower doubles the load just when it is high.
    pub speculate_after: Option<Duration>,
    /// Batches of messages under way at a time. At 10 ms each these are 25,600 batches a second, of up to 128 messages.
    pub appends_in_flight: usize,
    /// Bytes of batches that wait for a place. Beyond it a submitter is told `Unconfirmed` at once and repeats later.
    pub appends_waiting_bytes: usize,
    /// Reads of messages and state rows, and writes of state rows, under way at a time, each kind for itself.
    pub requests_in_flight: usize,
    /// Requests of each kind that wait for a place. Beyond it a caller is told `Unconfirmed` at once and repeats later.
    pub requests_waiting: usize,
}

/// What a server with `PasswordAuthenticator` asks for.
#[derive(Clone)]
pub struct ScyllaCredentials {
    pub user: String,
    pub password: String,
}

impl fmt::Debug for ScyllaCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScyllaCredentials").field("user", &self.user).finish_non_exhaustive()
    }
}

impl Default for ScyllaOptions {
    fn default() -> Self {
        Self {
            nodes: vec!["127.0.0.1:9042".into()],
            keyspace: "im".into(),
            datacenter: None,
            replication_factor: 3,
            keyspace_suffix: String::new(),
            compaction: COMPACTION.into(),
            credentials: None,
            request_timeout: Duration::from_secs(6),
            connect_timeout: Duration::from_secs(3),
            speculate_after: Some(Duration::from_millis(250)),
            appends_in_flight: 256,
            appends_waiting_bytes: 256 << 20,
            requests_in_flight: 256,
            requests_waiting: 16 << 10,
        }
    }
}

impl ScyllaOptions {
    /// Refuses what would not be a name, or what would be no limit.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        let refuse = |what: &str| Err(StoreError::Open(what.to_owned()));
        let bytes = self.keyspace.as_bytes();
        let is_name = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'_';
        if !(1..=48).contains(&bytes.len()) || !bytes[0].is_ascii_lowercase() || !bytes.iter().all(is_name) {
            return refuse("a keyspace is a letter and up to 47 lower-case letters, digits and underscores");
        }
        if self.datacenter.as_ref().is_some_and(|name| name.is_empty() || name.contains(['\'', '\\'])) {
            return refuse("a data centre is a name without quotes");
        }
        if self.nodes.is_empty() {
            return refuse("no node is named");
        }
        if self.appends_in_flight == 0 || self.requests_in_flight == 0 || self.replication_factor == 0 {
            return refuse("requests in flight and copies are at least one");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_be_cql_are_refused() {
        let named = |keyspace: &str| ScyllaOptions { keyspace: keyspace.into(), ..ScyllaOptions::default() };
        for good in ["im", "im_2", "a"] {
            assert_eq!(named(good).check(), Ok(()), "{good}");
        }
        for bad in ["", "Im", "2im", "im.x", "im; DROP", "im\"", &"i".repeat(49)] {
            assert!(matches!(named(bad).check(), Err(StoreError::Open(_))), "{bad}");
        }
        let quoted = ScyllaOptions { datacenter: Some("dc'".into()), ..ScyllaOptions::default() };
        assert!(quoted.check().is_err());
    }
}
