//! A certificate for this machine alone, signed by a CA made for it, so that clients on it speak TLS and QUIC from the first minute.
//!
//! The CA's private key is thrown away: whoever copies the directory can play this server, and cannot make other certificates.
//! For a server that others reach, put a certificate of theirs into `tls/` and its CA into `ca.pem`.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};

use super::{
    DataError,
    file::{self, Access, failed},
};

const NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

struct Made {
    ca: String,
    certificate: String,
    key: String,
}

/// Creates `tls/key.pem`, `tls/cert.pem` and at last `ca.pem`, whose presence says that the set is complete.
pub fn create_if_missing(root: &Path) -> Result<(), DataError> {
    let (ca, folder) = (root.join("ca.pem"), root.join("tls"));
    if ca.exists() {
        return Ok(());
    }
    let made = make().map_err(|error| failed("create", &ca)(std::io::Error::other(error)))?;
    file::write(&folder.join("key.pem"), made.key.as_bytes(), Access::Owner)?;
    file::write(&folder.join("cert.pem"), made.certificate.as_bytes(), Access::Everybody)?;
    file::write(&ca, made.ca.as_bytes(), Access::Everybody)
}

fn make() -> Result<Made, rcgen::Error> {
    let mut ca_params = params(&[], "imd development CA")?;
    ca_params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca_params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca_key = KeyPair::generate()?;
    let ca = ca_params.self_signed(&ca_key)?;

    let mut server_params = params(&NAMES, "imd")?;
    server_params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    server_params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    server_params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate()?;
    let certificate = server_params.signed_by(&key, &Issuer::new(ca_params, ca_key))?;
    Ok(Made { ca: ca.pem(), certificate: certificate.pem(), key: key.serialize_pem() })
}

/// Valid for as long as the two-digit years of certificates reach, so that a development server never stops for its age.
fn params(names: &[&str], common_name: &str) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_before = date_time_ymd(2000, 1, 1);
    params.not_after = date_time_ymd(2049, 12, 31);
    Ok(params)
}
