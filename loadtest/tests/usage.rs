//! What cannot be done is said at once, with exit code 2, before anything is started or measured.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output, Stdio},
};

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
        ("crash", vec!["--imd", "/nowhere/imd"], "--imd /nowhere/imd: there is no such file"),
        ("chat", vec!["--config", "/nowhere/imd.toml"], "--config /nowhere/imd.toml: there is no such file"),
        ("chat", vec!["--data", "/dev/null"], "--data /dev/null: that is no directory"),
        ("chat", vec!["--connections", "1"], "--connections 1: two make a pair"),
        ("fanout", vec!["--members", "100000"], "--members 100000: a group has at most 100000, the sender is one more"),
        ("stall", vec!["--members", "100000"], "--members 100000: a group has at most 100000, the sender is one more"),
        ("fanout", vec!["--members", "5", "--online", "6"], "--online 6 of --members 5"),
        ("idle", vec!["--connections", "5", "--processes", "6"], "--processes 6 of --connections 5"),
        ("scale", vec!["--tool", "/nowhere/cluster"], "--tool /nowhere/cluster: there is no such file"),
        (
            "flood",
            vec!["--set", "gateway.address_connects_per_second_max=x"],
            "gateway.address_connects_per_second_max is a number",
        ),
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

/// What may be said of every number, and what may not.
const NUMBERS: &[(&[&str], &str, &[&str], &str)] = &[
    (&["chat"], "--pairs", &["0", "-1", "500001", "1.5", "x"], "a whole number from 1 to 500000"),
    (&["chat"], "--connections", &["0", "-1", "1000001"], "a whole number from 1 to 1000000"),
    (&["idle"], "--processes", &["0", "-1", "1001"], "a whole number from 1 to 1000"),
    (&["soak"], "--members", &["0", "-1", "100001"], "a whole number from 1 to 100000"),
    (&["fanout"], "--online", &["0", "-1", "100001"], "a whole number from 1 to 100000"),
    (&["chat"], "--window", &["0", "-1", "257"], "a whole number from 1 to 256"),
    (&["chat"], "--rate", &["0", "-1", "NaN", "inf", "1e400", "1e8", "abc"], "a number from 0.001 to 10000000"),
    (&["chat"], "--rate-of", &["0", "-1", "NaN", "inf", "11"], "a number from 0.001 to 10"),
    (&["idle"], "--heartbeat", &["0", "-1", "NaN", "inf", "1801"], "a number from 1 to 1800"),
    (&["chat"], "--fill", &["-1", "10000000001", "x"], "a whole number from 0 to 10000000000"),
    (&["chat"], "--body", &["0", "-1", "65529", "100000"], "a whole number from 1 to 65528"),
    (&["chat"], "--warmup", &["-1", "NaN", "inf", "3601"], "a number from 0 to 3600"),
    (&["chat"], "--seconds", &["0", "-1", "NaN", "inf", "82801"], "a number from 0.1 to 82800"),
    (&["chat"], "--ceiling", &["-1", "0.01", "NaN", "inf", "3601"], "0, or a number from 0.1 to 3600"),
    (&["chat"], "--repeat", &["0", "-1", "100"], "a whole number from 1 to 99"),
    (&["chat"], "--generator-threads", &["0", "-1", "65"], "a whole number from 1 to 64"),
    (&["chat"], "--seed", &["-1", "x"], "a whole number from 0 to 18446744073709551615"),
    (&["chat"], "--server-pid", &["0", "-1", "2147483648"], "a whole number from 1 to 2147483647"),
    (&["crash"], "--reads", &["-1", "NaN", "inf", "100001"], "a number from 0 to 100000"),
    (&["crash"], "--kills", &["0", "-1", "100001"], "a whole number from 1 to 100000"),
    (&["soak"], "--settle", &["-1", "NaN", "inf", "3601"], "a number from 0 to 3600"),
    (&["soak"], "--goal-back", &["-1", "NaN", "inf", "3601"], "a number from 0 to 3600"),
    (&["soak"], "--wait-max", &["0", "-1", "NaN", "inf", "3601"], "a number from 0.000001 to 3600"),
    (&["stall"], "--stalled", &["0", "-1", "100000"], "a whole number from 1 to 99999"),
    (&["sync"], "--conversations", &["0", "-1", "10001"], "a whole number from 1 to 10000"),
    (&["flood"], "--flood-rate", &["0", "-1", "NaN", "inf", "1000001"], "a number from 0.1 to 1000000"),
    (&["suite", "--quick"], "--pairs", &["0"], "a whole number from 1 to 500000"),
    (&["curve"], "--set", &["store.queue_bytes", "=1"], "KEY=VALUE"),
];

