//! What `--as` takes from the data directory of a local server: addresses, CA and the key that signs tokens.
//!
//! `ready.json` is read again for each attempt to connect: a restarted server may have other ports.

mod device;

use std::{
    fs,
    future::Future,
    path::{Path, PathBuf},
    pin::Pin,
};

use im_proto::{
    environment::Environment,
    token::{Claims, SigningKey},
};
use serde::Deserialize;

use crate::config::{Endpoint, EndpointSource, TokenSource, Transport};

use super::{args::UserAndDevice, failure::Failure};
use device::DevicePlace;

/// Seconds a token lives: within what any server allows by default, and renewed in time.
const LIFETIME_SECONDS: i64 = 3600;
/// Not exclusive: one user may have many terminals.
const PLATFORM: &str = "terminal";

/// Addresses of the server that runs on a data directory.
pub(super) struct DataDirectory {
    root: PathBuf,
    transport: Transport,
}

/// The part of `ready.json` that is of use here.
#[derive(Deserialize)]
struct Ready {
    tcp: Option<String>,
    tls: Option<String>,
    quic: Option<String>,
}

#[derive(Deserialize)]
struct Cluster {
    cluster_id: String,
    issuer: String,
}

impl DataDirectory {
    pub(super) fn open(root: &Path, transport: Transport) -> Result<Self, Failure> {
        if root.is_dir() {
            return Ok(Self { root: root.to_owned(), transport });
        }
        let root = root.display();
        Err(Failure::Usage(format!("there is no data directory {root}; start `imd up`, or name another with --data")))
    }

    /// The certificate of the development CA.
    pub(super) fn ca(&self) -> PathBuf {
        self.root.join("ca.pem")
    }
}

impl EndpointSource for DataDirectory {
    fn endpoints(&self) -> Result<Vec<Endpoint>, String> {
        let path = self.root.join("ready.json");
        let text = fs::read(&path).map_err(|_| {
            let root = self.root.display();
            format!("no server is running on {root} (it has no ready.json); start one with `imd up --data {root}`")
        })?;
        let ready: Ready =
            serde_json::from_slice(&text).map_err(|error| format!("{} is damaged: {error}", path.display()))?;
        let address = match self.transport {
            Transport::Tcp => ready.tcp,
            Transport::Tls => ready.tls,
            Transport::Quic => ready.quic,
        };
        let address = address.ok_or_else(|| format!("the server offers no {}", self.transport))?;
        Ok(vec![Endpoint::new(self.transport, address).map_err(|error| error.to_string())?])
    }
}

/// Signs a fresh token for each session.
pub(super) struct DataToken {
    key: SigningKey,
    cluster: Cluster,
    user: String,
    device: String,
    /// The device is this process's alone for as long as this lives.
    _place: Option<DevicePlace>,
    environment: Environment,
}

impl DataToken {
    /// Without a device it takes the first that no other process of this machine has now: two terminals of one user do not end each
    /// other's sessions, and a hundred commands, one after the other, are one device.
    pub(super) fn new(root: &Path, who: &UserAndDevice, environment: Environment) -> Result<Self, Failure> {
        let usage = |path: &Path, error: &dyn std::fmt::Display| {
            let path = path.display();
            Failure::Usage(format!("cannot use {path}: {error}; is --data the data directory of an `imd up`?"))
        };
        let path = root.join("keys").join("signing.pk8");
        let der = fs::read(&path).map_err(|error| usage(&path, &error))?;
        let key = SigningKey::from_pkcs8(&der).map_err(|error| usage(&path, &error))?;
        let path = root.join("cluster.json");
        let text = fs::read(&path).map_err(|error| usage(&path, &error))?;
        let cluster = serde_json::from_slice(&text).map_err(|error| usage(&path, &error))?;
        let (device, place) = match &who.device {
            Some(device) => (device.to_string(), None),
            None => match DevicePlace::take(root, &who.user) {
                Some(place) => (place.device(), Some(place)),
                None => (device::made_up(&environment), None),
            },
        };
        Ok(Self { key, cluster, user: who.user.to_string(), device, _place: place, environment })
    }

    fn sign(&self) -> Result<String, String> {
        let issued = self.environment.clock.now().as_millis() / 1000;
        let claims = Claims {
            sub: self.user.clone(),
            device: self.device.clone(),
            platform: PLATFORM.to_owned(),
            iss: self.cluster.issuer.clone(),
            aud: self.cluster.cluster_id.clone(),
            iat: issued,
            exp: issued + LIFETIME_SECONDS,
        };
        self.key.sign(&claims).map_err(|error| error.to_string())
    }
}

impl TokenSource for DataToken {
    fn token(&self) -> Pin<Box<dyn Future<Output = Result<String, String>> + Send + '_>> {
        Box::pin(std::future::ready(self.sign()))
    }

    fn is_renewable(&self) -> bool {
        true
    }
}
