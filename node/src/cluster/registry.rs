//! The way to etcd.

use im_proto::environment::Environment;
use im_registry::{ConnectError, EtcdOptions, EtcdRegistry};

use crate::{config::ClusterConfig, failure::Failure};

/// Connects as a process of that cluster. `generation` is that of a router.
pub async fn connect(
    config: &ClusterConfig,
    cluster_id: &str,
    generation: Option<u64>,
    environment: &Environment,
) -> Result<EtcdRegistry, Failure> {
    let options =
        EtcdOptions { hold: config.lease_ttl, ..EtcdOptions::new(config.etcd_urls(), cluster_id, generation) };
    EtcdRegistry::connect(options, environment.clone()).await.map_err(|error| match error {
        ConnectError::Options(reason) => Failure::Usage(format!("--etcd {}: {reason}", config.etcd)),
        unreachable => Failure::Usage(format!("--etcd {}: {unreachable}", config.etcd)),
    })
}
