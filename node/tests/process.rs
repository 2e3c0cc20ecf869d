//! `imd` as a process: exit codes, messages, files.

use std::process::{Command, Output};

fn imd(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_imd")).args(arguments).env_clear().output().expect("imd runs")
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("it was not killed")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn printed_defaults_pass_the_check() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("im.toml");
    std::fs::write(&file, imd(&["config", "defaults"]).stdout).unwrap();
    let output = imd(&["config", "check", file.to_str().unwrap()]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
}

#[test]
fn wrong_usage_exits_2() {
    for arguments in [
        &["fly"][..],
        &["up", "--colour"],
        &["config", "check", "/nowhere"],
        &["up", "--tcp", "nonsense"],
        &["up", "--set", "router.workers"],
        &["token", "--user", "", "--data", "/nowhere"],
        &["token", "--user", "alice", "--data", "/nowhere"],
    ] {
        let output = imd(arguments);
        assert_eq!(code(&output), 2, "{arguments:?}: {}", stderr(&output));
        assert!(!stderr(&output).is_empty() && stdout(&output).is_empty(), "{arguments:?}");
    }
}

#[test]
fn version_is_one_json_object() {
    let output = imd(&["version", "--json"]);
    let version: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
}
