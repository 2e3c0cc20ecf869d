//! The files that say who a process of a cluster is: named one by one, or at their usual places in a directory of `imd secrets`.

use std::path::{Path, PathBuf};

use im_proto::{
    ShardCount,
    key::{ClusterSecret, RouterSecret, SECRET_BYTES},
    token::VerifyKey,
};
use im_registry::Role;
use im_storage::ClusterRow;

use ring::rand::{self, SystemRandom};

use crate::{
    config::{ClusterConfig, Config},
    data_directory::{Cluster, read_secret, read_verify_keys},
    failure::Failure,
    links::tls::ServiceTls,
    listen::{self, ClientTls},
};

/// Where to look.
pub struct Files<'a> {
    config: &'a ClusterConfig,
    secrets: Option<&'a Path>,
    role: Role,
}

/// What all roles of a cluster know of it.
pub struct Identity {
    pub cluster: Cluster,
    pub shards: ShardCount,
    pub secret: ClusterSecret,
}

/// What routers know besides.
pub struct RouterKeys {
    pub secret: RouterSecret,
    pub verify: Vec<VerifyKey>,
}

impl Identity {
    /// As it stands in the store.
    pub fn row(&self) -> ClusterRow {
        ClusterRow::new(&self.cluster.cluster_id, self.shards, &self.secret)
    }
}

impl<'a> Files<'a> {
    /// `secrets` is used if the configuration names no such directory.
    pub fn new(config: &'a ClusterConfig, role: Role, secrets: Option<&'a Path>) -> Self {
        Self { config, secrets: config.secrets.as_deref().or(secrets), role }
    }

    pub fn identity(&self) -> Result<Identity, Failure> {
        let cluster = Cluster::read(&self.find("cluster", &self.config.cluster, "cluster.json")?);
        let cluster = cluster.map_err(Failure::usage)?;
        let shards = ShardCount::new(cluster.shards)
            .ok_or_else(|| Failure::usage(format!("{} shards: expected 1 to 65536", cluster.shards)))?;
        Ok(Identity { cluster, shards, secret: ClusterSecret::new(self.cluster_secret()?) })
    }

    /// The bytes of the cluster secret.
    pub fn cluster_secret(&self) -> Result<[u8; SECRET_BYTES], Failure> {
        let path = self.find("cluster-secret", &self.config.cluster_secret, "cluster.secret")?;
        read_secret(&path).map_err(Failure::usage)
    }

    pub fn router_keys(&self) -> Result<RouterKeys, Failure> {
        let secret = self.find("router-secret", &self.config.router_secret, "router.secret")?;
        let secret = RouterSecret::new(read_secret(&secret).map_err(Failure::usage)?);
        let verify = self.find("verify-keys", &self.config.verify_keys, "keys/verify.json")?;
        Ok(RouterKeys { secret, verify: read_verify_keys(&verify).map_err(Failure::usage)? })
    }

    /// By what this process proves its role; `None` if nothing is named and the directory has none.
    pub fn service_tls(&self) -> Result<Option<ServiceTls>, Failure> {
        let config = self.config;
        let usual = |name: &str| self.secrets.map(|secrets| secrets.join("services").join(name));
        let is_named =
            [&config.service_ca, &config.service_cert, &config.service_key].iter().any(|file| file.is_some());
        let is_there = usual("ca.pem").is_some_and(|ca| ca.exists());
        if !is_named && !is_there {
            return Ok(None);
        }
        let name = match self.role {
            Role::Router => "router",
            Role::Gateway => "gateway",
        };
        let ca = self.find("service-ca", &config.service_ca, "services/ca.pem")?;
        let chain = self.find("service-cert", &config.service_cert, &format!("services/{name}.pem"))?;
        let key = self.find("service-key", &config.service_key, &format!("services/{name}.key.pem"))?;
        ServiceTls::read(self.role, &ca, &chain, &key).map(Some).map_err(Failure::usage)
    }

    /// What clients of a gateway see; `None` if it speaks neither TLS nor QUIC.
    pub fn client_tls(&self, config: &Config) -> Result<Option<ClientTls>, Failure> {
        if config.tls.or(config.quic).is_none() {
            return Ok(None);
        }
        let chain = self.find("tls-cert", &self.config.tls_cert, "tls/cert.pem")?;
        let key = self.find("tls-key", &self.config.tls_key, "tls/key.pem")?;
        let certificate = listen::certificate(&chain, &key)?;
        let kept = self.secrets.map(|secrets| secrets.join("tls").join("reset.secret")).filter(|path| path.exists());
        let reset_key = match kept {
            Some(path) => read_secret(&path).map_err(Failure::usage)?,
            None => rand::generate(&SystemRandom::new()).map_err(|_| Failure::usage("no randomness"))?.expose(),
        };
        Ok(Some(ClientTls { certificate, reset_key }))
    }

    /// The CA of what clients see, if it is where `imd secrets` puts it.
    pub fn client_ca(&self) -> Option<PathBuf> {
        let ca = self.secrets?.join("ca.pem");
        ca.canonicalize().ok()
    }

    fn find(&self, option: &str, named: &Option<PathBuf>, usual: &str) -> Result<PathBuf, Failure> {
        let path = named.clone().or_else(|| Some(self.secrets?.join(usual))).ok_or_else(|| {
            Failure::Usage(format!(
                "--{option} FILE is missing; or name with --secrets DIR a directory that has {usual} (imd secrets --out DIR makes one)"
            ))
        })?;
        if path.exists() {
            return Ok(path);
        }
        Err(Failure::Usage(format!("--{option}: there is no file {}", path.display())))
    }
}
