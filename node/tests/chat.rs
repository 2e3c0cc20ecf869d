//! `im chat` as people have it: a process on a pseudo-terminal, against a server that is a process, too.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    path::Path,
    process::{Child, Command},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{Mode, OFlags},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize},
};

use crate::server::{ANY, Server};

/// Far longer than anything takes; only a fault waits so long.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// One argument a line.
const ARGUMENTS: &str = "CHAT_TEST_ARGUMENTS";

/// The program `im`, which is not of this package: the tests start this test as a process of its own.
#[test]
#[ignore = "a process that the other tests start"]
#[allow(clippy::disallowed_methods, reason = "this process is im, its exit code is im's")]
fn im_as_a_process() {
    let Ok(arguments) = std::env::var(ARGUMENTS) else { return };
    let code = im_client::terminal::main_with(std::iter::once("im").chain(arguments.lines()));
    let code = if code == std::process::ExitCode::SUCCESS { 0 } else { 1 };
    std::process::exit(code);
}

/// A person at a terminal.
struct Person {
    child: Child,
    terminal: File,
    screen: Arc<Mutex<vt100::Parser>>,
}

fn size(columns: u16, lines: u16) -> Winsize {
    Winsize { ws_col: columns, ws_row: lines, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Person {
    fn chats(data: &Path, user: &str, target: &str) -> Self {
        let arguments = ["--as", user, "--data", data.to_str().unwrap(), "chat", target].join("\n");
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        tcsetwinsize(&master, size(80, 24)).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave: File =
            rustix::fs::open(name.as_c_str(), OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap().into();
        let child = Command::new("setsid")
            .arg("--ctty")
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "chat::im_as_a_process", "--ignored", "--nocapture"])
            .env_clear()
            .env("TERM", "xterm-256color")
            .env("TZ", "UTC")
            .env(ARGUMENTS, arguments)
            .stdin(slave.try_clone().unwrap())
            .stdout(slave.try_clone().unwrap())
            .stderr(slave)
            .spawn()
            .expect("setsid of util-linux runs");
        let terminal = File::from(master);
        let screen = Arc::new(Mutex::new(vt100::Parser::new(24, 80, 0)));
        let (mut output, shown) = (terminal.try_clone().unwrap(), screen.clone());
        // Ends with the process: then reading fails.
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count) = output.read(&mut bytes) {
                shown.lock().unwrap().process(&bytes[..count]);
            }
        });
        let mut person = Self { child, terminal, screen };
        person.sees("● online");
        person
    }

    fn types(&mut self, keys: &str) {
        self.terminal.write_all(keys.as_bytes()).unwrap();
    }

    fn screen(&self) -> String {
        self.screen.lock().unwrap().screen().contents()
    }

    /// Waits for the screen.
    fn sees_that(&mut self, what: &str, is_so: impl Fn(&str) -> bool) {
        let until = now() + PATIENCE;
        while !is_so(&self.screen()) {
            if let Some(ended) = self.child.try_wait().unwrap() {
                panic!("the chat ended ({ended}) before {what}:\n{}", self.screen());
            }
            assert!(now() < until, "not seen: {what}. The screen:\n{}", self.screen());
            thread::sleep(LOOK_INTERVAL);
        }
    }

    fn sees(&mut self, text: &str) {
        self.sees_that(text, |screen| screen.contains(text));
    }

    fn sees_no_more(&mut self, text: &str) {
        self.sees_that(&format!("no {text}"), |screen| !screen.contains(text));
    }

    fn resizes(&mut self, columns: u16, lines: u16) {
        self.screen.lock().unwrap().screen_mut().set_size(lines, columns);
        tcsetwinsize(&self.terminal, size(columns, lines)).unwrap();
    }

    /// Waits for the end: with which code, and the terminal as the shell needs it.
    fn ends(&mut self, code: i32) {
        let ended = self.child.wait().unwrap();
        assert_eq!(ended.code(), Some(code), "{}", self.screen());
        let until = now() + PATIENCE;
        // Its last words are still on their way through the terminal.
        while self.screen.lock().unwrap().screen().alternate_screen() {
            assert!(now() < until, "the alternate screen is left");
            thread::sleep(LOOK_INTERVAL);
        }
        let screen = self.screen.lock().unwrap();
        assert!(!screen.screen().hide_cursor() && !screen.screen().bracketed_paste());
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.terminal).unwrap().local_modes.contains(LocalModes::ICANON | LocalModes::ECHO)
    }
}

