//! `imd` as a process: exit codes, messages, files.

use std::{
    net::{TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::Command,
    time::Duration,
};

use bytes::Bytes;
use im_proto::v1;
use prost::Message as _;
use tokio::time::timeout;

use crate::server::{ANY, Server, code, imd, stderr, stdout};

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
fn a_server_has_the_allocator_give_memory_back_unless_it_is_told_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    for (name, told, wanted) in [("own", None, "0"), ("told", Some("7"), "7")] {
        let data = folder.path().join(name);
        // Servers of tests start without any environment.
        let mut command = Command::new("env");
        command.args(told.map(|value| format!("MIMALLOC_PURGE_EXTEND_DELAY={value}")));
        command.args([env!("CARGO_BIN_EXE_imd"), "up", "--data", data.to_str().unwrap()]).args(ANY);
        let server = Server::run(&data, command);
        let environment = std::fs::read(format!("/proc/{}/environ", server.child.id())).unwrap();
        let wanted = format!("MIMALLOC_PURGE_EXTEND_DELAY={wanted}");
        assert!(environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes()), "{name}");
    }
}

/// Runs nothing and says in one line what is missing or does not fit, and which option mends it.
#[test]
fn a_role_that_cannot_work_says_why_and_exits_2() {
    let folder = tempfile::tempdir().unwrap();
    let secrets = folder.path().join("secrets");
    let secrets = secrets.to_str().unwrap();
    assert_eq!(code(&imd(&["secrets", "--out", secrets])), 0);
    assert_eq!(code(&imd(&["secrets", "--out", secrets])), 0, "what is there stays");
    let etcd = ["--etcd", "http://127.0.0.1:9"];
    let cql = ["--cql", "127.0.0.1:9"];
    let router_cert = format!("{secrets}/services/router.pem");
    let bare = folder.path().join("bare");
    assert_eq!(code(&imd(&["secrets", "--out", bare.to_str().unwrap()])), 0);
    std::fs::remove_dir_all(bare.join("services")).unwrap();
    let bare = bare.to_str().unwrap();
    let cases: [(&[&str], &str); 13] = [
        (&["router"], "--etcd"),
        (&["gateway"], "--etcd"),
        (&["gateway", etcd[0], etcd[1]], "--secrets"),
        (&["router", etcd[0], etcd[1], cql[0], cql[1]], "--secrets"),
        (&["gateway", etcd[0], etcd[1], "--secrets", "/nowhere"], "/nowhere/cluster.json"),
        (&["gateway", etcd[0], "127.0.0.1:2379", "--secrets", secrets], "http://127.0.0.1:2379"),
        (&["gateway", etcd[0], etcd[1], "--secrets", secrets, "--service-cert", &router_cert], "im-gateway"),
        (&["gateway", etcd[0], etcd[1], "--secrets", secrets, "--set", "advertise=a b"], "advertise"),
        (&["gateway", etcd[0], etcd[1], "--secrets", secrets, "--tls", "0.0.0.0:0"], "--advertise"),
        (&["router", etcd[0], etcd[1], cql[0], cql[1], "--secrets", bare, "--link", "0.0.0.0:0"], "--insecure-links"),
        (&["up", "--set", "etcd=http://127.0.0.1:9"], "imd router"),
        (&["cluster", "status", "--secrets", secrets], "--etcd"),
        (&["schema", "apply", "--secrets", secrets], "--cql"),
    ];
    for (arguments, names) in cases {
        let port_0 = match arguments[0] {
            "gateway" => &["--tcp", "127.0.0.1:0", "--quic", "off", "--http", "off"][..],
            "router" => &["--api", "off", "--http", "off"],
            _ => &[],
        };
        let output = imd(&[arguments, port_0].concat());
        let said = stderr(&output);
        assert_eq!(code(&output), 2, "{arguments:?}: {said}");
        assert!(said.contains(names) && said.lines().count() == 1, "{arguments:?}: {said}");
    }
}

