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

/// The rules that `cargo deny` knows, too.
fn rules() -> toml::Table {
    let text = std::fs::read_to_string(crate::workspace().join("deny.toml")).expect("deny.toml");
    text.parse().expect("deny.toml is TOML")
}

/// The texts of a list of deny.toml: entries of `key`, or entries themselves.
fn texts(list: &toml::Value, key: &str) -> Vec<String> {
    let entries = list.as_array().expect("a list of deny.toml").iter();
    let text = |entry: &toml::Value| entry.get(key).unwrap_or(entry).as_str().expect("a text of deny.toml").to_owned();
    entries.map(text).collect()
}

/// The targets that deny.toml names: what is built for none of them does not count.
fn platforms() -> Vec<String> {
    let targets = texts(&rules()["graph"]["targets"], "triple");
    targets.into_iter().flat_map(|target| ["--filter-platform".to_owned(), target]).collect()
}

fn metadata(arguments: &[impl AsRef<std::ffi::OsStr>]) -> Value {
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
    let metadata = metadata(&platforms());
    let packages: Vec<_> = list(&metadata, "packages").collect();
    let banned = texts(&rules()["bans"]["deny"], "crate");
    assert!(banned.len() >= 4, "{banned:?}");
    for banned in banned {
        assert!(packages.iter().all(|package| text(package, "name") != banned), "{banned} is in the tree");
    }
    let generators: Vec<_> = packages.iter().filter(|package| text(package, "name") == "tonic-prost-build").collect();
    assert!(matches!(generators[..], [only] if only["source"].is_null()), "tonic-prost-build is not the one in tools/");
}

#[test]
fn every_package_has_a_licence_that_we_accept() {
    let metadata = metadata(&platforms());
    let accepted = texts(&rules()["licenses"]["allow"], "name");
    for package in list(&metadata, "packages") {
        let (name, licence) = (text(package, "name"), text(package, "license"));
        assert!(acceptable(licence, &accepted), "{name}: {licence}");
    }
}

/// C and assembly; docs/adr/0007-no-unsafe-little-c.md says what each is for.
const COMPILE_C: [&str; 3] = ["blake3", "libmimalloc-sys", "ring"];

#[test]
fn only_known_packages_compile_c() {
    let metadata = metadata(&platforms());
    let compilers: BTreeSet<_> = list(&metadata, "packages")
        .filter(|package| ["cc", "cmake", "bindgen"].contains(&text(package, "name")))
        .map(|package| text(package, "id"))
        .collect();
    let uses = |node: &&Value| list(node, "dependencies").filter_map(Value::as_str).any(|id| compilers.contains(id));
    let users: BTreeSet<_> = list(&metadata["resolve"], "nodes").filter(uses).map(|node| text(node, "id")).collect();
    let users: Vec<_> = list(&metadata, "packages")
        .filter(|package| users.contains(text(package, "id")))
        .map(|package| text(package, "name"))
        .collect();
    assert_eq!(users, COMPILE_C, "docs/adr/0007-no-unsafe-little-c.md");
}

#[test]
fn every_crate_has_the_lints_of_the_workspace() {
    for package in list(&metadata(&["--no-deps"]), "packages") {
        let manifest = std::fs::read_to_string(text(package, "manifest_path")).expect("a manifest");
        let manifest: toml::Table = manifest.parse().expect("TOML");
        let lints = manifest.get("lints").and_then(|lints| lints.get("workspace")).and_then(toml::Value::as_bool);
        assert_eq!(lints, Some(true), "{}", text(package, "name"));
    }
}

#[test]
fn every_package_comes_from_the_registry_or_this_tree() {
    let rules = rules();
    for kind in ["unknown-registry", "unknown-git"] {
        assert_eq!(rules["sources"][kind].as_str(), Some("deny"));
    }
    for package in list(&metadata(&platforms()), "packages") {
        let source = package["source"].as_str().unwrap_or("registry+");
        assert!(source.starts_with("registry+"), "{}: {source}", text(package, "name"));
    }
}

#[test]
fn yanked_releases_are_refused_and_an_ignored_advisory_has_a_reason() {
    let advisories = &rules()["advisories"];
    assert_eq!(advisories["yanked"].as_str(), Some("deny"));
    for ignored in advisories["ignore"].as_array().expect("a list") {
        assert!(ignored["reason"].as_str().is_some_and(|reason| reason.len() > 20), "{ignored}");
    }
}

/// Alternatives divided by OR (or an old slash), each of parts divided by AND. Parentheses group; without evaluating them, every
/// AND part must hold some licence of ours.
fn acceptable(expression: &str, accepted: &[String]) -> bool {
    let plain = expression.replace(['(', ')'], "").replace('/', " OR ");
    let known = |name: &str| accepted.iter().any(|accepted| accepted == name.trim());
    plain.split(" AND ").all(|part| part.split(" OR ").any(known))
}
