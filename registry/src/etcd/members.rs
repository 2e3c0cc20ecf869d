//! How the members of etcd are, for whoever looks after the cluster.

use super::{EtcdRegistry, transport::origin};

/// One member of etcd, asked for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdMember {
    /// As it stands in the options.
    pub endpoint: String,
    /// What it said, or why it said nothing.
    pub state: Result<EtcdMemberState, String>,
}

/// What a member says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdMemberState {
    pub version: String,
    pub is_leader: bool,
    /// Without a leader it answers nothing else.
    pub has_leader: bool,
    pub etcd_cluster: u64,
    pub revision: u64,
    pub database_bytes: u64,
}

impl EtcdRegistry {
    /// Asks every member, each with the deadline of a call.
    pub async fn members(&self) -> Vec<EtcdMember> {
        let transport = &self.shared.transport;
        let mut members = Vec::new();
        for (index, endpoint) in transport.urls().enumerate() {
            let asked = transport.ask(index, |mut client| async move { client.status().await }).await;
            let state = asked.map_err(|error| error.to_string()).and_then(|answer| {
                let origin = origin(answer.header()).map_err(|error| error.to_string())?;
                Ok(EtcdMemberState {
                    version: answer.version().to_owned(),
                    is_leader: answer.header().is_some_and(|header| header.member_id() == answer.leader()),
                    has_leader: answer.leader() != 0,
                    etcd_cluster: origin.etcd_cluster,
                    revision: origin.revision,
                    database_bytes: u64::try_from(answer.db_size()).unwrap_or(0),
                })
            });
            members.push(EtcdMember { endpoint: endpoint.to_owned(), state });
        }
        members
    }
}