/// What is said is about the store or the file that the user has to name, not about something that comes after it.
#[test]
fn a_tool_that_cannot_work_names_the_option_that_mends_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (secrets, data, export) = (path("secrets"), path("data"), path("x.im"));
    assert_eq!(code(&imd(&["secrets", "--out", &secrets])), 0);
    drop(Server::start(Path::new(&data), &ANY));
    assert_eq!(code(&imd(&["export", "--data", &data, "--to", &export])), 0);
    let bytes = std::fs::read(&export).unwrap();
    let (cut, nowhere) = (path("cut.im"), path("none/x.im"));
    std::fs::write(&cut, &bytes[..bytes.len() - 1]).unwrap();
    let cases: [(&[&str], &str); 8] = [
        (&["export", "--to", &path("y.im")], "name a store: --data"),
        (&["export", "--to", &path("y.im"), "--secrets", &secrets], "name a store: --data"),
        (&["import", "--from", &export], "name a store: --data"),
        (&["import", "--from", &cut, "--data", &path("new")], "copy it again"),
        (&["export", "--data", &data, "--to", &nowhere], &format!("--to {nowhere}: ")),
        (&["schema", "status", "--cql", "127.0.0.1:1"], "--cql 127.0.0.1:1"),
        (&["up", "--set", "log.filter=im_router=loud"], "off, error, warn, info, debug, trace"),
        (&["gateway"], "imd: etcd is not set"),
    ];
    for (arguments, names) in cases {
        let output = imd(arguments);
        let said = stderr(&output);
        assert_eq!(code(&output), 2, "{arguments:?}: {said}");
        assert!(said.contains(names) && said.lines().count() == 1, "{arguments:?}: {said}");
    }
}

/// Nothing listens on port 9.
#[test]
fn a_role_without_its_services_says_which_one_does_not_answer_and_exits_2() {
    let folder = tempfile::tempdir().unwrap();
    let secrets = folder.path().join("secrets");
    let secrets = secrets.to_str().unwrap();
    assert_eq!(code(&imd(&["secrets", "--out", secrets])), 0);
    let common = ["--etcd", "http://127.0.0.1:9", "--secrets", secrets, "--http", "off"];
    let gateway = ["gateway", "--tcp", "127.0.0.1:0", "--tls", "off", "--quic", "off"];
    let router = ["router", "--cql", "127.0.0.1:9", "--link", "127.0.0.1:0", "--api", "off"];
    for (arguments, names) in [(&gateway[..], "--etcd http://127.0.0.1:9"), (&router, "--cql 127.0.0.1:9")] {
        let output = imd(&[arguments, &common].concat());
        let said = stderr(&output);
        assert_eq!(code(&output), 2, "{said}");
        assert!(said.lines().last().is_some_and(|line| line.contains(names)), "{said}");
    }
}

