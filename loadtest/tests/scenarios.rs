//! Each scenario for a moment against a server of its own: that it runs, judges and reports, not how fast anything is.

use std::{
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
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

/// A server that nobody but the test knows, killed at the end.
struct Server(Child);

impl Server {
    fn start(data: &Path) -> (Self, Value) {
        let mut command = Command::new(imd());
        command.args(["up", "--data"]).arg(data);
        for listener in ["--tcp", "--tls", "--quic", "--api", "--http"] {
            command.args([listener, "127.0.0.1:0"]);
        }
        let null = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut server = Self(null.spawn().expect("imd runs"));
        loop {
            let text = std::fs::read(data.join("ready.json")).unwrap_or_default();
            match serde_json::from_slice::<Value>(&text) {
                Ok(ready) if ready["pid"] == server.0.id() => return (server, ready),
                _ => assert!(server.0.try_wait().unwrap().is_none(), "the server ended"),
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The report of a run that must have found a promise broken.
fn broken(output: &Output) -> Vec<String> {
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!((output.status.code(), &report["verdict"]), (Some(3), &"a promise did not hold".into()), "{report:#}");
    let broken = report["broken"].as_array().expect("broken promises");
    broken.iter().map(|what| what.as_str().unwrap_or_default().to_owned()).collect()
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
    assert_flushed(&report);
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
    let directory = tempfile::tempdir().unwrap();
    let (script, starts) = (directory.path().join("imd"), directory.path().join("starts"));
    let text =
        format!("#!/bin/sh\n[ \"$1\" != up ] || echo up >>'{}'\nexec '{}' \"$@\"\n", starts.display(), imd().display());
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let imd = script.to_str().unwrap();
    let report = report(&["stall", "--members", "20", "--stalled", "4", "--rate", "50", "--imd", imd]);
    assert_eq!(report["details"]["stalled"], 4);
    // What a cold server takes for itself would otherwise be set off against what it keeps for the stalled ones.
    assert_eq!(std::fs::read_to_string(starts).unwrap(), "up\nup\n", "each run has a fresh server");
    assert_eq!(report["details"]["memory_bound_bytes"], 8.0 * 1024.0 * 1024.0);
    assert_eq!(goals(&report), ["PF11", "PF11"]);
}

#[test]
fn what_waits_for_the_disk_is_measured_against_the_settings() {
    let small = ["store.queue_bytes=2MiB", "store.memtable_bytes=4MiB", "store.cache_bytes=4MiB"];
    let settings = small.iter().flat_map(|setting| ["--set", setting]);
    let arguments: Vec<&str> = ["stall", "--slow-disk"].into_iter().chain(settings).collect();
    let report = report(&arguments);
    let parts = report["details"]["memory_bound"].as_array().unwrap();
    assert!(parts.iter().any(|part| part["what"] == "5 × store.memtable_bytes 4194304"), "{report:#}");
    assert_eq!(goals(&report), ["PF11"]);
    assert!(report["acked_per_s"].as_f64() > Some(0.0), "{report:#}");
}

#[test]
fn who_comes_back_syncs_and_reads_pages_under_load() {
    let report = report(&["sync", "--conversations", "5", "--rate", "100", "--seconds", "3"]);
    assert!(report["details"]["sync"]["count"].as_u64() > Some(0), "{report:#}");
    let sync = &report["details"]["sync"];
    assert!(
        sync["first_page_us"]["p50"].as_u64() > Some(0)
            && sync["first_page_us"]["p50"].as_u64() <= sync["us"]["p50"].as_u64(),
        "{sync}"
    );
    assert_eq!(report["details"]["history"]["shorter"], 0);
    assert_eq!(goals(&report), ["PF8", "V4", "PF8"]);
}

#[test]
fn each_flood_is_attempted_and_judged() {
    let report = report(&["flood", "--rate", "100", "--flood-rate", "100"]);
    let phases = report["details"]["phases"].as_array().unwrap();
    assert_eq!(phases.len(), 6);
    assert!(phases[1..].iter().all(|phase| phase["flood"].is_string()), "{phases:#?}");
    // Beside other tests it may be the one with which the flooder begins.
    assert!(phases[1..].iter().all(|phase| phase["attempts_per_s"].as_f64() > Some(0.0)), "{phases:#?}");
    assert!(phases.iter().all(|phase| phase["delivery_us"]["p50"].as_u64() > Some(0)), "{phases:#?}");
    assert_eq!(goals(&report).len(), 5);
}

#[test]
fn a_cluster_that_never_comes_back_is_a_broken_promise() {
    let directory = tempfile::tempdir().unwrap();
    let (server, ready) = Server::start(directory.path());
    let url = format!("tcp://{}", ready["tcp"].as_str().unwrap());
    let key = directory.path().join("keys/signing.pk8");
    let mut command = Command::new(LOADTEST);
    command.args(["soak", "--marks", "--settle", "0.3", "--pairs", "2", "--server", &url, "--key"]).arg(key);
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut soak = pipes.spawn().unwrap();
    let mut lines = BufReader::new(soak.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "soak: under way"));
    drop(server);
    drop(soak.stdin.take());
    // Whoever does not read would keep it from writing.
    let rest = std::thread::spawn(move || lines.count());
    let broken = broken(&soak.wait_with_output().unwrap());
    rest.join().unwrap();
    for what in ["not settled", "only 0 of 4 clients", "cannot be read back"] {
        assert!(broken.iter().any(|found| found.contains(what)), "{what}: {broken:?}");
    }
}

#[test]
fn a_send_that_waits_longer_than_it_may_is_a_broken_promise() {
    let directory = tempfile::tempdir().unwrap();
    let (_server, ready) = Server::start(directory.path());
    let url = format!("tcp://{}", ready["tcp"].as_str().unwrap());
    let key = directory.path().join("keys/signing.pk8");
    let soak = |wait_max: &str| {
        let mut command = Command::new(LOADTEST);
        command
            .args(["soak", "--seconds", "1", "--pairs", "2", "--wait-max", wait_max, "--server", &url, "--key"])
            .arg(&key);
        command.output().unwrap()
    };
    assert!(broken(&soak("0.000001")).iter().any(|found| found.contains("a send waited")));
    assert!(soak("600").status.success());
}

#[test]
fn a_server_that_is_killed_comes_back_with_everything() {
    let report = report(&["crash", "--kills", "2"]);
    assert_eq!((&report["details"]["kills"], goals(&report)), (&2.into(), vec!["PF12"]));
    assert!(report["details"]["outage_us"]["max"].as_u64() > Some(0), "{report:#}");
    assert_flushed(&report);
}

/// The server behind a script that first does so in that directory each time it starts.
fn imd_with(directory: &Path, first: &str) -> PathBuf {
    let (script, imd, directory) = (directory.join("imd"), imd(), directory.display());
    let text = format!(
        "#!/bin/sh\nif [ \"$1\" = up ]; then\n  (cd '{directory}' && {{ {first}; }}) || exit 1\nfi\nexec '{}' \"$@\"\n",
        imd.display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    script
}

#[test]
fn a_server_that_cannot_start_again_is_a_broken_promise() {
    let directory = tempfile::tempdir().unwrap();
    let script = imd_with(directory.path(), "[ ! -e begun ] || exit 1; : >begun");
    let broken = broken(&run(&["crash", "--kills", "1", "--pairs", "2", "--imd", script.to_str().unwrap()]));
    assert!(broken.iter().any(|what| what.contains("did not come back: restart after kill 1")), "{broken:?}");
}

#[test]
fn a_run_that_is_ended_ends_its_server() {
    let directory = tempfile::tempdir().unwrap();
    let (script, pid) = (imd_with(directory.path(), "echo $$ >pid.new; mv pid.new pid"), directory.path().join("pid"));
    let mut command = Command::new(LOADTEST);
    command.args(["chat", "--pairs", "2", "--seconds", "600", "--ceiling", "0", "--imd", script.to_str().unwrap()]);
    let mut run = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let server = loop {
        match std::fs::read_to_string(&pid) {
            Ok(text) => break text.trim().to_owned(),
            Err(_) => assert!(run.try_wait().unwrap().is_none(), "the run ended"),
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    let own = rustix::process::Pid::from_child(&run);
    rustix::process::kill_process(own, rustix::process::Signal::TERM).unwrap();
    let output = run.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("terminated"), "{output:?}");
    let is_there = |_| {
        std::thread::sleep(std::time::Duration::from_millis(5));
        let state = std::fs::read_to_string(format!("/proc/{server}/stat")).unwrap_or_default();
        !state.is_empty() && !state.contains(") Z ")
    };
    assert!(!(0..2000).all(is_there), "the server is still there");
}

/// What was acknowledged is on disk, as far as this machine can tell.
fn assert_flushed(report: &Value) {
    let unknown =
        |reason: &Value| reason.as_str().unwrap_or_default().contains("cache flushes of the disk are not known");
    match report["disk_flushes"].as_u64() {
        Some(flushes) => assert!(flushes > 0, "{report:#}"),
        None => assert!(report["reasons"].as_array().unwrap().iter().any(unknown), "{report:#}"),
    }
}

#[test]
fn the_durable_ceiling_flushes_its_disk() {
    let report = report(&["ceiling", "--durable", "--workload", "pairs"]);
    assert!(report["acked_per_s"].as_f64() > Some(0.0), "{report:#}");
    assert_flushed(&report);
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
fn a_report_says_when_nothing_was_read_back() {
    let said = |more: &[&str]| {
        let report = report(&[&["fanout", "--members", "2", "--rate", "50"], more].concat());
        let reasons = report["reasons"].as_array().unwrap();
        reasons.iter().any(|reason| reason.as_str().unwrap_or_default().contains("--no-read-back"))
    };
    assert!(!said(&[]) && said(&["--no-read-back"]));
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
