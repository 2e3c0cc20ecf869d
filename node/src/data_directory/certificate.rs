//! A certificate for this machine, signed by a CA made for it, so that clients on it speak TLS and QUIC from the first minute; and
//! certificates by which processes of a cluster know each other.
//!
//! The private key of each CA is thrown away: whoever copies the directory can play this server, and cannot make other certificates.
//! For a server that others reach, put a certificate of theirs into `tls/`, and its CA into `ca.pem` if clients do not know it.
//!
//! Invariant: a file that is there is never written over. A set of which a part is missing is refused, not completed: nothing here
//! can sign for a CA that was made before.

use std::{fs, io, path::Path};

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

/// Certificates that go together, with their CA: all of them are made at once, and nothing is ever written over.
struct Set {
    name: &'static str,
    /// In the order in which they are written, from the root of the directory.
    files: &'static [&'static str],
    /// Those without which the set cannot be used.
    needed: &'static [&'static str],
    /// Of those, the ones that name hosts.
    for_hosts: &'static [&'static str],
    /// Holds a set that is being written, until all of it is in its place.
    journal: &'static str,
}

/// What clients see. A certificate that an operator put there needs no `ca.pem`: that of a public CA has none.
const CLIENTS: Set = Set {
    name: "the certificate that clients see",
    files: &["tls/key.pem", "tls/cert.pem", "ca.pem"],
    needed: &["tls/cert.pem", "tls/key.pem"],
    for_hosts: &["tls/cert.pem"],
    journal: "tls/unfinished",
};

/// What processes of a cluster prove their role with; `service` is for others that call the api.
const SERVICES: Set = Set {
    name: "the certificates of the services",
    files: &SERVICE_FILES,
    needed: &SERVICE_FILES,
    for_hosts: &["services/router.pem", "services/gateway.pem"],
    journal: "services/unfinished",
};

const SERVICE_FILES: [&str; 7] = [
    "services/router.key.pem",
    "services/router.pem",
    "services/gateway.key.pem",
    "services/gateway.pem",
    "services/service.key.pem",
    "services/service.pem",
    "services/ca.pem",
];

/// A file of a set with what belongs into it.
type Written = (String, String);

/// Creates `tls/key.pem`, `tls/cert.pem` and `ca.pem` if none of them is there. The certificate is for this machine and for `hosts`.
pub fn create_if_missing(root: &Path, hosts: &[String]) -> Result<(), DataError> {
    CLIENTS.create_if_missing(root, || {
        let authority = authority("imd development CA")?;
        let (certificate, key) = issue(&authority, "imd", &names(&[], hosts), Use::Server)?;
        Ok(vec![key, certificate, authority.as_ref().pem()])
    })
}

/// Creates everything in `services/` if nothing of it is there.
pub fn create_services_if_missing(root: &Path, hosts: &[String]) -> Result<(), DataError> {
    SERVICES.create_if_missing(root, || {
        let authority = authority("imd service CA")?;
        let (router, gateway) = (tls::name_of(Role::Router), tls::name_of(Role::Gateway));
        let mut texts = Vec::new();
        for (file, names, purpose) in [
            ("router", names(&[router], hosts), Use::Both),
            ("gateway", names(&[gateway], hosts), Use::Both),
            ("service", names(&["im-service"], &[]), Use::Client),
        ] {
            let (certificate, key) = issue(&authority, &format!("im {file}"), &names, purpose)?;
            texts.extend([key, certificate]);
        }
        texts.push(authority.as_ref().pem());
        Ok(texts)
    })
}

/// Refuses a directory in which a part of a set is missing, before anything is made.
pub fn refuse_parts(root: &Path) -> Result<(), DataError> {
    [CLIENTS, SERVICES].iter().try_for_each(|set| set.is_there(root).map(drop))
}

/// The certificates in a directory that do not name a host, although it was asked for.
pub fn lacking(root: &Path, host: &str) -> Vec<&'static str> {
    let lacks = |file: &&str| !fs::read(root.join(file)).is_ok_and(|pem| tls::names_host(&pem, host));
    CLIENTS.for_hosts.iter().chain(SERVICES.for_hosts).copied().filter(lacks).collect()
}

