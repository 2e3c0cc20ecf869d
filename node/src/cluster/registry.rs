//! The way to etcd.

use im_proto::environment::Environment;
use im_registry::{ConnectError, EtcdOptions, EtcdRegistry, EtcdTls, EtcdUser};

use super::credentials::{file, password};
use crate::{config::ClusterConfig, failure::Failure};

/// How etcd is reached.
fn options(config: &ClusterConfig, cluster_id: &str, generation: Option<u64>) -> Result<EtcdOptions, Failure> {
    let tls = match &config.etcd_ca {
        None => None,
        Some(ca) => {
            let identity = match (&config.etcd_cert, &config.etcd_key) {
                (Some(chain), Some(key)) => Some((file("etcd-cert", chain)?, file("etcd-key", key)?)),
                _ => None,
            };
            Some(EtcdTls { ca_pem: file("etcd-ca", ca)?, identity, server_name: None })
        }
    };
    let user = match &config.etcd_password_file {
        None => None,
        Some(path) => {
            Some(EtcdUser { name: config.etcd_user.clone(), password: password("etcd-password-file", path)? })
        }
    };
    let options = EtcdOptions::new(config.etcd_urls(), cluster_id, generation);
    Ok(EtcdOptions { hold: config.lease_ttl, tls, user, ..options })
}

/// Connects as a process of that cluster. `generation` is that of a router.
pub async fn connect(
    config: &ClusterConfig,
    cluster_id: &str,
    generation: Option<u64>,
    environment: &Environment,
) -> Result<EtcdRegistry, Failure> {
    let options = options(config, cluster_id, generation)?;
    EtcdRegistry::connect(options, environment.clone()).await.map_err(|error| match error {
        ConnectError::Options(reason) => Failure::Usage(format!("--etcd {}: {reason}", config.etcd)),
        unreachable => Failure::Usage(format!("--etcd {}: {unreachable}", config.etcd)),
    })
}
