//! The way to etcd.

use im_proto::{Epoch, environment::Environment};
use im_registry::{ConnectError, EtcdOptions, EtcdRegistry, EtcdTls, EtcdUser};

use super::credentials::{file, password};
use crate::{config::ClusterConfig, failure::Failure};

/// How etcd is reached.
fn options(config: &ClusterConfig, cluster_id: &str, claims: Claims) -> Result<EtcdOptions, Failure> {
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
    let options = EtcdOptions::new(config.etcd_urls(), cluster_id, claims.generation);
    Ok(EtcdOptions { claimed: claims.claimed, hold: config.lease_ttl, tls, user, ..options })
}

/// What a router knows from the message store; nothing of any other process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Claims {
    pub generation: Option<u64>,
    /// The greatest claim of that generation that the store knows of.
    pub claimed: Option<Epoch>,
}

/// Connects as a process of that cluster.
pub async fn connect(
    config: &ClusterConfig,
    cluster_id: &str,
    environment: &Environment,
) -> Result<EtcdRegistry, Failure> {
    connect_as(config, cluster_id, Claims::default(), environment).await
}

/// Connects as a router.
pub async fn connect_as(
    config: &ClusterConfig,
    cluster_id: &str,
    claims: Claims,
    environment: &Environment,
) -> Result<EtcdRegistry, Failure> {
    let options = options(config, cluster_id, claims)?;
    EtcdRegistry::connect(options, environment.clone()).await.map_err(|error| match error {
        ConnectError::Options(reason) => Failure::Usage(format!("--etcd {}: {reason}", config.etcd)),
        unreachable => Failure::Usage(format!("--etcd {}: {unreachable}", config.etcd)),
    })
}
