//! Tokens: EdDSA JWT only, with `kid`, issuer and the cluster id as audience. User, device and platform come from the token alone.
//!
//! How long a token may live is the server's setting. `iat` is the token's word, so it may not lie in the future: else a token
//! could count its lifetime from there.
//!
//! Not here: revocation. Whoever has the device row compares [`Verified::issued_at`] with it.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ed25519_dalek::{Signature, Verifier as _, VerifyingKey};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde::{Deserialize, Serialize};

use crate::{
    id::{DeviceId, IdError, Platform, UserId},
    limits,
    status::StatusCode,
    timestamp::Timestamp,
};

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// The user.
    pub sub: String,
    /// The device.
    pub device: String,
    /// The platform, for the device policy.
    pub platform: String,
    /// Who issued it.
    pub iss: String,
    /// The cluster id.
    pub aud: String,
    /// Seconds since 1970.
    pub iat: i64,
    /// Seconds since 1970.
    pub exp: i64,
}

/// Why a token is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("the token is malformed: {0}")]
    Malformed(String),
    #[error("the key cannot be used: {0}")]
    Key(String),
    #[error("no key with the id {0:?} verifies it")]
    UnknownKey(String),
    #[error("the signature, issuer or audience is wrong: {0}")]
    Refused(String),
    #[error("the token has expired")]
    Expired,
    #[error("the token lives longer than this server allows")]
    LifetimeTooLong,
    #[error("the token was issued in the future or expired before that; is a clock wrong?")]
    IssuedInTheFuture,
}

impl TokenError {
    /// The status for the client.
    pub fn status(&self) -> StatusCode {
        match self {
            TokenError::Expired => StatusCode::TokenExpired,
            _ => StatusCode::Unauthenticated,
        }
    }
}

/// The outcome of a verified token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    pub user: UserId,
    pub device: DeviceId,
    pub platform: Platform,
    pub issued_at: Timestamp,
    pub expires_at: Timestamp,
}

/// A private Ed25519 key that signs tokens. Only `imd token` and other issuers have it.
pub struct SigningKey {
    key_id: String,
    key: EncodingKey,
    public: Vec<u8>,
}

impl SigningKey {
    /// From the PKCS#8 DER of an Ed25519 key pair. The key id is the first 8 bytes of BLAKE3 of the public key in hexadecimal.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, TokenError> {
        use ring::signature::KeyPair as _;
        let pair = ring::signature::Ed25519KeyPair::from_pkcs8_maybe_unchecked(der)
            .map_err(|error| TokenError::Key(format!("it is no Ed25519 key pair as PKCS#8: {error}")))?;
        let public = pair.public_key().as_ref().to_vec();
        Ok(Self { key_id: key_id(&public), key: EncodingKey::from_ed_der(der), public })
    }

    /// The public half.
    pub fn verify_key(&self) -> VerifyKey {
        VerifyKey { key_id: self.key_id.clone(), public: self.public.clone() }
    }

    /// A signed token.
    pub fn sign(&self, claims: &Claims) -> Result<String, TokenError> {
        let mut header = Header::new(Algorithm::EdDSA);
        header.kid = Some(self.key_id.clone());
        jsonwebtoken::encode(&header, claims, &self.key).map_err(|error| TokenError::Malformed(error.to_string()))
    }
}

/// A public Ed25519 key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyKey {
    pub key_id: String,
    /// 32 bytes.
    pub public: Vec<u8>,
}

impl VerifyKey {
    /// From the 32 bytes of the public key.
    pub fn from_public(public: &[u8]) -> Result<Self, TokenError> {
        let refused = |why: &str| TokenError::Key(why.to_owned());
        let bytes = public.try_into().map_err(|_| refused("an Ed25519 public key is 32 bytes"))?;
        let point = VerifyingKey::from_bytes(bytes).map_err(|_| refused("it is no point of the curve of Ed25519"))?;
        if point.is_weak() {
            return Err(refused("it is of a small order: with it anybody could sign"));
        }
        Ok(Self { key_id: key_id(public), public: public.to_vec() })
    }
}

fn key_id(public: &[u8]) -> String {
    blake3::hash(public).to_hex()[..16].to_owned()
}

/// How far the clock of an issuer may be ahead of a server's.
pub const CLOCK_DIFFERENCE_MAX: Duration = Duration::from_secs(60);

/// A token that was read and not verified: nothing that it says is known to be true.
#[derive(Clone, Debug)]
pub struct Unverified {
    token: String,
    key_id: String,
    claims: Claims,
}

