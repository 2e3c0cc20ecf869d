//! The cluster record: written when a cluster begins and after etcd was lost or restored.

use etcd_client::{Compare, CompareOp, DeleteOptions, Txn, TxnOp};

use super::{
    EtcdRegistry,
    keys::ClusterRecord,
    shared::Shared,
    transport::{CallError, origin},
};
use crate::RegistryError;

impl EtcdRegistry {
    /// Whether a process with this one's generation may claim shards now. To be asked before a router starts: it turns a cluster
    /// that needs a person into one clear message.
    pub async fn check_claims(&self) -> Result<(), RegistryError> {
        self.shared.reconcile().await?;
        self.shared.may_claim().map(drop).map_err(RegistryError::Refused)
    }

    /// The cluster record as it stands in the etcd that answers now, be it trusted or not.
    pub async fn cluster_record(&self) -> Result<Option<ClusterRecord>, RegistryError> {
        Ok(self.shared.record_now().await?.record)
    }

    /// Writes the cluster record of `generation`, and with it drops all claims and predecessor lists of lower generations. From then
    /// on only processes that were started with this very generation can claim.
    ///
    /// The caller has raised the generation to this value in all fence partitions of the message store, on a quorum, before: that
    /// is what keeps everybody who was started earlier from committing anything, whom no predecessor list names any more.
    ///
    /// Can be repeated. Refused if etcd is at a greater generation, or at this one in what was another etcd: then the generation has
    /// to be raised further.
    pub async fn recover(&self, generation: u64) -> Result<ClusterRecord, RegistryError> {
        let record = self.shared.recover(generation).await?;
        // The own view follows by itself; a caller that asks at once should not be told of the state before.
        if let Err(error) = self.shared.reconcile().await {
            tracing::debug!(%error, "the registry was recovered, but could not be read again");
        }
        Ok(record)
    }
}

/// The record, and which etcd said so.
struct RecordNow {
    record: Option<ClusterRecord>,
    mod_revision: i64,
    etcd_cluster: u64,
}

impl Shared {
    /// Does not ask whether this etcd is the one that it was.
    async fn record_now(&self) -> Result<RecordNow, CallError> {
        let key = self.keys.cluster();
        let answer = self.transport.call(|mut client| {
            let key = key.clone();
            async move { client.get(key, None).await }
        });
        let answer = answer.await?;
        let etcd_cluster = origin(answer.header())?.etcd_cluster;
        let Some(found) = answer.kvs().first() else {
            return Ok(RecordNow { record: None, mod_revision: 0, etcd_cluster });
        };
        let record = ClusterRecord::decode(found.value())
            .map_err(|error| CallError::Rejected(format!("the cluster record cannot be read: {error}")))?;
        Ok(RecordNow { record: Some(record), mod_revision: found.mod_revision(), etcd_cluster })
    }

    async fn recover(&self, generation: u64) -> Result<ClusterRecord, RegistryError> {
        let RecordNow { record, mod_revision, etcd_cluster } = self.record_now().await?;
        let wanted = ClusterRecord { generation, etcd_cluster };
        match record {
            Some(found) if found == wanted => return Ok(wanted),
            Some(found) if found.generation >= generation => {
                return Err(RegistryError::Refused(format!(
                    "etcd is at generation {} of the etcd {:016x}: the generation has to be raised above it, not to {generation}",
                    found.generation, found.etcd_cluster
                )));
            }
            _ => {}
        }
        if generation == 0 {
            return Err(RegistryError::Refused("generation 0 means that no router ever ran: begin with 1".to_owned()));
        }
        let key = self.keys.cluster();
        let all = || Some(DeleteOptions::new().with_prefix());
        let txn = Txn::new()
            .when([Compare::mod_revision(key.clone(), CompareOp::Equal, mod_revision)])
            .and_then([
                TxnOp::delete(self.keys.claims(), all()),
                TxnOp::delete(self.keys.predecessors(), all()),
                TxnOp::put(key.clone(), wanted.encode(), None),
            ])
            .or_else([TxnOp::get(key, None)]);
        let call = self.transport.call(|mut client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        });
        let answer = call.await?;
        let answered_by = origin(answer.header())?.etcd_cluster;
        if answered_by != etcd_cluster {
            return Err(RegistryError::Refused(format!(
                "the endpoints belong to different etcd clusters, {etcd_cluster:016x} and {answered_by:016x}"
            )));
        }
        if answer.succeeded() {
            tracing::warn!(generation, etcd_cluster = %format!("{etcd_cluster:016x}"), "the registry begins a new generation");
            return Ok(wanted);
        }
        // Either an earlier attempt of this call was answered to nobody, or somebody else recovers at the same time.
        match self.record_now().await?.record {
            Some(found) if found == wanted => Ok(wanted),
            _ => Err(RegistryError::Unavailable("the cluster record changed meanwhile".to_owned())),
        }
    }
}
