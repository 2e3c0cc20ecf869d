//! `imd token`: makes a token with the signing key of a data directory, or of a file.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use im_proto::{DeviceId, Platform, UserId, environment::Environment, token::Claims};

use crate::{
    args::TokenArguments,
    data_directory::{Cluster, read_signing_key},
};

/// A signed token.
pub fn make(arguments: &TokenArguments, environment: &Environment) -> anyhow::Result<String> {
    let (key, cluster) = files(arguments)?;
    let cluster = Cluster::read(&cluster)?;
    let user = UserId::parse(&arguments.user).with_context(|| format!("--user {:?}", arguments.user))?;
    let device = DeviceId::parse(&arguments.device).with_context(|| format!("--device {:?}", arguments.device))?;
    let platform =
        Platform::parse(&arguments.platform).with_context(|| format!("--platform {:?}", arguments.platform))?;
    let issued = environment.clock.now().as_millis() / 1000;
    let lifetime = i64::try_from(arguments.expires.as_secs()).context("--expires is too far away")?;
    let claims = Claims {
        sub: user.to_string(),
        device: device.to_string(),
        platform: platform.to_string(),
        iss: cluster.issuer,
        aud: cluster.cluster_id,
        iat: issued,
        exp: issued.saturating_add(lifetime),
    };
    Ok(read_signing_key(&key)?.sign(&claims)?)
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
