//! Which crate may use which, and what the whole tree may hold. ARCHITECTURE.md ("Parts") says why.

use std::{collections::BTreeSet, process::Command};

use serde_json::Value;

/// Crate, and the crates of this workspace that it may use, for whatever purpose (tests and build scripts too).
const ALLOWED: [(&str, &[&str]); 10] = [
    ("tonic-prost-build", &[]),
    ("ownership-model", &[]),
    ("im-proto", &["tonic-prost-build"]),
    ("im-storage", &["im-proto"]),
    ("im-registry", &["im-proto"]),
    ("im-gateway", &["im-proto", "im-registry"]),
    ("im-router", &["im-proto", "im-registry", "im-storage"]),
    ("im-client", &["im-proto"]),
    ("im-loadtest", &["im-proto", "im-client"]),
    ("im-node", &["im-proto", "im-storage", "im-registry", "im-gateway", "im-router", "im-client", "im-loadtest"]),
];

/// A second implementation of cryptography costs a minute of every cold build, and two at once panic at start.
const BANNED: [&str; 4] = ["aws-lc-sys", "aws-lc-rs", "openssl-sys", "native-tls"];

/// Licences of which one must be enough for each package.
const LICENCES: [&str; 12] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "MIT",
    "MIT-0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "ISC",
    "Zlib",
    "Unlicense",
    "CC0-1.0",
];
/// Licences that only ever stand beside others, for data that is compiled in.
const LICENCES_OF_DATA: [&str; 2] = ["Unicode-3.0", "CDLA-Permissive-2.0"];

fn metadata(arguments: &[&str]) -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .args(arguments)
        .current_dir(crate::workspace())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON")
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().into_iter().flatten()
}

#[test]
fn crates_use_only_what_the_architecture_allows() {
    let metadata = metadata(&["--no-deps"]);
    let members: BTreeSet<_> = list(&metadata, "packages").map(|package| text(package, "name")).collect();
    let known: BTreeSet<_> = ALLOWED.iter().map(|(name, _)| *name).collect();
    assert_eq!(members, known, "a crate without a place in the architecture");
    for package in list(&metadata, "packages") {
        let name = text(package, "name");
        let (_, allowed) = ALLOWED.iter().find(|(known, _)| *known == name).expect("checked above");
        for used in list(package, "dependencies").map(|dependency| text(dependency, "name")) {
            // A crate may name itself, to test with a feature of its own.
            let fine = used == name || !members.contains(used) || allowed.contains(&used);
            assert!(fine, "{name} must not use {used}");
        }
    }
}

#[test]
fn cargo_run_starts_imd() {
    let metadata = metadata(&["--no-deps"]);
    let defaults: Vec<_> = list(&metadata, "workspace_default_members").filter_map(Value::as_str).collect();
    assert!(matches!(defaults[..], [only] if only.contains("node")), "{defaults:?}");
    let node = list(&metadata, "packages").find(|package| text(package, "name") == "im-node").expect("a member");
    let binaries: Vec<_> = list(node, "targets")
        .filter(|target| list(target, "kind").any(|kind| kind == "bin"))
        .map(|target| text(target, "name"))
        .collect();
    assert_eq!(binaries, ["imd"]);
}

#[test]
fn nothing_banned_is_in_the_tree_and_the_stand_in_is_used() {
    let metadata = metadata(&["--filter-platform", "x86_64-unknown-linux-gnu"]);
    let packages: Vec<_> = list(&metadata, "packages").collect();
    for banned in BANNED {
        assert!(packages.iter().all(|package| text(package, "name") != banned), "{banned} is in the tree");
    }
    let generators: Vec<_> = packages.iter().filter(|package| text(package, "name") == "tonic-prost-build").collect();
    assert!(matches!(generators[..], [only] if only["source"].is_null()), "tonic-prost-build is not the one in tools/");
}

#[test]
fn every_package_has_a_licence_that_we_accept() {
    let metadata = metadata(&["--filter-platform", "x86_64-unknown-linux-gnu"]);
    for package in list(&metadata, "packages") {
        let (name, licence) = (text(package, "name"), text(package, "license"));
        assert!(acceptable(licence), "{name}: {licence}");
    }
}

/// Alternatives divided by OR (or an old slash), each of parts divided by AND. Parentheses group; without evaluating them, every
/// AND part must hold some licence of ours.
fn acceptable(expression: &str) -> bool {
    let plain = expression.replace(['(', ')'], "").replace('/', " OR ");
    let known = |name: &str| LICENCES.contains(&name.trim());
    plain
        .split(" AND ")
        .all(|part| part.split(" OR ").any(|name| known(name) || LICENCES_OF_DATA.contains(&name.trim())))
}