impl Unverified {
    /// Reads a token whose size and form are right. Once wherever it is passed on: it takes an eighth of what its signature takes.
    pub fn read(token: &str) -> Result<Self, TokenError> {
        if token.len() > limits::TOKEN_BYTES_MAX {
            return Err(TokenError::Malformed(format!("it has more than {} bytes", limits::TOKEN_BYTES_MAX)));
        }
        let read = jsonwebtoken::dangerous::insecure_decode::<Claims>(token)
            .map_err(|error| TokenError::Malformed(error.to_string()))?;
        if read.header.alg != Algorithm::EdDSA {
            return Err(TokenError::Malformed("the algorithm is not EdDSA".to_owned()));
        }
        if read.header.crit.is_some() {
            return Err(TokenError::Malformed("it demands extensions (crit) that are not supported".to_owned()));
        }
        let key_id = read.header.kid.unwrap_or_default();
        if key_id.len() > limits::ID_BYTES_MAX {
            return Err(TokenError::Malformed("its key id is too long".to_owned()));
        }
        Ok(Self { token: token.to_owned(), key_id, claims: read.claims })
    }

    /// What can be told without keys: ids and times are such as they may be. The signature is checked by the user's owner.
    pub fn inspect(&self, now: Timestamp) -> Result<Verified, TokenError> {
        check_times(&self.claims, now)?;
        verified(&self.claims)
    }
}

/// Verifies tokens of one cluster.
pub struct Verifier {
    /// Each key as a point of the curve: to find it takes an eighth of a verification.
    keys: Vec<(String, VerifyingKey)>,
    issuer: String,
    audience: String,
    lifetime_max: Duration,
}

impl Verifier {
    /// Accepts tokens of `issuer` for the cluster `audience`, signed by one of `keys`, that live at most `lifetime_max`.
    pub fn new(keys: &[VerifyKey], issuer: &str, audience: &str, lifetime_max: Duration) -> Self {
        // What is no key verifies nothing.
        let keys = keys.iter().filter_map(|key| {
            let public = key.public.as_slice().try_into().ok()?;
            Some((key.key_id.clone(), VerifyingKey::from_bytes(public).ok()?))
        });
        let keys = keys.collect();
        Self { keys, issuer: issuer.to_owned(), audience: audience.to_owned(), lifetime_max }
    }

    /// Everything: form, key, signature, issuer, audience, lifetime, expiry.
    pub fn verify(&self, token: &str, now: Timestamp) -> Result<Verified, TokenError> {
        self.verify_read(&Unverified::read(token)?, now)
    }

    /// Everything but the form, which was read.
    pub fn verify_read(&self, read: &Unverified, now: Timestamp) -> Result<Verified, TokenError> {
        let Unverified { token, key_id, claims } = read;
        let key = self.keys.iter().find(|(id, _)| id == key_id).map(|(_, key)| key);
        let key = key.ok_or_else(|| TokenError::UnknownKey(key_id.clone()))?;
        // The signed part is everything before the last dot, and what was read is that part of this very text.
        let (signed, signature) = token.rsplit_once('.').unwrap_or_default();
        let bytes = URL_SAFE_NO_PAD.decode(signature).map_err(|error| TokenError::Refused(error.to_string()))?;
        let signature = Signature::from_slice(&bytes).map_err(|error| TokenError::Refused(error.to_string()))?;
        key.verify(signed.as_bytes(), &signature).map_err(|error| TokenError::Refused(error.to_string()))?;
        if claims.iss != self.issuer {
            return Err(TokenError::Refused("another issuer".to_owned()));
        }
        if claims.aud != self.audience {
            return Err(TokenError::Refused("for another cluster".to_owned()));
        }
        let verified = read.inspect(now)?;
        let lifetime_seconds = u64::try_from(claims.exp.saturating_sub(claims.iat)).unwrap_or(0);
        if lifetime_seconds > self.lifetime_max.as_secs() {
            return Err(TokenError::LifetimeTooLong);
        }
        Ok(verified)
    }
}

/// What a gateway can tell without keys: form and expiry.
pub fn inspect(token: &str, now: Timestamp) -> Result<Verified, TokenError> {
    Unverified::read(token)?.inspect(now)
}

fn check_times(claims: &Claims, now: Timestamp) -> Result<(), TokenError> {
    if expiry(claims) <= now {
        return Err(TokenError::Expired);
    }
    let issued_at = Timestamp::from_millis(claims.iat.saturating_mul(1000));
    if issued_at > now.saturating_add(CLOCK_DIFFERENCE_MAX) || claims.exp <= claims.iat {
        return Err(TokenError::IssuedInTheFuture);
    }
    Ok(())
}

fn expiry(claims: &Claims) -> Timestamp {
    Timestamp::from_millis(claims.exp.saturating_mul(1000))
}

fn verified(claims: &Claims) -> Result<Verified, TokenError> {
    let bad = |error: IdError| TokenError::Malformed(error.to_string());
    Ok(Verified {
        user: UserId::parse(&claims.sub).map_err(bad)?,
        device: DeviceId::parse(&claims.device).map_err(bad)?,
        platform: Platform::parse(&claims.platform).map_err(bad)?,
        issued_at: Timestamp::from_millis(claims.iat.saturating_mul(1000)),
        expires_at: expiry(claims),
    })
}

#[cfg(test)]
mod tests;
