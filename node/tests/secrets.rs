//! `imd secrets` and `imd token`: what is there is never written over, and what cannot be made is said.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use crate::server::{ANY, Server, code, imd, stderr, stdout};

const CLIENT_SET: [&str; 3] = ["ca.pem", "tls/cert.pem", "tls/key.pem"];

fn secrets(directory: &Path, more: &[&str]) -> (i32, String) {
    let output = imd(&[&["secrets", "--out", directory.to_str().unwrap()], more].concat());
    (code(&output), stderr(&output))
}

/// Every file below a directory but the lock, with what it holds.
fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if !path.ends_with("lock") {
            found.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    found
}

/// A directory with a certificate as an operator has it: made elsewhere, and without a `ca.pem`.
fn with_own_certificate(folder: &Path) -> PathBuf {
    let (made, own) = (folder.join("made"), folder.join("own"));
    assert_eq!(secrets(&made, &[]).0, 0);
    fs::create_dir_all(own.join("tls")).unwrap();
    for file in ["tls/cert.pem", "tls/key.pem"] {
        fs::copy(made.join(file), own.join(file)).unwrap();
    }
    own
}

#[test]
fn an_own_certificate_and_its_key_are_never_written_over() {
    let folder = tempfile::tempdir().unwrap();
    let own = with_own_certificate(folder.path());
    let before = files(&own.join("tls"));
    assert_eq!(secrets(&own, &[]), (0, String::new()));
    assert!(!own.join("ca.pem").exists(), "nobody knows who signed it");
    let server = Server::start(&own, &ANY);
    assert_eq!(server.ready()["ca"], serde_json::Value::Null);
    drop(server);
    let after = files(&own.join("tls"));
    assert!(before.iter().all(|(path, bytes)| after.get(path) == Some(bytes)), "they stay byte for byte");
}

#[test]
fn a_set_with_a_part_missing_is_refused_with_what_is_missing_and_what_to_remove() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    assert_eq!(secrets(&whole, &[]).0, 0);
    let services = ["ca", "router", "router.key", "gateway", "gateway.key", "service", "service.key"];
    let services: Vec<String> = services.iter().map(|name| format!("services/{name}.pem")).collect();
    let mut cases: Vec<(Vec<&str>, &str)> = services.iter().map(|file| (vec![&file[..]], "services")).collect();
    cases.push((vec!["tls/cert.pem"], "tls/key.pem"));
    cases.push((vec!["tls/key.pem"], "tls/cert.pem"));
    cases.push((vec!["tls/cert.pem", "tls/key.pem"], "ca.pem"));
    cases.push((vec!["ca.pem", "tls/cert.pem"], "tls/key.pem"));
    cases.push((vec!["ca.pem", "tls/key.pem"], "tls/cert.pem"));
    for (number, (missing, removed)) in cases.iter().enumerate() {
        let broken = folder.path().join(number.to_string());
        for file in files(&whole).keys() {
            let target = broken.join(file.strip_prefix(&whole).unwrap());
            fs::create_dir_all(target.parent().unwrap()).unwrap();
            fs::copy(file, target).unwrap();
        }
        missing.iter().for_each(|file| fs::remove_file(broken.join(file)).unwrap());
        let before = files(&broken);
        let (code, said) = secrets(&broken, &["--host", "chat.example.org"]);
        assert!(code == 2 && said.lines().count() == 1, "{missing:?}: {code} {said}");
        let (lacks, remedy) = said.split_once("remove").unwrap_or_else(|| panic!("{missing:?}: {said}"));
        // Without a ca.pem it is an operator's set, and may be complete without one.
        let named = missing.iter().filter(|file| **file != "ca.pem" || removed == &"services");
        named.for_each(|file| assert!(lacks.contains(file), "{file}: {said}"));
        assert!(remedy.contains(removed), "{missing:?}: {said}");
        assert_eq!(files(&broken), before, "{missing:?}: nothing was changed");
    }
}

