//! Each scenario for a moment against a server of its own: that it runs, judges and reports, not how fast anything is.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

const LOADTEST: &str = env!("CARGO_BIN_EXE_loadtest");

/// The server beside this program; built if nobody built it.
fn imd() -> PathBuf {
    let path = Path::new(LOADTEST).with_file_name("imd");
    if !path.is_file() {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "im-node", "--bin", "imd"]);
        if Path::new(LOADTEST).components().any(|part| part.as_os_str() == "release") {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo").success(), "build imd");
    }
    path
}

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(LOADTEST);
    command.args(arguments).env("IMD", imd()).stdin(Stdio::null()).output().expect("loadtest runs")
}

/// Runs for a moment; the report. The machine may be busy, so that speed and the generator's share say nothing here.
fn report(arguments: &[&str]) -> Value {
    let short = ["--warmup", "0.1", "--ceiling", "0", "--pairs", "3", "--seed", "7"];
    let seconds = if arguments.contains(&"--seconds") { [].as_slice() } else { &["--seconds", "0.4"] };
    let output = run(&[arguments, &short[..], seconds].concat());
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {}", String::from_utf8_lossy(&output.stderr)));
    let limited = report["verdict"] == "the generator was the limit";
    assert!(output.status.success() || limited, "{arguments:?}: {report:#}");
    for key in ["lost", "duplicated", "reordered", "holes", "corrupted"] {
        assert_eq!(report[key], 0, "{arguments:?}: {key}: {report:#}");
    }
    report
}

fn goals(report: &Value) -> Vec<&str> {
    report["goals"].as_array().expect("goals").iter().filter_map(|goal| goal["id"].as_str()).collect()
}

#[test]
fn an_open_loop_runs_at_its_share_of_the_closed_loop() {
    let report = report(&["chat", "--rate-of", "0.1"]);
    let (offered, closed) = (&report["offered_per_s"], &report["details"]["closed_loop_delivered_per_s"]);
    let share = offered.as_f64().unwrap() / closed.as_f64().unwrap();
    assert!((share - 0.1).abs() < 1e-3, "{share}");
    assert!(report["details"]["begun_per_s"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_store_is_filled_once_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("store");
    let data = data.to_str().unwrap();
    report(&["chat", "--fill", "3000", "--data", data]);
    let noted = || -> u64 {
        let text = std::fs::read(Path::new(data).join("loadtest-fill.json")).unwrap();
        serde_json::from_slice::<Value>(&text).unwrap()["messages"].as_u64().unwrap()
    };
    let first = noted();
    assert!(first >= 3000, "{first}");
    report(&["chat", "--fill", "3000", "--data", data]);
    assert_eq!(noted(), first);
}

#[test]
fn connects_are_counted_with_and_without_resumption() {
    let plain = report(&["connect"]);
    assert_eq!(
        (&plain["errors"], &plain["details"]["phases"][0]["failed"]),
        (&Value::from(0), &Value::from(0)),
        "{plain:#}"
    );
    let tls = report(&["connect", "--transport", "tls"]);
    let phases = tls["details"]["phases"].as_array().unwrap();
    assert_eq!((phases.len(), &phases[0]["resumed"]), (2, &Value::from(0)));
    assert_eq!(goals(&tls), ["PF5"]);
}

#[test]
fn a_reader_that_stalls_leaves_the_others_whole() {
    let report = report(&["stall", "--members", "20", "--stalled", "4", "--rate", "50"]);
    assert_eq!(report["details"]["stalled"], 4);
    assert_eq!(report["details"]["memory_bound_bytes"], 8.0 * 1024.0 * 1024.0);
    assert_eq!(goals(&report), ["PF11", "PF11"]);
}

#[test]
fn who_comes_back_syncs_and_reads_pages_under_load() {
    let report = report(&["sync", "--conversations", "5", "--rate", "100", "--seconds", "3"]);
    assert!(report["details"]["sync"]["count"].as_u64() > Some(0), "{report:#}");
    assert_eq!(report["details"]["history"]["shorter"], 0);
    assert_eq!(goals(&report), ["PF8", "PF8"]);
}

#[test]
fn each_flood_is_attempted_and_judged() {
    let report = report(&["flood", "--rate", "100", "--flood-rate", "100"]);
    let phases = report["details"]["phases"].as_array().unwrap();
    assert_eq!(phases.len(), 4);
    assert!(phases[1..].iter().all(|phase| phase["flood"].is_string()), "{phases:#?}");
    assert_eq!(goals(&report).len(), 3);
}

#[test]
fn idle_connections_are_held_by_several_processes_beside_the_bare_server() {
    let directory = tempfile::tempdir().unwrap();
    let html = directory.path().join("idle.html");
    let arguments =
        ["idle", "--connections", "31", "--processes", "2", "--heartbeat", "1", "--html", html.to_str().unwrap()];
    let output = run(&[&arguments[..], &["--seconds", "3", "--warmup", "0.1"]].concat());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["connections"], &report["errors"]), (&Value::from(31), &Value::from(0)), "{report:#}");
    assert!(report["details"]["heartbeats"].as_u64() > Some(0), "{report:#}");
    assert!(report["details"]["bare"]["heartbeats_per_s"].is_number(), "{report:#}");
    // A moment of some heartbeats may be too short to say what one costs.
    assert!(goals(&report).starts_with(&["PF4"]), "{report:#}");
    assert!(std::fs::read_to_string(html).unwrap().contains("Memory a connection"));
}

#[test]
fn members_who_are_away_cost_no_delivery() {
    let report = report(&["fanout", "--members", "40", "--online", "3", "--rate", "50"]);
    assert_eq!((&report["connections"], &report["details"]["members_away"]), (&Value::from(4), &Value::from(37)));
}

#[test]
fn the_curve_has_a_point_for_each_share() {
    let report = report(&["curve"]);
    assert!(!report["details"]["curve"].as_array().unwrap().is_empty(), "{report:#}");
}

#[test]
#[ignore = "needs Redis: run through deploy/test.sh"]
fn a_peer_in_the_same_run_is_the_denominator() {
    let report = report(&["chat", "--peer", "redis-stream"]);
    assert_eq!(report["denominator"], "peer redis-stream");
    assert!(report["ratio"].is_number() && report["details"]["peer"]["on_disk_before_ack"] == true, "{report:#}");
}
