//! A user's devices on a real server: by `im`, by the SDK and by another service, across a kill.

use std::{
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};

use im_client::{Client, ClientConfig, ClosedReason, Endpoint, Event, Transport, Trust};
use im_proto::{
    DeviceId, StatusCode,
    v1::{self, device_service_client::DeviceServiceClient},
};
use tonic::Code;

use crate::{
    api::{as_user, channel},
    chat::ARGUMENTS,
    server::{ANY, Server, imd, stdout},
};

/// `im` as a process, as one user.
pub fn im(data: &Path, who: &str, arguments: &[&str]) -> Output {
    command(data, who, arguments).output().expect("im runs")
}

fn command(data: &Path, who: &str, arguments: &[&str]) -> Command {
    im_process(&[&["--as", who, "--data", data.to_str().unwrap()], arguments].concat())
}

/// `im` as a process.
pub fn im_process(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let test = ["--exact", "chat::im_as_a_process", "--ignored", "--nocapture", "--test-threads", "2"];
    command.args(test).env_clear().env(ARGUMENTS, arguments.join("\n"));
    command
}

/// The lines of the list without the time, which ends each.
fn listed(output: &Output) -> Vec<String> {
    let lines = stdout(output);
    let lines = lines.lines().filter(|line| line.contains('\t'));
    lines.map(|line| line.rsplit_once('\t').unwrap().0.to_owned()).collect()
}

fn token(server: &Server, device: &str, platform: &str) -> String {
    let data = server.data.to_str().unwrap();
    let arguments = ["token", "--user", "alice", "--device", device, "--platform", platform, "--data", data];
    stdout(&imd(&arguments)).trim().to_owned()
}

async fn client(server: &Server, device: &str, platform: &str) -> Client {
    let endpoint = Endpoint::new(Transport::Tcp, server.address("tcp")).unwrap();
    let token = token(server, device, platform);
    let mut config = ClientConfig::new(vec![endpoint], token, &Trust::SystemRoots).unwrap();
    (config.client_name, config.client_version) = ("app".to_owned(), "2.1".to_owned());
    Client::connect(config).await.unwrap()
}

/// Waits until the server has stored so many rows.
fn until_written(server: &Server, rows: u32) {
    let line = |page: &str| {
        let line = page.lines().find_map(|line| line.strip_prefix("im_router_devices_written_total "));
        line.and_then(|count| count.parse::<u32>().ok()).unwrap_or_default()
    };
    for _ in 0..6_000 {
        if line(&server.get("/metrics")) >= rows {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{rows} rows were not written");
}

/// Without a device of their own, a hundred commands would push a user's real devices out of the list.
#[test]
fn commands_one_after_the_other_are_one_device_and_at_the_same_time_are_two() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let _server = Server::start(&data, &ANY);
    for text in ["one", "two", "three"] {
        let output = im(&data, "alice", &["send", "@bob", text]);
        assert!(output.status.success(), "{output:?}");
    }
    let first = listed(&im(&data, "alice", &["device", "list"]));
    let [line] = &first[..] else { panic!("{first:?}") };
    assert!(line.starts_with("im-") && line.contains("-1\tterminal\tim ") && line.ends_with("\tthis"), "{line}");

    let mut watching = command(&data, "alice", &["tail", "@bob", "--from", "1", "--count", "4"]);
    let mut watching = watching.stdout(Stdio::piped()).spawn().unwrap();
    let both = loop {
        assert!(watching.try_wait().unwrap().is_none(), "it was ended");
        let lines = listed(&im(&data, "alice", &["device", "list"]));
        if lines.iter().any(|line| line.ends_with("\tconnected")) {
            break lines;
        }
    };
    assert!(both.len() == 2 && both.iter().any(|line| line.ends_with("\tthis")), "{both:?}");
    assert!(im(&data, "alice", &["send", "@bob", "four"]).status.success());
    assert_eq!(watching.wait().unwrap().code(), Some(0), "it went on until it had what it waited for");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_lists_devices_and_ends_the_session_of_one_from_another() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let server = Server::start(&data, &ANY);
    let phone = client(&server, "pixel", "phone").await;
    let mut events = phone.events().unwrap();
    let this = format!("laptop\tterminal\tim {}\tthis", env!("CARGO_PKG_VERSION"));
    let output = im(&data, "alice/laptop", &["device", "list"]);
    assert_eq!(listed(&output), [this.as_str(), "pixel\tphone\tapp 2.1\tconnected"], "{output:?}");

    let output = im(&data, "alice/laptop", &["device", "kick", "pixel"]);
    assert!(stdout(&output).contains("kicked\n"), "{output:?}");
    let reason = loop {
        if let Event::Closed(reason) = events.recv().await.expect("it says why it ends") {
            break reason;
        }
    };
    let ClosedReason::ByServer(status) = reason else { panic!("{reason:?}") };
    assert_eq!(status.code, Some(StatusCode::KickedByAnotherDevice));
    let output = im(&data, "alice/laptop", &["device", "kick", "pixel"]);
    assert!(stdout(&output).contains("was not connected\n"), "{output:?}");
    let output = im(&data, "alice/laptop", &["device", "kick", "tower"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");

    // By another service; what a device of somebody else is, nobody learns.
    let mut devices = DeviceServiceClient::new(channel(&server).await);
    let alice = token(&server, "desk", "desktop");
    let list = devices.list(as_user(&alice, v1::DeviceListRequest {})).await.unwrap().into_inner().devices;
    let told = |device: &v1::Device| (device.device_id.clone(), device.connected, device.current);
    assert_eq!(
        list.iter().filter(|device| device.device_id == "pixel").map(told).collect::<Vec<_>>(),
        [("pixel".to_owned(), false, false)]
    );
    let request = v1::DeviceKickRequest { device_id: "pixel".to_owned() };
    let reply = devices.kick(as_user(&alice, request.clone())).await.unwrap().into_inner();
    assert!(!reply.was_connected);
    let stranger = devices.kick(as_user(&server.token("mallory"), request)).await.unwrap_err();
    assert_eq!(stranger.code(), Code::NotFound);

    // Its token still holds, and the list is there after a kill.
    let phone = client(&server, "pixel", "phone").await;
    assert!(!phone.kick_device(&DeviceId::parse("laptop").unwrap()).await.unwrap());
    until_written(&server, 2);
    drop((phone, server));
    let server = Server::start(&data, &ANY);
    let tablet = client(&server, "tab", "tablet").await;
    let list = tablet.devices().await.unwrap();
    assert_eq!(list.iter().map(told).next(), Some(("tab".to_owned(), true, true)));
    let pixel = list.iter().find(|device| device.device_id == "pixel").expect("it is stored");
    assert_eq!((pixel.platform.as_str(), pixel.client_name.as_str(), pixel.connected), ("phone", "app", false));
    assert!(pixel.first_seen_ms > 0 && pixel.last_seen_ms >= pixel.first_seen_ms);
}
