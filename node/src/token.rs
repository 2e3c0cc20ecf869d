//! `imd token`: makes a token with the signing key of a data directory, or of a file.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use im_proto::{DeviceId, Platform, UserId, environment::Environment, token::Claims};

use crate::{
    args::TokenArguments,
    config::{Config, Process},
    data_directory::{Cluster, read_signing_key},
};

/// Who a token is for.
#[derive(Clone, Debug)]
pub struct Holder {
    pub user: UserId,
    pub device: DeviceId,
    pub platform: Platform,
}

/// The token that the command line asks for.
pub fn make(arguments: &TokenArguments, environment: &Environment) -> anyhow::Result<String> {
    let (key, cluster) = files(arguments)?;
    let holder = Holder {
        user: UserId::parse(&arguments.user).with_context(|| format!("--user {:?}", arguments.user))?,
        device: DeviceId::parse(&arguments.device).with_context(|| format!("--device {:?}", arguments.device))?,
        platform: Platform::parse(&arguments.platform)
            .with_context(|| format!("--platform {:?}", arguments.platform))?,
    };
    sign(&key, &cluster, &holder, lifetime(arguments), environment)
}

/// As long as the server admits by default that the token is most likely for: a data directory is that of an `imd up`, a key of its
/// own belongs to a cluster. What a cluster refuses by default is said, for nobody else tells the reason.
fn lifetime(arguments: &TokenArguments) -> Duration {
    let admitted = |process| Config::of(process).token.lifetime_max;
    if arguments.key.is_none() {
        return arguments.expires.unwrap_or(admitted(Process::Up));
    }
    let routers = admitted(Process::Router);
    let lifetime = arguments.expires.unwrap_or(routers);
    if lifetime > routers {
        let note = "imd: routers refuse this token unless their token.lifetime_max is as long; by default it is 1h";
        // Nobody may be left to read it.
        let _ = writeln!(std::io::stderr(), "{note}");
    }
    lifetime
}

/// A signed token that lasts from now on.
pub fn sign(
    key: &Path,
    cluster: &Path,
    holder: &Holder,
    lifetime: Duration,
    environment: &Environment,
) -> anyhow::Result<String> {
    let cluster = Cluster::read(cluster)?;
    let issued = environment.clock.now().as_millis() / 1000;
    let lifetime = i64::try_from(lifetime.as_secs()).context("the lifetime is too long")?;
    let claims = Claims {
        sub: holder.user.to_string(),
        device: holder.device.to_string(),
        platform: holder.platform.to_string(),
        iss: cluster.issuer,
        aud: cluster.cluster_id,
        iat: issued,
        exp: issued.saturating_add(lifetime),
    };
    Ok(read_signing_key(key)?.sign(&claims)?)
}

/// The signing key, and the `cluster.json` that names issuer and audience: beside the key, or in the folder above.
fn files(arguments: &TokenArguments) -> anyhow::Result<(PathBuf, PathBuf)> {
    let Some(key) = &arguments.key else {
        let data = &arguments.data;
        anyhow::ensure!(
            data.join("cluster.json").exists(),
            "there is no data directory {}; start `imd up` once, or name another with --data",
            data.display()
        );
        return Ok((data.join("keys").join("signing.pk8"), data.join("cluster.json")));
    };
    anyhow::ensure!(key.exists(), "--key {}: there is no such file", key.display());
    if let Some(cluster) = &arguments.cluster {
        return Ok((key.clone(), cluster.clone()));
    }
    let folder = key.parent().unwrap_or(Path::new("."));
    let found =
        [folder.join("cluster.json"), folder.join("..").join("cluster.json")].into_iter().find(|path| path.exists());
    let cluster = found.with_context(|| {
        format!("there is no cluster.json beside {} or in the folder above; name it with --cluster", key.display())
    })?;
    Ok((key.clone(), cluster))
}
