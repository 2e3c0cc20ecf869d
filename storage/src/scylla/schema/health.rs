//! What an operator should know about the servers: too few copies, answers before the disk has them.

use std::{collections::BTreeMap, fmt};

use scylla::{
    client::session::Session,
    policies::load_balancing::{NodeIdentifier, SingleTargetLoadBalancingPolicy},
    statement::Statement,
};

use super::{select, session};
use crate::model::StoreError;

/// Something that weakens what an acknowledgement means.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// Fewer copies than three: the loss of one machine stops the cluster or loses messages.
    FewCopies { datacenter: String, copies: u32 },
    /// Fewer nodes than copies: not every copy has a place.
    FewNodes { copies: u32, nodes: u32 },
    /// The node answers before a write is on its disk.
    CommitLogNotSynced { node: String, mode: String },
    /// The node did not say whether it answers before a write is on its disk.
    CommitLogUnknown { node: String, reason: String },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FewCopies { datacenter, copies } => write!(
                f,
                "the keyspace has {copies} of each row in `{datacenter}`; with fewer than 3 the loss of one machine stops the \
                 cluster or loses messages"
            ),
            Self::FewNodes { copies, nodes } => {
                write!(f, "the keyspace wants {copies} copies of each row, there are {nodes} nodes")
            }
            Self::CommitLogNotSynced { node, mode } => write!(
                f,
                "node {node} has commitlog_sync: {mode}; it answers before a write is on its disk, and a power cut of several nodes \
                 loses acknowledged messages; set `batch` or `group`"
            ),
            Self::CommitLogUnknown { node, reason } => {
                write!(f, "node {node} does not say whether its commit log is synced before it answers: {reason}")
            }
        }
    }
}

/// The data centre of the node that answers.
pub(super) async fn local_datacenter(session: &Session) -> Result<String, StoreError> {
    let rows = select(session, "SELECT data_center FROM system.local WHERE key = 'local'", ()).await?;
    let (datacenter,) = rows.first_row::<(String,)>().map_err(session::cannot)?;
    Ok(datacenter)
}

/// Everything there is to warn of.
pub(super) async fn warnings(
    session: &Session,
    replication: Option<&BTreeMap<String, String>>,
) -> Result<Vec<Warning>, StoreError> {
    let cluster = session.get_cluster_state();
    let nodes = cluster.get_nodes_info();
    let mut warnings = replication.map(|map| copies(map, nodes.len())).unwrap_or_default();
    for node in nodes {
        let name = node.address.to_string();
        let policy = SingleTargetLoadBalancingPolicy::new(NodeIdentifier::Node(node.clone()), None);
        warnings.extend(commit_log(name, commit_log_sync(session, policy).await));
    }
    Ok(warnings)
}

/// From what a node says its `commitlog_sync` is, or why it did not say.
fn commit_log(node: String, said: Result<String, String>) -> Option<Warning> {
    match said {
        Ok(mode) if matches!(mode.as_str(), "batch" | "group") => None,
        Ok(mode) => Some(Warning::CommitLogNotSynced { node, mode }),
        Err(reason) => Some(Warning::CommitLogUnknown { node, reason }),
    }
}

/// From the options of a keyspace: `class`, and a number of copies for each data centre or for all.
fn copies(replication: &BTreeMap<String, String>, nodes: usize) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let mut all = 0;
    for (datacenter, copies) in replication.iter().filter(|(name, _)| *name != "class") {
        let copies = copies.parse().unwrap_or(0);
        all += copies;
        if copies < 3 {
            warnings.push(Warning::FewCopies { datacenter: datacenter.clone(), copies });
        }
    }
    let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
    if nodes < all {
        warnings.push(Warning::FewNodes { copies: all, nodes });
    }
    warnings
}

/// What one node says of itself: Cassandra in `system_views.settings`, ScyllaDB in `system.config`.
async fn commit_log_sync(
    session: &Session,
    policy: std::sync::Arc<dyn scylla::policies::load_balancing::LoadBalancingPolicy>,
) -> Result<String, String> {
    let mut reason = String::new();
    for table in ["system_views.settings", "system.config"] {
        let mut statement = Statement::new(format!("SELECT value FROM {table} WHERE name = 'commitlog_sync'"));
        statement.set_is_idempotent(true);
        statement.set_load_balancing_policy(Some(policy.clone()));
        statement.set_consistency(scylla::statement::Consistency::One);
        match session.query_unpaged(statement, ()).await {
            Ok(result) => {
                let rows = result.into_rows_result().map_err(|error| error.to_string())?;
                let row = rows.maybe_first_row::<(String,)>().map_err(|error| error.to_string())?;
                match row {
                    // ScyllaDB writes texts of its configuration with quotes.
                    Some((mode,)) => return Ok(mode.trim_matches('"').to_owned()),
                    None => reason = format!("{table} has no commitlog_sync"),
                }
            }
            Err(error) => reason = error.to_string(),
        }
    }
    Err(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warned(replication: &[(&str, &str)], nodes: usize) -> usize {
        let map = replication.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        copies(&map, nodes).len()
    }

    #[test]
    fn few_copies_are_warned_of() {
        let class = ("class", "org.apache.cassandra.locator.NetworkTopologyStrategy");
        assert_eq!(warned(&[class, ("datacenter1", "3")], 3), 0);
        assert_eq!(warned(&[class, ("datacenter1", "3"), ("datacenter2", "2")], 5), 1);
        assert_eq!(warned(&[class, ("datacenter1", "1")], 1), 1);
        assert_eq!(warned(&[class, ("datacenter1", "3")], 1), 1);
        assert_eq!(warned(&[("class", "SimpleStrategy"), ("replication_factor", "2")], 1), 2);
    }

    #[test]
    fn a_node_that_answers_before_its_disk_is_warned_of_and_so_is_one_that_does_not_say() {
        let said = |mode: Result<&str, &str>| {
            commit_log("10.0.0.7:9042".to_owned(), mode.map(str::to_owned).map_err(str::to_owned))
        };
        for mode in ["batch", "group"] {
            assert_eq!(said(Ok(mode)), None, "{mode}");
        }
        // Whatever a later version calls it, only the two are known to be safe.
        for mode in ["periodic", "", "BATCH", "batched"] {
            let warning = said(Ok(mode)).unwrap().to_string();
            assert!(warning.starts_with(&format!("node 10.0.0.7:9042 has commitlog_sync: {mode};")), "{warning}");
            assert!(warning.contains("loses acknowledged messages"), "{warning}");
        }
        let warning = said(Err("no such table")).unwrap().to_string();
        assert!(warning.contains("10.0.0.7:9042 does not say") && warning.ends_with("no such table"), "{warning}");
    }
}