/// What they hold is shown where they are made, in `im-client`.
#[test]
fn completions_and_manual_pages_are_those_of_imd() {
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("man1");
    let output = imd(&["man", "--out", pages.to_str().unwrap()]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    for page in ["imd.1", "imd-up.1", "imd-cluster-recover.1", "imd-config-check.1"] {
        let page = std::fs::read_to_string(pages.join(page)).expect(page);
        assert!(page.contains(".SH OPTIONS") && page.contains("imd"), "{page}");
    }
    assert!(std::fs::read_dir(&pages).unwrap().count() > 20);
    for (shell, says) in [("bash", "complete -F _imd"), ("zsh", "#compdef imd"), ("fish", "complete -c imd")] {
        let script = stdout(&imd(&["completions", shell]));
        assert!(script.contains(says) && script.contains("simulate"), "{shell}");
    }
    let blocked = folder.path().join("file");
    std::fs::write(&blocked, "").unwrap();
    assert_eq!(code(&imd(&["man", "--out", blocked.to_str().unwrap()])), 1);
}

#[test]
fn version_is_one_json_object() {
    let output = imd(&["version", "--json"]);
    let version: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn a_server_says_where_it_listens_answers_health_and_stops_cleanly() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    for signal in ["TERM", "INT"] {
        let mut server = Server::start(&data, &ANY);
        assert!(server.get("/healthz").starts_with("HTTP/1.1 200"));
        assert!(server.get("/readyz").starts_with("HTTP/1.1 200"));
        assert!(server.get("/metrics").contains("\nim_router_shards_owned 1024\n"));
        for transport in ["tcp", "tls", "api"] {
            TcpStream::connect(server.address(transport)).unwrap();
        }
        server.signal(signal);
        assert_eq!(server.child.wait().unwrap().code(), Some(0), "{signal}");
        assert!(!data.join("ready.json").exists());
    }
    assert_eq!(std::fs::read_to_string(data.join("epoch")).unwrap(), "2\n", "one for each start");
}

/// As docs/metrics.md has them.
#[test]
fn logs_as_json_are_an_object_a_line_with_the_same_fields_always() {
    let folder = tempfile::tempdir().unwrap();
    let json = ["--set", "log.format=json", "--set", "log.filter=info,imd=debug,im_gateway=debug,im_router=debug"];
    let mut server = Server::start(&folder.path().join("data"), &[&ANY[..], &json].concat());
    server.signal("TERM");
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
    let said = server.said();
    let events: Vec<serde_json::Value> =
        said.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect();
    for event in &events {
        let text = |name: &str| event[name].as_str().unwrap_or_else(|| panic!("no {name}: {event}"));
        let timestamp = text("timestamp");
        let form: String = timestamp.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        assert_eq!(form, "0000-00-00T00:00:00.000000Z", "{event}");
        assert!(["ERROR", "WARN", "INFO", "DEBUG"].contains(&text("level")), "{event}");
        assert!(!text("target").is_empty() && !text("message").is_empty(), "{event}");
    }
    let ready = events.iter().find(|event| event["message"] == "ready").expect("it says that it is ready");
    assert_eq!((&ready["level"], &ready["target"], &ready["start"]), (&"INFO".into(), &"imd::up".into(), &1.into()));
    assert_eq!(ready["data"], server.data.to_str().unwrap(), "its own fields stand beside them");
    assert!(events.iter().any(|event| event["message"].as_str().is_some_and(|text| text.starts_with("stopping"))));
}

#[test]
fn a_watched_server_says_each_second_what_it_does() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::start(&folder.path().join("data"), &[&ANY[..], &["--watch"]].concat());
    let address = server.address("tcp");
    let lines = |said: &str| -> Vec<String> {
        said.lines().filter(|line| line.starts_with("up ")).map(str::to_owned).collect()
    };
    let (mut connection, mut looks) = (None, 0);
    // However slow the machine is, three come at some time, and one of them knows of the connection.
    while !lines(&server.said()).iter().skip(2).any(|line| line.contains("  1 connections  ")) {
        assert!(server.child.try_wait().unwrap().is_none(), "{}", server.said());
        // One that says nothing is closed after a while.
        connection.get_or_insert_with(|| TcpStream::connect(&address).unwrap());
        looks += 1;
        if looks % 100 == 0 {
            connection = None;
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
    let lines = lines(&server.said());
    let seconds = |line: &String| {
        let parts: Vec<u64> =
            line["up ".len()..line.find("  ").unwrap()].split(':').map(|n| n.parse().unwrap()).collect();
        let [hours, minutes, seconds] = parts[..] else { panic!("{line}") };
        (hours * 60 + minutes) * 60 + seconds
    };
    let times: Vec<u64> = lines.iter().map(seconds).collect();
    assert!(times[0] >= 1 && times.is_sorted() && times[2] >= 3, "a line a second: {times:?}");
    for line in &lines {
        let parts: Vec<&str> = line.split("  ").skip(1).collect();
        let units = ["connections", "sends/s", "deliveries/s", "commits/s", "", "MiB"];
        assert_eq!(parts.len(), units.len(), "{line}");
        for (part, unit) in parts.iter().zip(units) {
            assert!(part.ends_with(unit), "{line}");
        }
        assert!(parts[4].starts_with("sync "), "{line}");
        let memory: u64 = parts[5].trim_end_matches(" MiB").parse().unwrap();
        assert!(memory > 0, "{line}");
    }
    server.signal("TERM");
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_second_signal_ends_a_drain_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let slow = ["--set", "drain_window=10m", "--set", "drain_timeout=10m"];
    let mut server = Server::start(&folder.path().join("data"), &[&ANY[..], &slow].concat());
    // Each is told to leave at some moment of the window: all in its first second is as good as impossible.
    let address = server.address("tcp");
    let _connections: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(&address).unwrap()).collect();
    while !server.get("/metrics").contains("\nim_gateway_connections_count 20\n") {
        std::thread::sleep(LOOK_INTERVAL);
    }
    server.signal("INT");
    while server.data.join("ready.json").exists() {
        std::thread::sleep(LOOK_INTERVAL);
    }
    assert!(server.child.try_wait().unwrap().is_none(), "it drains: {}", server.said());
    server.signal("INT");
    assert_eq!(server.child.wait().unwrap().code(), Some(1));
    let said = server.said();
    assert!(said.lines().last().unwrap().starts_with("imd: stopped at once by a second SIGINT"), "{said}");
}

#[test]
fn a_second_server_on_the_same_directory_exits_2_and_leaves_the_first_alone() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let before = server.ready();
    let second = imd(&[&["up", "--data", server.data.to_str().unwrap()][..], &ANY].concat());
    assert_eq!(code(&second), 2);
    let said = stderr(&second);
    assert!(said.contains("is in use by another server") && said.lines().count() == 1, "{said}");
    assert_eq!(server.ready(), before);
    assert!(server.get("/readyz").starts_with("HTTP/1.1 200"));
}

