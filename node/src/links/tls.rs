//! Who another process is: certificates of one CA, with the role as the name.
//!
//! A certificate speaks for a role and not for a machine, because instances come and go at any address. So a gateway's certificate
//! opens no link between routers, and nobody but a router is taken for one.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use im_registry::Role;
use rustls::{
    client::verify_server_name,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    server::ParsedCertificate,
};
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

/// A handshake takes two round trips and some milliseconds of work.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// The DNS name that the certificate of a role has among its subject alternative names.
pub const fn name_of(role: Role) -> &'static str {
    match role {
        Role::Gateway => "im-gateway",
        Role::Router => "im-router",
    }
}

/// Why the files of a service's identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {}: {source}", .path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} holds no {what} in PEM", .path.display())]
    Empty { path: PathBuf, what: &'static str },
    #[error("{} is not for this role: it lacks the DNS name {name}", .path.display())]
    Role { path: PathBuf, name: &'static str },
}

/// The identity of this process towards others, and the CA of theirs.
#[derive(Clone)]
pub struct ServiceTls {
    ca: Certificate,
    identity: Identity,
}

impl ServiceTls {
    /// Reads PEM files: the CA, this role's certificate chain, its key.
    pub fn read(role: Role, ca: &Path, chain: &Path, key: &Path) -> Result<Self, TlsError> {
        let read = |path: &Path| fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source });
        let empty = |path: &Path, what| TlsError::Empty { path: path.to_owned(), what };
        let (ca_pem, chain_pem, key_pem) = (read(ca)?, read(chain)?, read(key)?);
        CertificateDer::from_pem_slice(&ca_pem).map_err(|_| empty(ca, "certificate"))?;
        PrivateKeyDer::from_pem_slice(&key_pem).map_err(|_| empty(key, "private key"))?;
        let leaf = CertificateDer::from_pem_slice(&chain_pem).map_err(|_| empty(chain, "certificate"))?;
        if !is_of_role(&leaf, role) {
            return Err(TlsError::Role { path: chain.to_owned(), name: name_of(role) });
        }
        Ok(Self { ca: Certificate::from_pem(ca_pem), identity: Identity::from_pem(chain_pem, key_pem) })
    }

    /// For dialling a router.
    pub fn towards_router(&self) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .ca_certificate(self.ca.clone())
            .identity(self.identity.clone())
            .domain_name(name_of(Role::Router))
            .timeout(HANDSHAKE_TIMEOUT)
    }

    /// For a listener: whoever has no certificate of the CA is refused.
    pub fn listening(&self) -> ServerTlsConfig {
        ServerTlsConfig::new()
            .identity(self.identity.clone())
            .client_ca_root(self.ca.clone())
            .timeout(HANDSHAKE_TIMEOUT)
    }
}

/// Whether a certificate, already verified, names a role.
pub fn is_of_role(certificate: &CertificateDer<'_>, role: Role) -> bool {
    names(certificate, name_of(role))
}

/// Whether the first certificate of a chain in PEM is for a host; `*.` for one below it.
pub fn names_host(chain: &[u8], host: &str) -> bool {
    let host = host.strip_prefix("*.").map_or_else(|| host.to_owned(), |parent| format!("any.{parent}"));
    CertificateDer::from_pem_slice(chain).is_ok_and(|leaf| names(&leaf, &host))
}

/// Whether this can be the name of a host: a DNS name, also with `*.` before it, or an address.
pub fn is_host(host: &str) -> bool {
    !host.ends_with('.') && ServerName::try_from(host.strip_prefix("*.").unwrap_or(host)).is_ok()
}

fn names(certificate: &CertificateDer<'_>, name: &str) -> bool {
    let (Ok(parsed), Ok(name)) = (ParsedCertificate::try_from(certificate), ServerName::try_from(name)) else {
        return false;
    };
    verify_server_name(&parsed, &name).is_ok()
}