impl Drop for Person {
    fn drop(&mut self) {
        // It may have ended as the test wanted it to.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[allow(clippy::disallowed_methods, reason = "a patience of the test, in real time")]
fn now() -> Instant {
    Instant::now()
}

/// The line with a text, in the column of the messages.
fn line<'a>(screen: &'a str, text: &str) -> Option<&'a str> {
    screen.lines().filter_map(|line| line.split_once('│')).map(|(_, right)| right).find(|line| line.contains(text))
}

#[test]
fn two_people_chat_and_go_on_after_the_server_was_killed() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let server = Server::start(&data, &ANY);
    let mut alice = Person::chats(&data, "alice", "@bob");
    let mut bob = Person::chats(&data, "bob", "@alice");
    alice.sees("write the first message");

    // Over it goes, wide characters and clusters included, and the sender sees that it is stored.
    alice.types("hello 你好 e\u{301}! 👋\r");
    bob.sees_that("the message", |screen| line(screen, "hello 你好 e\u{301}! 👋").is_some());
    alice.sees_that("the mark", |screen| line(screen, "hello").is_some_and(|line| line.contains('✓')));
    alice.sees_that("that it was read", |screen| line(screen, "hello").is_some_and(|line| line.contains("✓✓ read")));
    // A paste keeps its lines and is not sent by them; whoever gets it sees that something is being written.
    bob.types("\x1b[200~one\ntwo\x1b[201~");
    bob.sees("> one");
    alice.sees("bob is typing");
    bob.types("\r");
    alice.sees_that("both lines", |screen| line(screen, "one").is_some() && line(screen, "two").is_some());
    alice.sees_no_more("is typing");

    // What is written elsewhere counts until it was looked at.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let carol = server.client("carol").await;
        let bob = im_client::Target::peer("bob").unwrap();
        carol.send(bob, im_proto::body::text("psst")).await.unwrap();
        carol.close().await;
    });
    bob.sees("1 unread");
    bob.sees_that("the row", |screen| screen.lines().any(|line| line.contains("@carol") && line.contains("(1)")));
    bob.types("\x15");
    bob.sees_that("the message of carol", |screen| line(screen, "psst").is_some());
    bob.sees_no_more("unread");

    // A smaller window has no list, a larger one uses its room.
    alice.resizes(44, 12);
    alice.sees_no_more("conversations");
    alice.sees("> ");
    alice.resizes(120, 40);
    alice.sees("conversations");
    alice.sees_that("the help at the bottom", |screen| {
        screen.lines().nth(39).is_some_and(|line| line.contains("Enter send"))
    });

    // The server dies; what is written meanwhile waits, and arrives once it is back.
    drop(server);
    alice.sees("◌ reconnecting");
    alice.types("while it was away\r");
    alice.sees_that("it waits", |screen| line(screen, "while it").is_some_and(|line| line.contains('…')));
    let _server = Server::start(&data, &ANY);
    alice.sees("1× again");
    alice.sees_that("it is stored", |screen| line(screen, "while it").is_some_and(|line| line.contains('✓')));
    bob.types("\x0f@alice\r");
    bob.sees_that("it arrived", |screen| line(screen, "while it was away").is_some());

    assert!(alice.is_raw());
    alice.types("\x03");
    alice.ends(0);
    bob.types("\x03");
    bob.ends(0);
}

#[test]
fn a_signal_ends_the_chat_and_gives_the_terminal_back() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    for signal in ["TERM", "HUP", "INT"] {
        let mut alice = Person::chats(&server.data, "alice", "me");
        let id = alice.child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &id]).status().unwrap().success());
        alice.ends(0);
    }
}