#[test]
fn a_killed_server_starts_again_on_its_data() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let server = Server::start(&data, &ANY);
    assert_eq!(server.token("alice").split('.').count(), 3);
    drop(server);
    assert!(data.join("ready.json").exists(), "SIGKILL leaves it behind");
    Server::start(&data, &ANY);
}

#[test]
fn what_the_environment_does_not_allow_is_one_line_that_names_it_and_exit_2() {
    let folder = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let udp_address = taken_udp.local_addr().unwrap().to_string();
    let data = folder.path().join("data");
    let blocked = folder.path().join("file");
    std::fs::write(&blocked, "").unwrap();
    let below = blocked.join("data");
    let (data, below) = (data.to_str().unwrap(), below.to_str().unwrap());
    let cases = [
        (data, "--tcp", &address),
        (data, "--tls", &address),
        (data, "--quic", &udp_address),
        (data, "--api", &address),
        (data, "--http", &address),
        (below, "--tcp", &"127.0.0.1:0".to_owned()),
    ];
    for (data, option, address) in cases {
        let place = ANY.iter().position(|argument| *argument == option).unwrap();
        let mut arguments = [&["up", "--data", data][..], &ANY].concat();
        arguments[place + 4] = address;
        let output = imd(&arguments);
        let said = stderr(&output);
        assert_eq!(code(&output), 2, "{option} {said}");
        let names = if data == below { below } else { option };
        assert!(said.contains(names) && said.lines().count() == 1, "{option}: {said}");
        assert!(!Path::new(data).exists(), "{option}: nothing was changed");
    }
}

/// A file that may not grow is a disk that is full. The shell's limit is in blocks of 512 bytes: one journal, which is preallocated
/// with 64 MiB, and hardly more.
const LIMITED: &str = "trap '' XFSZ; ulimit -f 131080; exec \"$0\" \"$@\"";
const LARGE_BODY_BYTES: usize = 60_000;
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

#[tokio::test]
async fn a_full_disk_ends_the_server_with_1_and_nothing_acknowledged_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let mut command = Command::new("sh");
    command.args(["-c", LIMITED, env!("CARGO_BIN_EXE_imd"), "up", "--data", data.to_str().unwrap()]).args(ANY);
    let mut server = Server::run(&data, command);

    let alice = server.client("alice").await;
    let me = im_client::Target::Me;
    let text = v1::Text { text: "x".repeat(LARGE_BODY_BYTES), ..v1::Text::default() };
    let body = Bytes::from(v1::Body { content: Some(v1::body::Content::Text(text)) }.encode_to_vec());
    // Far more than fits. What gets no answer is tried again by the client for ever.
    let mut pending = Vec::new();
    while server.child.try_wait().unwrap().is_none() {
        if let Ok(sent) = timeout(LOOK_INTERVAL, alice.enqueue(me.clone(), body.clone())).await {
            pending.push(sent.unwrap());
        }
    }
    let acknowledged =
        pending.iter_mut().filter_map(|sent| sent.try_outcome()?.ok()).map(|sent| sent.seq).max().unwrap();
    assert_eq!(server.child.wait().unwrap().code(), Some(1));
    let said = server.said();
    assert!(said.lines().last().unwrap().starts_with("imd: the store has stopped taking writes"), "{said}");
    assert!(acknowledged > 500, "only {acknowledged} fitted into 64 MiB");
    assert!(!data.join("ready.json").exists());

    let server = Server::start(&data, &ANY);
    let page = server.client("alice").await.history(me, acknowledged, acknowledged, 1, false).await.unwrap();
    assert_eq!(page.entries.first().map(|entry| (entry.seq, entry.body.clone())), Some((acknowledged, body)));
}
