//! What holds for every command: a closed pipe ends it quietly, Ctrl-C finishes once and ends at the second time, colour is for
//! terminals that want it.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use bytes::BytesMut;
use im_proto::{
    frame::{self, Decoded},
    limits,
    v1::{self, client_frame, server_frame},
};
use prost::Message as _;

use crate::{
    chat::pseudo_terminal,
    devices::{im, im_process},
    server::{ANY, Server},
};

const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// A command of `im` that goes on until something ends it.
struct Running {
    child: Child,
    output: Option<BufReader<std::process::ChildStdout>>,
}

impl Running {
    fn start(server: &Server, arguments: &[&str]) -> Self {
        Self::run(&[&["--as", "alice", "--data", server.data.to_str().unwrap()], arguments].concat())
    }

    fn run(arguments: &[&str]) -> Self {
        let mut command = im_process(arguments);
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("im runs");
        let output = child.stdout.take().map(BufReader::new);
        Self { child, output }
    }

    /// Reads until that line comes.
    fn prints(&mut self, text: &str) {
        let output = self.output.as_mut().expect("it is read");
        let mut lines = output.by_ref().lines().map_while(Result::ok);
        assert!(lines.any(|line| line == text), "it ended without {text}");
    }

    fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    /// Waits for the end: the exit code and what was said beside the results.
    fn ends(mut self) -> (Option<i32>, String) {
        drop(self.child.stdin.take());
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code(), said)
    }
}

fn signal(process: u32, name: &str) {
    assert!(Command::new("kill").args(["-s", name, &process.to_string()]).status().unwrap().success());
}

#[test]
fn a_closed_pipe_ends_a_command_quietly() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    im(&server.data, "alice", &["send", "@bob", "first"]);
    let mut tail = Running::start(&server, &["tail", "@bob", "--from", "1"]);
    tail.prints("first");
    tail.output = None;
    im(&server.data, "alice", &["send", "@bob", "second"]);
    assert_eq!(tail.ends(), (Some(0), String::new()));

    for arguments in [&["config", "defaults"][..], &["version"], &["completions", "bash"]] {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let output =
            Command::new(env!("CARGO_BIN_EXE_imd")).args(arguments).env_clear().stdout(writer).output().unwrap();
        assert_eq!((output.status.code(), output.stderr), (Some(0), Vec::new()), "{arguments:?}");
    }
}

#[test]
fn the_first_ctrl_c_finishes_what_was_begun() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let mut pipe = Running::start(&server, &["pipe", "@bob"]);
    pipe.child.stdin.as_mut().unwrap().write_all(b"one\ntwo\n").unwrap();
    let mut tail = Running::start(&server, &["tail", "@bob", "--from", "1"]);
    tail.prints("two");
    tail.signal("INT");
    assert_eq!(tail.ends(), (Some(0), String::new()), "its reader has seen enough");
    // To wait for it would close its input: it is the signal that ends it.
    let input = pipe.child.stdin.take();
    pipe.signal("INT");
    let code = pipe.child.wait().unwrap().code();
    drop(input);
    let (_, said) = pipe.ends();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.starts_with("im: 2 messages stored, seq 1 to 2") && said.ends_with("im: interrupted\n"), "{said}");
}

/// A server for one client that lets it in and never answers a message; says when one has come.
fn never_acknowledges(listener: TcpListener, arrived: mpsc::SyncSender<()>) {
    let (mut stream, _) = listener.accept().unwrap();
    let (mut input, mut bytes) = (BytesMut::new(), [0; 4096]);
    while let Ok(read @ 1..) = stream.read(&mut bytes) {
        input.extend_from_slice(&bytes[..read]);
        while let Some(payload) = frame::split_frame(&mut input, limits::FRAME_BYTES_MAX).unwrap() {
            let Decoded::Frame(frame) = frame::decode_client_frame(payload).unwrap() else { panic!("unknown frame") };
            let answer = match frame {
                client_frame::Frame::Hello(_) => server_frame::Frame::Welcome(v1::Welcome {
                    session_id: 1,
                    version: 1,
                    heartbeat_interval_ms: 30_000,
                    user_id: "alice".to_owned(),
                    self_conversation_id: vec![7; 16].into(),
                    ..v1::Welcome::default()
                }),
                client_frame::Frame::Ping(ping) => server_frame::Frame::Pong(v1::Pong { echo: ping.echo }),
                client_frame::Frame::Call(call) => server_frame::Frame::Reply(v1::Reply {
                    request_id: call.request_id,
                    status: None,
                    payload: v1::SyncReply::default().encode_to_vec().into(),
                    last: true,
                }),
                client_frame::Frame::Send(_) => {
                    // The first says it all.
                    let _ = arrived.try_send(());
                    continue;
                }
                _ => continue,
            };
            stream.write_all(&frame::frame_to_bytes(&v1::ServerFrame::from(answer))).unwrap();
        }
    }
}

#[test]
fn the_second_ctrl_c_ends_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("tcp://{}", listener.local_addr().unwrap());
    let (arrived, has_arrived) = mpsc::sync_channel(1);
    thread::spawn(move || never_acknowledges(listener, arrived));
    let mut pipe = Running::run(&["--server", &url, "--token", "t", "pipe", "@bob"]);
    pipe.child.stdin.as_mut().unwrap().write_all(b"one\n").unwrap();
    has_arrived.recv().expect("the message is on its way, and stays there");
    // Two that follow too closely are one.
    while pipe.child.try_wait().unwrap().is_none() {
        pipe.signal("INT");
        thread::sleep(LOOK_INTERVAL);
    }
    assert_eq!(pipe.child.wait().unwrap().code(), Some(130), "ended by the signal, not done");
}

#[test]
fn logs_have_colour_on_a_terminal_unless_no_color_is_set() {
    let folder = tempfile::tempdir().unwrap();
    for (variables, expected) in [(&[][..], true), (&[("NO_COLOR", "1")], false)] {
        let (mut terminal, slave) = pseudo_terminal();
        let data = folder.path().join(format!("data-{expected}"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_imd"));
        command.args(["up", "--data", data.to_str().unwrap()]).args(ANY).env_clear().envs(variables.iter().copied());
        let mut child = command.stdout(Stdio::null()).stderr(slave).spawn().unwrap();
        // The program's end is the child's alone now: once that is over, reading fails.
        drop(command);
        let (mut said, mut bytes, mut is_told) = (String::new(), [0; 4096], false);
        while let Ok(read) = terminal.read(&mut bytes) {
            said.push_str(&String::from_utf8_lossy(&bytes[..read]));
            if !is_told && said.contains("ready") {
                is_told = true;
                signal(child.id(), "TERM");
            }
        }
        assert_eq!(child.wait().unwrap().code(), Some(0), "{said}");
        assert_eq!(said.contains("\x1b["), expected, "{variables:?}: {said:?}");
    }
}
