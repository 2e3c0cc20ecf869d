//! `imd cluster status` and `imd cluster recover`.

use im_proto::InstanceId;
use im_registry::{AnyRegistry, Registry as _, Role};
use im_storage::MessageLog as _;

use super::{
    files::{Files, Identity},
    registry, run_tool,
    status::{self, Details},
    store::Place,
};
use crate::{config::Config, failure::Failure, print};

/// A name that no router has: for reading the generation alone.
const NOBODY: &str = "imd-cluster-recover";

fn prepare(config: &Config) -> Result<Identity, Failure> {
    if config.cluster.etcd_urls().is_empty() {
        return Err(Failure::usage("--etcd URL is missing: there the processes of the cluster are registered"));
    }
    Files::new(&config.cluster, Role::Router, None).identity()
}

/// One view of the whole cluster.
pub fn status(config: &Config, json: bool, details: Details) -> Result<(), Failure> {
    let identity = prepare(config)?;
    let text = run_tool(async |environment| {
        let registry = registry::connect(&config.cluster, &identity.cluster.cluster_id, environment).await?;
        let record = registry.cluster_record().await.map_err(Failure::operation)?;
        let view = AnyRegistry::from(registry).view().borrow().clone();
        let status = status::gather(&identity, &view, record.map(|record| record.generation), details).await;
        if json { status.to_json() } else { Ok(status.to_text()) }
    })?;
    print(&text)
}

/// Raises the generation in the store and then in etcd. From the first on nobody who was started before commits anything.
pub fn recover(config: &Config) -> Result<(), Failure> {
    let identity = prepare(config)?;
    if config.cluster.cql_nodes().is_empty() {
        return Err(Failure::usage(
            "--cql HOST:PORT is missing; a router on the embedded store recovers by itself when it is started again",
        ));
    }
    let generation = run_tool(async |environment| {
        let store = Place::Cql.open(&config.cluster, &identity.row(), environment).await?.store;
        let registry = registry::connect(&config.cluster, &identity.cluster.cluster_id, environment).await?;
        let record = registry.cluster_record().await.map_err(Failure::operation)?;
        let nobody = InstanceId::parse(NOBODY).map_err(Failure::operation)?;
        let stored = store.read_fence(&nobody).await.map_err(Failure::operation)?.generation;
        let generation = record.map_or(0, |record| record.generation).max(stored) + 1;
        store.raise_generation(generation).await.map_err(Failure::operation)?;
        registry.recover(generation).await.map_err(Failure::operation)?;
        Ok(generation)
    })?;
    print(&format!(
        "generation {generation} has begun. Routers that run start again by themselves; start those that do not run.\n"
    ))
}
