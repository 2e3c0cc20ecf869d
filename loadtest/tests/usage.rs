//! What cannot be done is said in one line at once, with exit code 2, before anything is started or measured.

use std::process::{Command, Output, Stdio};

const LOADTEST: &str = env!("CARGO_BIN_EXE_loadtest");

fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().expect("loadtest runs")
}

/// The one line of a run that was refused.
fn refused(output: &Output, what: &str) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{what}: {said}");
    assert_eq!(said.lines().count(), 1, "{what}: {said}");
    said
}

#[test]
fn wrong_options_are_refused_before_anything_is_started() {
    let directory = tempfile::tempdir().unwrap();
    let key = directory.path().join("signing.pk8");
    std::fs::write(&key, "no key").unwrap();
    std::fs::write(directory.path().join("cluster.json"), r#"{"cluster_id": "c", "issuer": "i"}"#).unwrap();
    let (key, cluster) = (key.to_str().unwrap(), directory.path().join("cluster.json"));
    let given = ["--key", key, "--cluster", cluster.to_str().unwrap()];
    let server = |url: &'static str| [&["--server", url], &given[..]].concat();
    let tcp = server("tcp://127.0.0.1:1");
    for (scenario, options, said) in [
        ("crash", tcp.clone(), "leave out --server"),
        ("flood", tcp.clone(), "leave out --server"),
        ("scale", tcp.clone(), "leave out --server"),
        ("soak", vec![], "with --server"),
        ("stall", vec!["--members", "10", "--stalled", "10"], "--stalled 10 of --members 10"),
        ("chat", server("http://127.0.0.1:1"), "--server http://127.0.0.1:1: the scheme is tcp, tls or quic"),
        ("chat", server("127.0.0.1:1"), "--server 127.0.0.1:1: that is no scheme://host:port"),
        ("chat", server("tls://127.0.0.1:1"), "need --ca FILE"),
        ("chat", tcp, "--key"),
        ("chat", vec!["--imd", "/nowhere/imd"], "--imd /nowhere/imd: there is no such file"),
    ] {
        let arguments = [&[scenario], &options[..]].concat();
        let line = refused(&run(Command::new(LOADTEST).args(&arguments)), &arguments.join(" "));
        assert!(line.starts_with("loadtest: ") && line.contains(said), "{arguments:?}: {line}");
    }
}

#[test]
fn a_missing_peer_is_named_with_what_installs_it() {
    for arguments in [
        ["peer", "redis-stream"].as_slice(),
        &["chat", "--peer", "redis-stream"],
        &["fanout", "--peer", "redis-stream"],
    ] {
        // A peer that Debian puts where no PATH looks would be found all the same.
        let line = refused(&run(Command::new(LOADTEST).args(arguments).env("PATH", "")), &arguments.join(" "));
        let wanted = "peer redis-stream needs redis-server: apt-get install -y --no-install-recommends redis-server";
        assert!(line.contains(wanted), "{line}");
    }
}