#[test]
fn numbers_out_of_range_are_refused_with_the_option_the_value_and_what_is_allowed() {
    for (scenario, option, values, allowed) in NUMBERS {
        for value in *values {
            let output = run(Command::new(LOADTEST).args(*scenario).args([option, value]));
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let what = format!("{scenario:?} {option} {value}: {said}");
            assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{what}");
            let line = said.lines().next().unwrap_or_default();
            assert!(line.contains(&format!("'{value}'")) && line.contains(&format!("'{option} <")), "{what}");
            assert!(line.ends_with(&format!(": allowed is {allowed}")), "{what}");
        }
    }
}

/// A run of a moment that needs no server.
fn ceiling(more: &[&str]) -> Output {
    let short = ["ceiling", "--workload", "echo", "--connections", "2", "--warmup", "0", "--seconds", "0.1"];
    run(Command::new(LOADTEST).args(short).args(more))
}

#[test]
fn where_no_report_can_be_written_nothing_is_started() {
    let directory = tempfile::tempdir().unwrap();
    let folder = directory.path().to_str().unwrap();
    for arguments in [
        &["chat", "--seconds", "1", "--json", "/nowhere/x.json"][..],
        &["suite", "--quick", "--html", "/nowhere/x.html"],
        &["chat", "--json", folder],
        &["ceiling", "--html", "/dev/null/x.html"],
    ] {
        let line = refused(&run(Command::new(LOADTEST).args(arguments)), &arguments.join(" "));
        let named = arguments[arguments.len() - 2..].join(" ");
        assert!(line.starts_with(&format!("loadtest: {named}: ")), "{line}");
    }
    let same = directory.path().join("x");
    let same = same.to_str().unwrap();
    let line = refused(&ceiling(&["--json", same, "--html", same]), "one file twice");
    assert!(line.contains("--json and --html name the same file"), "{line}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_run_that_cannot_start_leaves_no_report_and_keeps_the_one_from_before() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (script, json, html) = (at("imd"), at("x.json"), at("x.html"));
    std::fs::write(&script, "#!/bin/sh\nexit 1\n").unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(&html, "before").unwrap();
    let chat = ["chat", "--ceiling", "0", "--imd", &script, "--json", &json, "--html", &html];
    let output = run(Command::new(LOADTEST).args(chat));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!Path::new(&json).exists());
    assert_eq!(std::fs::read_to_string(html).unwrap(), "before");
}

#[test]
fn a_report_that_cannot_be_written_at_the_end_is_on_standard_output_and_in_the_other_file() {
    let directory = tempfile::tempdir().unwrap();
    let html = directory.path().join("x.html");
    let output = ceiling(&["--json", "/dev/full", "--html", html.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("loadtest: --json /dev/full: "), "{said}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a report");
    assert_eq!(report["scenario"], "ceiling");
    assert!(std::fs::read_to_string(html).unwrap().ends_with("</html>\n"));
}

#[test]
fn reports_are_written_to_both_files_and_zero_means_none_where_it_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (json, html) = (at("x.json"), at("x.html"));
    let output = ceiling(&["--json", &json, "--html", &html, "--ceiling", "0", "--reads", "0", "--fill", "0"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(std::fs::read(json).unwrap(), output.stdout.trim_ascii_end());
    assert!(std::fs::read_to_string(html).unwrap().contains("loadtest ceiling"));
}
