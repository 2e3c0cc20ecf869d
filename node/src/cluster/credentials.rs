//! Certificates and passwords for the services of a cluster, from files.

use std::path::Path;

use crate::failure::Failure;

/// The bytes of a file that an option names.
pub fn file(option: &str, path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| Failure::Usage(format!("--{option} {}: {error}", path.display())))
}

/// A password: the whole file but the end of its line.
pub fn password(option: &str, path: &Path) -> Result<String, Failure> {
    let refused = |why: &str| Failure::Usage(format!("--{option} {}: {why}", path.display()));
    let text = String::from_utf8(file(option, path)?).map_err(|_| refused("it is no text"))?;
    let password = text.strip_suffix('\n').map_or(text.as_str(), |line| line.strip_suffix('\r').unwrap_or(line));
    if password.is_empty() || password.contains('\n') {
        return Err(refused("it must hold one line with the password"));
    }
    Ok(password.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_one_line_and_whoever_gets_it_wrong_is_told_which_option() {
        let folder = tempfile::tempdir().unwrap();
        let at = |content: &[u8]| {
            let path = folder.path().join("password");
            std::fs::write(&path, content).unwrap();
            password("etcd-password-file", &path)
        };
        for good in [&b"pass word"[..], b"pass word\n", b"pass word\r\n"] {
            assert_eq!(at(good).unwrap(), "pass word");
        }
        for bad in [&b""[..], b"\n", b"one\ntwo\n", b"\xff\n"] {
            let text = at(bad).unwrap_err().to_string();
            assert!(text.starts_with("--etcd-password-file ") && !text.contains("two"), "{text}");
        }
        let missing = password("cql-password-file", Path::new("/nowhere/at/all")).unwrap_err().to_string();
        assert!(missing.starts_with("--cql-password-file /nowhere/at/all: "), "{missing}");
    }
}
