//! A certificate for this machine, signed by a CA made for it, so that clients on it speak TLS and QUIC from the first minute; and
//! certificates by which processes of a cluster know each other.
//!
//! The private key of each CA is thrown away: whoever copies the directory can play this server, and cannot make other certificates.
//! For a server that others reach, put a certificate of theirs into `tls/` and its CA into `ca.pem`.

use std::{io, path::Path};

use im_registry::Role;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

use super::{
    DataError,
    file::{self, Access, failed},
};
use crate::links::tls;

const LOCAL_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// What a certificate is for.
#[derive(Clone, Copy)]
enum Use {
    Server,
    Client,
    Both,
}

/// A CA with its private key, for as long as it issues.
type Authority = CertifiedIssuer<'static, KeyPair>;

/// Creates `tls/key.pem`, `tls/cert.pem` and at last `ca.pem`, whose presence says that the set is complete. The certificate is for
/// this machine and for `hosts`.
pub fn create_if_missing(root: &Path, hosts: &[String]) -> Result<(), DataError> {
    let (ca, folder) = (root.join("ca.pem"), root.join("tls"));
    if ca.exists() {
        return Ok(());
    }
    let authority = authority("imd development CA").map_err(not_created(&ca))?;
    write(&authority, &folder.join("cert.pem"), &folder.join("key.pem"), "imd", &names(&[], hosts), Use::Server)?;
    file::write(&ca, authority.as_ref().pem().as_bytes(), Access::Everybody)
}

/// Creates in `services/` what processes of a cluster prove their role with: `router.pem`, `gateway.pem`, `service.pem` (for others
/// that call the api), a `.key.pem` of each, and at last `ca.pem`.
pub fn create_services_if_missing(root: &Path, hosts: &[String]) -> Result<(), DataError> {
    let folder = root.join("services");
    let ca = folder.join("ca.pem");
    if ca.exists() {
        return Ok(());
    }
    let authority = authority("imd service CA").map_err(not_created(&ca))?;
    let (router, gateway) = (tls::name_of(Role::Router), tls::name_of(Role::Gateway));
    for (file, names, purpose) in [
        ("router", names(&[router], hosts), Use::Both),
        ("gateway", names(&[gateway], hosts), Use::Both),
        ("service", names(&["im-service"], &[]), Use::Client),
    ] {
        let (chain, key) = (folder.join(format!("{file}.pem")), folder.join(format!("{file}.key.pem")));
        write(&authority, &chain, &key, &format!("im {file}"), &names, purpose)?;
    }
    file::write(&ca, authority.as_ref().pem().as_bytes(), Access::Everybody)
}

fn names(own: &[&str], hosts: &[String]) -> Vec<String> {
    own.iter().chain(&LOCAL_NAMES).map(|name| (*name).to_owned()).chain(hosts.iter().cloned()).collect()
}

fn not_created(path: &Path) -> impl FnOnce(rcgen::Error) -> DataError {
    let path = path.to_owned();
    move |error| failed("create", &path)(io::Error::other(error))
}

fn write(
    authority: &Authority,
    chain: &Path,
    key: &Path,
    common_name: &str,
    names: &[String],
    purpose: Use,
) -> Result<(), DataError> {
    let (certificate, private) = issue(authority, common_name, names, purpose).map_err(not_created(chain))?;
    file::write(key, private.as_bytes(), Access::Owner)?;
    file::write(chain, certificate.as_bytes(), Access::Everybody)
}

fn authority(common_name: &str) -> Result<Authority, rcgen::Error> {
    let mut params = params(&[], common_name)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Authority::self_signed(params, KeyPair::generate()?)
}

/// Certificate and key in PEM.
fn issue(
    authority: &Authority,
    common_name: &str,
    names: &[String],
    purpose: Use,
) -> Result<(String, String), rcgen::Error> {
    let mut params = params(names, common_name)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = match purpose {
        Use::Server => vec![ExtendedKeyUsagePurpose::ServerAuth],
        Use::Client => vec![ExtendedKeyUsagePurpose::ClientAuth],
        Use::Both => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
    };
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate()?;
    Ok((params.signed_by(&key, authority)?.pem(), key.serialize_pem()))
}

/// Valid for as long as the two-digit years of certificates reach, so that a development server never stops for its age.
fn params(names: &[String], common_name: &str) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names.to_vec())?;
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_before = date_time_ymd(2000, 1, 1);
    params.not_after = date_time_ymd(2049, 12, 31);
    Ok(params)
}
