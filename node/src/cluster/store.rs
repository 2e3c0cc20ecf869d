//! The store of a router: CQL, shared by all routers of the cluster, or the embedded one, with one router.
//!
//! A router works only on a store whose cluster row names its cluster. `imd schema apply` writes that row into a CQL store, the first
//! start into an embedded one.

use std::path::PathBuf;

use im_proto::{InstanceId, environment::Environment};
use im_storage::{
    ClusterError, ClusterRow, Embedded, EmbeddedOptions, Hot, MessageLog as _, RedisHot, RedisOptions, Scylla,
    ScyllaCredentials, ScyllaOptions, Store, StoreError,
};

use super::{credentials::password, files::Identity};
use crate::{config::ClusterConfig, failure::Failure};

/// Which store a router uses.
pub enum Place {
    Cql,
    /// In this directory, which no other process has.
    Embedded(PathBuf, EmbeddedOptions),
}

/// An open store.
pub struct OpenStore {
    pub store: Store,
    embedded: Option<Embedded>,
}

/// A generation of epochs.
#[derive(Clone, Copy, Debug)]
pub struct Generation {
    pub number: u64,
    /// Nobody was ever started with it: etcd has to be told.
    pub begins: bool,
}

/// How the CQL store of a configuration is reached.
pub fn scylla_options(config: &ClusterConfig) -> Result<ScyllaOptions, Failure> {
    let credentials = match &config.cql_password_file {
        None => None,
        Some(path) => {
            let password = password("cql-password-file", path)?;
            Some(ScyllaCredentials { user: config.cql_user.clone(), password })
        }
    };
    let (nodes, keyspace) = (config.cql_nodes(), config.keyspace.clone());
    Ok(ScyllaOptions { nodes, keyspace, credentials, ..ScyllaOptions::default() })
}

/// How Redis is reached, if it is. Clusters that share one have keys of their own.
pub fn redis_options(config: &ClusterConfig, identity: &Identity) -> Result<Option<RedisOptions>, Failure> {
    if config.redis.is_empty() {
        return Ok(None);
    }
    let read = |path| password("redis-password-file", path);
    let password = config.redis_password_file.as_deref().map(read).transpose()?;
    let prefix = format!("im:{}", identity.cluster.cluster_id);
    Ok(Some(RedisOptions { url: config.redis.clone(), password, prefix, ..RedisOptions::default() }))
}

/// Needs no Redis that runs: without one nothing is known, and it is tried again for ever.
pub fn start_redis(config: &ClusterConfig, options: RedisOptions, environment: &Environment) -> Result<Hot, Failure> {
    // The URL may hold a password.
    let shown = config.redis.rsplit_once('@').map_or(config.redis.as_str(), |(_, host)| host);
    let redis = RedisHot::start(options, environment);
    Ok(redis.map_err(|error| Failure::Usage(format!("--redis {shown}: {error}")))?.into())
}

impl Place {
    /// Opens the store. A CQL store of another cluster is refused.
    pub async fn open(
        &self,
        config: &ClusterConfig,
        row: &ClusterRow,
        environment: &Environment,
    ) -> Result<OpenStore, Failure> {
        match self {
            Self::Cql => {
                let scylla = Scylla::connect(scylla_options(config)?, environment.clone()).await;
                let store =
                    Store::from(scylla.map_err(|error| Failure::Usage(format!("--cql {}: {error}", config.cql)))?);
                row.check(&store).await.map_err(|error| refused(config, &error))?;
                Ok(OpenStore { store, embedded: None })
            }
            Self::Embedded(folder, options) => {
                let embedded = Embedded::open(folder, options.clone()).map_err(Failure::usage)?;
                let store = Store::from(embedded.clone());
                if let Err(error) = row.found(&store).await {
                    embedded.close();
                    return Err(refused(config, &error));
                }
                Ok(OpenStore { store, embedded: Some(embedded) })
            }
        }
    }
}

impl OpenStore {
    /// Why the store ends the process; never for a CQL store, which others keep.
    pub async fn stopped(&self) -> String {
        let Some(embedded) = &self.embedded else { return std::future::pending().await };
        let mut stopped = embedded.stopped();
        match stopped.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => std::future::pending().await,
        }
    }

    /// The generation that a router starts with.
    ///
    /// The first router of a cluster begins the first one. The only router of an embedded store begins a new one with each start,
    /// above `registered`, that of etcd: the lock on the directory says that no other lives, and whatever was written before has
    /// smaller epochs then.
    pub async fn generation(&self, instance: &InstanceId, registered: u64) -> Result<Generation, StoreError> {
        let stored = self.store.read_fence(instance).await?.generation;
        if !self.is_embedded() && stored > 0 {
            return Ok(Generation { number: stored, begins: false });
        }
        let number = if self.is_embedded() { stored.max(registered) + 1 } else { 1 };
        self.store.raise_generation(number).await?;
        Ok(Generation { number, begins: true })
    }

    /// The store admits one router.
    pub fn is_embedded(&self) -> bool {
        self.embedded.is_some()
    }

    /// Has everything on disk.
    pub fn close(self) {
        if let Some(embedded) = self.embedded {
            embedded.close();
        }
    }
}

/// Why a store cannot be used, and what to do.
pub fn refused(config: &ClusterConfig, error: &ClusterError) -> Failure {
    let option = if config.cql.is_empty() { "--data".to_owned() } else { format!("--cql {}", config.cql) };
    match error {
        ClusterError::Missing => {
            Failure::Usage(format!("{option}: {error}; run `imd schema apply` with the same options once"))
        }
        ClusterError::Store(error) => Failure::operation(error),
        _ => Failure::Usage(format!("{option}: {error}")),
    }
}
