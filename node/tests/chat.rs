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
pub const ARGUMENTS: &str = "CHAT_TEST_ARGUMENTS";

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

/// The end of whoever looks and types, and the end of the program.
pub fn pseudo_terminal() -> (File, File) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let slave = rustix::fs::open(name.as_c_str(), OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    (master.into(), slave.into())
}

impl Person {
    fn chats(data: &Path, user: &str, target: &str) -> Self {
        Self::chats_with(data, user, target, &[])
    }

    fn chats_with(data: &Path, user: &str, target: &str, variables: &[(&str, &str)]) -> Self {
        let arguments = ["--as", user, "--data", data.to_str().unwrap(), "chat", target].join("\n");
        let (terminal, slave) = pseudo_terminal();
        tcsetwinsize(&terminal, size(80, 24)).unwrap();
        let child = Command::new("setsid")
            .arg("--ctty")
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "chat::im_as_a_process", "--ignored", "--nocapture"])
            .env_clear()
            .env("TERM", "xterm-256color")
            .env("TZ", "UTC")
            .env(ARGUMENTS, arguments)
            .envs(variables.iter().copied())
            .stdin(slave.try_clone().unwrap())
            .stdout(slave.try_clone().unwrap())
            .stderr(slave)
            .spawn()
            .expect("setsid of util-linux runs");
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

    /// Whether any character on the screen has a colour of its own.
    fn is_coloured(&self) -> bool {
        let parser = self.screen.lock().unwrap();
        let screen = parser.screen();
        let cells = (0..24).flat_map(|line| (0..80).map(move |column| (line, column)));
        let mut colours = cells.filter_map(|(line, column)| screen.cell(line, column).map(|cell| cell.fgcolor()));
        colours.any(|colour| colour != vt100::Color::Default)
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

const PAGE_UP: &str = "\x1b[5~";
const REPLY: &str = "\x12";
const NEXT_UNREAD: &str = "\x15";
const OPEN: &str = "\x0f";

#[test]
fn page_up_goes_through_600_messages_to_the_first_without_a_gap() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let bob = server.client("bob").await;
        for number in 1..=600 {
            let body = im_proto::body::text(format!("message {number:03}."));
            bob.send(im_client::Target::peer("alice").unwrap(), body).await.unwrap();
        }
        bob.close().await;
    });
    let numbers = |screen: &str| -> Vec<u32> {
        let lines = screen.lines().filter_map(|line| line.split_once("│  message ")?.1.split_once('.'));
        lines.map(|(number, _)| number.parse().unwrap()).collect()
    };
    let mut alice = Person::chats(&server.data, "alice", "@bob");
    // In the log: the list of conversations shows it, too, and may be there earlier.
    alice.sees_that("the newest page", |screen| numbers(screen).last() == Some(&600));
    let until = now() + PATIENCE;
    loop {
        let screen = alice.screen();
        let shown = numbers(&screen);
        assert!(shown.windows(2).all(|pair| pair[1] == pair[0] + 1), "{shown:?}");
        if shown.first() == Some(&1) {
            break;
        }
        assert!(now() < until, "the first is not seen. The screen:\n{screen}");
        alice.types(PAGE_UP);
        thread::sleep(LOOK_INTERVAL);
    }
    alice.sees("more below");
    alice.types("\x1b");
    alice.sees("message 600.");
}

#[test]
fn a_mention_in_a_group_is_counted_apart_and_a_reply_shows_what_it_answers() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let group = tokio::runtime::Runtime::new().unwrap().block_on(async {
        let carol = server.client("carol").await;
        let members = ["alice", "bob"].map(|name| im_proto::UserId::parse(name).unwrap());
        let group = carol.create_group("trip", &members).await.unwrap();
        carol.close().await;
        group
    });
    let mut alice = Person::chats(&server.data, "alice", &group.to_string());
    let mut bob = Person::chats(&server.data, "bob", "me");
    alice.sees("3 members");
    bob.sees("#trip");
    let is_mentioned = |screen: &str| screen.lines().any(|line| line.contains("#trip") && line.contains("@1"));
    alice.types("nothing for anybody\r");
    bob.sees("alice: nothing");
    assert!(!is_mentioned(&bob.screen()), "{}", bob.screen());
    alice.types("are you there, @bob?\r");
    bob.sees_that("that somebody means him", is_mentioned);
    let header = |screen: &str| screen.lines().next().unwrap_or_default().to_owned();
    bob.sees_that("the count at the top", |screen| header(screen).contains("@1"));

    bob.types(NEXT_UNREAD);
    bob.sees_that("the message", |screen| line(screen, "are you there, @bob?").is_some());
    bob.sees_that("that it is read", |screen| !is_mentioned(screen) && !header(screen).contains("@1"));
    // The newest is chosen first.
    bob.types(REPLY);
    bob.sees("reply to it");
    bob.types("\r");
    bob.sees_that("the prompt of a reply", |screen| line(screen, "↳ ").is_some());
    bob.types("where else\r");
    let answers = |quote: &str| {
        let quote = quote.to_owned();
        move |screen: &str| {
            let lines: Vec<&str> = screen.lines().collect();
            lines.windows(2).any(|pair| pair[0].contains(&quote) && pair[1].contains("where else"))
        }
    };
    bob.sees_that("the quote above it", answers("↳ alice: are you there, @bob?"));
    alice.sees_that("the quote above it", answers("↳ you: are you there, @bob?"));
}

#[test]
fn a_message_is_marked_as_delivered_then_as_read() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let mut alice = Person::chats(&server.data, "alice", "@bob");
    let mut bob = Person::chats(&server.data, "bob", "me");
    let mark = |screen: &str| {
        line(screen, "is anybody there").map(|line| line.replace("is anybody there", "").trim().to_owned())
    };
    // Bob is there and looks at something else: he has it, and has not read it.
    alice.types("is anybody there\r");
    bob.sees("(1)");
    alice.sees_that("that he has it", |screen| mark(screen).as_deref() == Some("✓✓"));
    bob.types(OPEN);
    bob.types("@alice\r");
    bob.sees_that("the message", |screen| line(screen, "is anybody there").is_some());
    alice.sees_that("that he has read it", |screen| mark(screen).as_deref() == Some("✓✓ read"));
    bob.types("ye");
    alice.sees("bob is typing");
    bob.types("s\r");
    alice.sees_that("the answer", |screen| line(screen, "yes").is_some());
    alice.sees_no_more("is typing");
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

#[test]
fn a_chat_has_colours_unless_no_color_is_set() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let _server = Server::start(&data, &ANY);
    for (variables, expected) in [(&[][..], true), (&[("NO_COLOR", "1")], false)] {
        let mut person = Person::chats_with(&data, "alice", "@bob", variables);
        person.types("hello\r");
        person
            .sees_that("the message and what became of it", |screen| screen.contains("hello") && screen.contains("✓"));
        assert_eq!(person.is_coloured(), expected, "{variables:?}:\n{}", person.screen());
        person.types("\x03");
        person.ends(0);
    }
}
