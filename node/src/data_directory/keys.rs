//! The names, secrets and keys of a cluster, created once.

use std::{fmt::Write as _, path::Path};

use im_proto::{
    ShardCount,
    key::{SECRET_BYTES, parse_secret},
    token::{SigningKey, VerifyKey},
};
use ring::{
    rand::{SecureRandom as _, SystemRandom},
    signature::Ed25519KeyPair,
};
use serde::{Deserialize, Serialize};

use super::{
    DataError,
    file::{self, Access, damaged, failed},
};

/// What `cluster.json` holds. All of it is fixed when the directory is created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// The audience of its tokens.
    pub cluster_id: String,
    /// The issuer of its tokens.
    pub issuer: String,
    pub shards: u32,
}

/// An entry of `keys/verify.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PublicKey {
    /// For people; derived from the key.
    key_id: String,
    /// The Ed25519 public key in hexadecimal.
    public: String,
}

impl PublicKey {
    fn parse(&self, path: &Path) -> Result<VerifyKey, DataError> {
        let public = parse_secret(&self.public).map_err(|error| damaged(path, error))?;
        VerifyKey::from_public(&public).map_err(|error| damaged(path, error))
    }
}

impl Cluster {
    /// Reads a `cluster.json`.
    pub fn read(path: &Path) -> Result<Self, DataError> {
        file::read_json_if_there(path)?.ok_or_else(|| DataError::Missing(path.to_owned()))
    }

    pub(super) fn read_or_create(root: &Path, shards: u32, used: bool) -> Result<Self, DataError> {
        let path = root.join("cluster.json");
        if let Some(cluster) = file::read_json_if_there::<Self>(&path)? {
            if ShardCount::new(cluster.shards).is_none() {
                return Err(damaged(&path, "the number of shards is not 1 to 65536"));
            }
            return Ok(cluster);
        }
        if used {
            return Err(DataError::Missing(path));
        }
        let id = random::<8>(&path)?;
        let cluster = Self { cluster_id: format!("im-{}", hexadecimal(&id)), issuer: "imd".to_owned(), shards };
        file::write_json(&path, &cluster, Access::Everybody)?;
        Ok(cluster)
    }
}

/// A secret of 32 bytes, created unless `required`.
pub(super) fn secret(path: &Path, required: bool) -> Result<[u8; SECRET_BYTES], DataError> {
    if let Some(text) = file::read_if_there(path)? {
        return parse_secret(&text).map_err(|error| damaged(path, error));
    }
    if required {
        return Err(DataError::Missing(path.to_owned()));
    }
    let secret = random::<SECRET_BYTES>(path)?;
    write_secret(path, secret)?;
    Ok(secret)
}

pub(super) fn write_secret(path: &Path, secret: [u8; SECRET_BYTES]) -> Result<(), DataError> {
    file::write(path, format!("{}\n", hexadecimal(&secret)).as_bytes(), Access::Owner)
}

/// Reads a secret of 32 bytes.
pub fn read_secret(path: &Path) -> Result<[u8; SECRET_BYTES], DataError> {
    secret(path, true)
}

/// Reads the keys whose tokens are accepted.
pub fn read_verify_keys(path: &Path) -> Result<Vec<VerifyKey>, DataError> {
    let listed: Vec<PublicKey> = file::read_json_if_there(path)?.ok_or_else(|| DataError::Missing(path.to_owned()))?;
    listed.iter().map(|key| key.parse(path)).collect()
}

/// The keys whose tokens are accepted: all of `keys/verify.json`, the public half of `keys/signing.pk8` among them if that key is
/// here. Creates both files in a new directory; without a signing key nobody can make tokens here, which is fine.
pub(super) fn verify_keys(root: &Path) -> Result<Vec<VerifyKey>, DataError> {
    let signing = root.join("keys").join("signing.pk8");
    let verify = root.join("keys").join("verify.json");
    let known: Option<Vec<PublicKey>> = file::read_json_if_there(&verify)?;
    if known.is_none() && !signing.exists() {
        let pair = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .map_err(|_| failed("create", &signing)(std::io::Error::other("no randomness")))?;
        file::write(&signing, pair.as_ref(), Access::Owner)?;
    }
    let mut keys = Vec::new();
    for key in known.unwrap_or_default() {
        keys.push(key.parse(&verify)?);
    }
    if signing.exists() {
        let own = read_signing_key(&signing)?.verify_key();
        if !keys.contains(&own) {
            keys.push(own);
            let listed: Vec<_> = keys
                .iter()
                .map(|key| PublicKey { key_id: key.key_id.clone(), public: hexadecimal(&key.public) })
                .collect();
            file::write_json(&verify, &listed, Access::Everybody)?;
        }
    }
    Ok(keys)
}

/// Reads a PKCS#8 Ed25519 key.
pub fn read_signing_key(path: &Path) -> Result<SigningKey, DataError> {
    let der = file::read_bytes_if_there(path)?.ok_or_else(|| DataError::Missing(path.to_owned()))?;
    SigningKey::from_pkcs8(&der).map_err(|error| damaged(path, error))
}

fn random<const BYTES: usize>(for_path: &Path) -> Result<[u8; BYTES], DataError> {
    let mut bytes = [0; BYTES];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| failed("create", for_path)(std::io::Error::other("no randomness")))?;
    Ok(bytes)
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