#[test]
fn what_was_removed_as_a_set_is_made_anew_for_other_hosts() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("cluster");
    assert_eq!(secrets(&directory, &["--host", "chat.example.org", "--host", "10.0.0.7"]), (0, String::new()));
    let before = files(&directory);
    assert_eq!(secrets(&directory, &["--host", "chat.example.org", "--host", "10.0.0.7"]), (0, String::new()));
    let (code, said) = secrets(&directory, &["--host", "10.0.0.7", "--host", "new.example.org"]);
    assert_eq!(code, 0, "{said}");
    for part in ["--host new.example.org", "tls/cert.pem", "services/router.pem"] {
        assert!(said.contains(part) && !said.contains("10.0.0.7"), "{part}: {said}");
    }
    assert_eq!(files(&directory), before, "what is there stays");
    CLIENT_SET.iter().for_each(|file| fs::remove_file(directory.join(file)).unwrap());
    fs::remove_dir_all(directory.join("services")).unwrap();
    assert_eq!(secrets(&directory, &["--host", "new.example.org"]), (0, String::new()));
    assert_eq!(secrets(&directory, &["--host", "new.example.org"]), (0, String::new()), "it names the host now");
    let after = files(&directory);
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    let kept = |file: &str| before[&directory.join(file)] == after[&directory.join(file)];
    assert!(kept("cluster.secret") && kept("keys/signing.pk8") && !kept("tls/cert.pem") && !kept("services/ca.pem"));
}

#[test]
fn a_host_that_is_none_is_refused_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("cluster");
    for host in ["foo bar", "", "https://example.org", "example.org:7101", "[::1]", "a..b", "exämple.org"] {
        let (code, said) = secrets(&directory, &["--host", host]);
        assert!(code == 2 && said.contains("--host"), "{host:?}: {code} {said}");
    }
    assert!(!directory.exists());
    for host in ["*.example.org", "2001:db8::7", "db-1"] {
        assert_eq!(secrets(&folder.path().join(host.replace('*', "any")), &["--host", host]).0, 0, "{host}");
    }
}

/// A signing key may be kept elsewhere, so its absence is no failure; but it is never silent.
#[test]
fn a_directory_that_no_tokens_can_be_made_in_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("cluster");
    assert_eq!(secrets(&directory, &[]).0, 0);
    fs::remove_file(directory.join("keys/signing.pk8")).unwrap();
    let (code, said) = secrets(&directory, &[]);
    assert!(code == 0 && said.contains("keys/signing.pk8") && said.contains("keys/verify.json"), "{code} {said}");
}

/// Seconds between `iat` and `exp`.
fn lifetime(token: &str) -> i64 {
    let claims = token.trim().split('.').nth(1).unwrap();
    let claims: serde_json::Value = serde_json::from_slice(&base64url(claims)).unwrap();
    claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap()
}

fn base64url(text: &str) -> Vec<u8> {
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let (mut bytes, mut bits, mut kept) = (Vec::new(), 0_u32, 0);
    for digit in text.bytes() {
        bits = (bits << 6) | u32::try_from(alphabet.iter().position(|known| *known == digit).unwrap()).unwrap();
        kept += 6;
        if kept >= 8 {
            kept -= 8;
            bytes.push(u8::try_from((bits >> kept) & 0xff).unwrap());
        }
    }
    bytes
}

#[test]
fn a_token_lasts_as_long_as_the_server_that_it_is_for_admits_by_default() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("cluster");
    assert_eq!(secrets(&directory, &[]).0, 0);
    let (data, key) = (directory.to_str().unwrap(), directory.join("keys/signing.pk8"));
    let key = key.to_str().unwrap();
    let hour = 3_600;
    for (options, wanted, warns) in [
        (&["--data", data][..], 30 * 24 * hour, false),
        (&["--key", key], hour, false),
        (&["--key", key, "--expires", "10m"], hour / 6, false),
        (&["--key", key, "--expires", "2h"], 2 * hour, true),
        (&["--data", data, "--expires", "2h"], 2 * hour, false),
    ] {
        let output = imd(&[&["token", "--user", "alice"], options].concat());
        assert_eq!(lifetime(&stdout(&output)), wanted, "{options:?}");
        assert_eq!(stderr(&output).contains("token.lifetime_max"), warns, "{options:?}: {}", stderr(&output));
    }
}

#[test]
fn a_token_without_its_key_names_the_key() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("cluster");
    assert_eq!(secrets(&directory, &[]).0, 0);
    let nowhere = folder.path().join("nope");
    let output = imd(&["token", "--user", "alice", "--key", nowhere.to_str().unwrap()]);
    let said = stderr(&output);
    assert!(code(&output) == 2 && said.contains("--key") && !said.contains("cluster.json"), "{said}");
}