impl Set {
    fn create_if_missing(
        &self,
        root: &Path,
        make: impl FnOnce() -> Result<Vec<String>, rcgen::Error>,
    ) -> Result<(), DataError> {
        self.finish(root)?;
        if self.is_there(root)? {
            return Ok(());
        }
        let texts = make().map_err(|error| failed("create", &root.join(self.files[0]))(io::Error::other(error)))?;
        let written: Vec<Written> = self.files.iter().map(|file| (*file).to_owned()).zip(texts).collect();
        let text = serde_json::to_vec(&written).map_err(|error| failed("create", root)(error.into()))?;
        file::write(&root.join(self.journal), &text, Access::Owner)?;
        self.finish(root)
    }

    /// Puts a set into its place whose writing was cut off. What somebody else put there meanwhile stays.
    fn finish(&self, root: &Path) -> Result<(), DataError> {
        let journal = root.join(self.journal);
        let Some(written) = file::read_json_if_there::<Vec<Written>>(&journal)? else { return Ok(()) };
        let mut missing = Vec::new();
        for (file, text) in written.iter().filter(|(file, _)| self.files.contains(&&file[..])) {
            match file::read_bytes_if_there(&root.join(file))? {
                None => missing.push((file, text)),
                Some(there) if there == text.as_bytes() => {}
                // A part of another set, to which nothing of this one belongs.
                Some(_) => return file::remove(&journal),
            }
        }
        for (file, text) in missing {
            file::write(&root.join(file), text.as_bytes(), access(file))?;
        }
        file::remove(&journal)
    }

    /// Whether the set can be used; an error if a part of it is there that cannot.
    fn is_there(&self, root: &Path) -> Result<bool, DataError> {
        // A link that leads nowhere is a file that somebody put there.
        let there = |file: &&&str| root.join(file).symlink_metadata().is_ok();
        let missing: Vec<_> = self.needed.iter().filter(|file| !root.join(file).exists()).collect();
        let (found, is_unfinished) = (self.files.iter().filter(there), root.join(self.journal).exists());
        if missing.is_empty() || is_unfinished {
            return Ok(missing.is_empty());
        }
        let found: Vec<_> = found.collect();
        if found.is_empty() {
            return Ok(false);
        }
        Err(DataError::Part {
            root: root.to_owned(),
            name: self.name,
            missing: listed(&missing),
            found: listed(&found),
        })
    }
}

fn listed(files: &[&&str]) -> String {
    files.iter().map(|file| **file).collect::<Vec<_>>().join(", ")
}

fn access(file: &str) -> Access {
    if file.ends_with("key.pem") { Access::Owner } else { Access::Everybody }
}

fn names(own: &[&str], hosts: &[String]) -> Vec<String> {
    own.iter().chain(&LOCAL_NAMES).map(|name| (*name).to_owned()).chain(hosts.iter().cloned()).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory as it is when the writing of a set ends after so many of its files, with what all of them hold.
    fn cut_off(files_written: usize) -> (tempfile::TempDir, Vec<Written>) {
        let root = tempfile::tempdir().unwrap();
        create_if_missing(root.path(), &[]).unwrap();
        let read = |file: &&str| ((*file).to_owned(), fs::read_to_string(root.path().join(file)).unwrap());
        let written: Vec<Written> = CLIENTS.files.iter().map(read).collect();
        for file in &CLIENTS.files[files_written..] {
            fs::remove_file(root.path().join(file)).unwrap();
        }
        fs::write(root.path().join(CLIENTS.journal), serde_json::to_vec(&written).unwrap()).unwrap();
        (root, written)
    }

    #[test]
    fn a_set_whose_writing_was_cut_off_is_finished_by_the_next_start() {
        for files_written in 0..=CLIENTS.files.len() {
            let (root, written) = cut_off(files_written);
            refuse_parts(root.path()).unwrap();
            create_if_missing(root.path(), &[]).unwrap();
            for (file, text) in &written {
                assert_eq!(&fs::read_to_string(root.path().join(file)).unwrap(), text, "{file} after {files_written}");
            }
            assert!(!root.path().join(CLIENTS.journal).exists(), "after {files_written}");
        }
    }

    #[test]
    fn what_an_operator_puts_into_a_set_that_was_cut_off_stays() {
        let (root, _) = cut_off(0);
        for file in CLIENTS.needed {
            fs::write(root.path().join(file), "own").unwrap();
        }
        create_if_missing(root.path(), &[]).unwrap();
        for file in CLIENTS.needed {
            assert_eq!(fs::read_to_string(root.path().join(file)).unwrap(), "own", "{file}");
        }
        assert!(!root.path().join("ca.pem").exists() && !root.path().join(CLIENTS.journal).exists());
    }
}
