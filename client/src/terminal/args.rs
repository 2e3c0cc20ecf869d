//! The command line of `im`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum, builder::NonEmptyStringValueParser};
use im_proto::{ConversationId, DeviceId, UserId, id::IdError};

use crate::config::{Endpoint, Target, Transport};

const EXAMPLES: &str = "\
Examples, with a server started by `imd up`:
  im --as alice send @bob Hello, Bob
  im --as bob tail @alice --from 1
  im --as alice chat @bob
  im --as alice pipe @bob < book.txt
  im --as alice group create friends @bob @carol
  im --as bob channel subscribe 00112233445566778899aabbccddeeff

A TARGET is @user (the direct conversation with that user), me (your own log), or a conversation id.
Exit codes: 0 done, 1 the operation failed, 2 wrong usage or environment.";

/// A terminal client for instant messages.
#[derive(Debug, Parser)]
#[command(name = "im", version, after_help = EXAMPLES)]
pub(super) struct Arguments {
    #[command(flatten)]
    pub(super) connection: Connection,

    /// How results are printed: plain text, or one JSON object a line.
    #[arg(long, global = true, value_enum, default_value_t = Format::Plain)]
    pub(super) format: Format,

    #[command(subcommand)]
    pub(super) command: Command,
}

/// How to reach the server, and as whom.
#[derive(Debug, Args)]
#[command(next_help_heading = "Connection")]
pub(super) struct Connection {
    /// tcp://host:port, tls://host:port or quic://host:port; several, by comma or by repeating it, for fail-over [env: IM_SERVER].
    #[arg(long, global = true, value_name = "URL", value_delimiter = ',')]
    pub(super) server: Vec<Endpoint>,

    /// The token [env: IM_TOKEN].
    #[arg(long, global = true, value_parser = NonEmptyStringValueParser::new())]
    pub(super) token: Option<String>,

    /// A file that holds the token; it is read again for each connection.
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) token_file: Option<PathBuf>,

    /// Trust only the certificates that this PEM file signs, not those of the system [env: IM_CA].
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) ca: Option<PathBuf>,

    /// For development: take address, CA and a fresh token for this user from the data directory of a local server. Without DEVICE,
    /// commands that run one after the other are one device, and those that run at the same time are several.
    #[arg(long = "as", global = true, value_name = "USER[/DEVICE]")]
    pub(super) user: Option<UserAndDevice>,

    /// The data directory for --as.
    #[arg(long, global = true, value_name = "DIR", default_value = "./data")]
    pub(super) data: PathBuf,

    /// The transport for --as: tcp, tls or quic.
    #[arg(long, global = true, default_value = "tcp")]
    pub(super) transport: Transport,

    /// How long to wait for the first connection and for an answer.
    #[arg(long, global = true, value_name = "SECONDS", default_value = "10", value_parser = parse_seconds)]
    timeout: Duration,
}

impl Connection {
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }
}

/// `USER` or `USER/DEVICE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct UserAndDevice {
    pub(super) user: UserId,
    pub(super) device: Option<DeviceId>,
}

impl std::str::FromStr for UserAndDevice {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let (user, device) = match text.split_once('/') {
            Some((user, device)) => (user, Some(device.parse()?)),
            None => (text, None),
        };
        Ok(Self { user: parse_user(user)?, device })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// The text of a message, control characters as spaces, and a newline.
    Plain,
    /// One object a line.
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Switch {
    On,
    Off,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Send a text and print its seq once it is durable.
    #[command(after_help = "Example: im --as alice send @bob Hello, Bob")]
    Send {
        /// @user, me, or a conversation id.
        #[arg(value_parser = parse_target)]
        target: Target,
        /// Words, joined by spaces.
        #[arg(required = true)]
        text: Vec<String>,
    },
    /// Send each line of standard input as one message, in order; survives restarts of the server.
    #[command(after_help = "Example: im --as alice pipe @bob < book.txt")]
    Pipe {
        /// @user, me, or a conversation id.
        #[arg(value_parser = parse_target)]
        target: Target,
    },
    /// Print messages as they come, each once and in order; survives restarts of the server.
    #[command(after_help = "Example: im --as bob tail @alice --from 1 --count 10")]
    Tail {
        /// @user, me, or a conversation id.
        #[arg(value_parser = parse_target)]
        target: Target,
        /// Begin with this seq instead of what comes from now on.
        #[arg(long, value_name = "SEQ", value_parser = parse_seq)]
        from: Option<u64>,
        /// End after so many messages.
        #[arg(long, value_name = "N", value_parser = parse_count)]
        count: Option<u64>,
    },
    /// Print stored messages. Without --from, --limit N prints the newest N.
    #[command(after_help = "Example: im --as bob history @alice --from 1 --to 100")]
    History {
        /// @user, me, or a conversation id.
        #[arg(value_parser = parse_target)]
        target: Target,
        /// The first seq wanted.
        #[arg(long, value_name = "SEQ", value_parser = parse_seq)]
        from: Option<u64>,
        /// The last seq wanted.
        #[arg(long, value_name = "SEQ", value_parser = parse_seq)]
        to: Option<u64>,
        /// At most so many.
        #[arg(long, value_name = "N", value_parser = parse_count)]
        limit: Option<u64>,
    },
    /// Print your conversations: id, kind, name, head, unread, unread mentions, separated by tabs.
    #[command(after_help = "Example: im --as alice list --format json")]
    List,
    /// Create groups and change who is in them.
    #[command(subcommand, after_help = "Example: im --as alice group create friends @bob @carol")]
    Group(Group),
    /// Create channels, into which few write and which anybody may read; subscribe to them. `im group` changes who may write.
    #[command(subcommand, after_help = "Example: im --as alice channel create news @bob")]
    Channel(Channel),
    /// Print who is there: user, online, offline or unknown, when last seen, and of yourself whether you are invisible, separated by tabs.
    #[command(after_help = "Example: im --as alice presence @bob @carol --watch")]
    Presence {
        /// @user …, who share a conversation with you.
        #[arg(required = true, value_parser = parse_user)]
        users: Vec<UserId>,
        /// Go on with a line for each who comes or goes.
        #[arg(long)]
        watch: bool,
    },
    /// Set whether others see you come and go, on all your devices and until it is set again.
    #[command(after_help = "Example: im --as alice invisible on")]
    Invisible {
        /// Whether you are.
        #[arg(value_enum)]
        switch: Switch,
    },
    /// Your devices: which there are, and the end of the session of one of them.
    #[command(subcommand, after_help = "Example: im --as alice device list")]
    Device(Device),
    /// Chat on the full screen: your conversations, history, who is typing, what was delivered and read.
    #[command(
        after_help = "Example: im --as alice chat @bob\n\nF1 in it names the keys; Ctrl-C leaves it. Messages on their \
                      way have two seconds then, unless it is pressed again; exit code 1 if some were not sent."
    )]
    Chat {
        /// @user, me, or a conversation id to begin with.
        #[arg(value_parser = parse_target)]
        target: Option<Target>,
    },
    /// Print the endpoints that the cluster offers to you.
    #[command(after_help = "Example: im --as alice locate")]
    Locate,
    /// Print what makes a shell complete the commands and options of im.
    #[command(after_help = "Example: im completions fish > ~/.config/fish/completions/im.fish")]
    Completions { shell: clap_complete::Shell },
    /// Write a manual page for each command.
    #[command(after_help = "Example: im man --out /usr/local/share/man/man1")]
    Man {
        /// The directory, which is created if it does not exist.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum Group {
    /// Create a group with you and others, and print its id.
    #[command(after_help = "Example: im --as alice group create friends @bob @carol")]
    Create {
        /// The name, for people.
        name: String,
        /// @user …
        #[arg(value_parser = parse_user)]
        members: Vec<UserId>,
    },
    /// Bring others into a group, and print the seq of that entry, which names nobody if all were in already.
    #[command(after_help = "Example: im --as alice group invite 00112233445566778899aabbccddeeff @dave")]
    Invite {
        /// The conversation id of the group.
        #[arg(value_parser = parse_group)]
        id: ConversationId,
        /// @user …
        #[arg(required = true, value_parser = parse_user)]
        members: Vec<UserId>,
    },
    /// Leave a group, and print the seq of that entry.
    #[command(after_help = "Example: im --as bob group leave 00112233445566778899aabbccddeeff")]
    Leave {
        /// The conversation id of the group.
        #[arg(value_parser = parse_group)]
        id: ConversationId,
    },
    /// Print who is in a group: user and role, separated by a tab.
    #[command(after_help = "Example: im --as alice group members 00112233445566778899aabbccddeeff")]
    Members {
        /// The conversation id of the group.
        #[arg(value_parser = parse_group)]
        id: ConversationId,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum Channel {
    /// Create a channel into which you and others may write, and print its id.
    #[command(after_help = "Example: im --as alice channel create news @bob")]
    Create {
        /// The name, for people.
        name: String,
        /// @user … who may write besides you.
        #[arg(value_parser = parse_user)]
        writers: Vec<UserId>,
    },
    /// Put a channel into your conversations; its messages come live from then on. Prints its id.
    #[command(after_help = "Example: im --as carol channel subscribe 00112233445566778899aabbccddeeff")]
    Subscribe {
        /// The conversation id of the channel.
        #[arg(value_parser = parse_group)]
        id: ConversationId,
    },
    /// Take a channel out of your conversations. Prints its id. Whoever may write leaves with `im group leave`.
    #[command(after_help = "Example: im --as carol channel unsubscribe 00112233445566778899aabbccddeeff")]
    Unsubscribe {
        /// The conversation id of the channel.
        #[arg(value_parser = parse_group)]
        id: ConversationId,
    },
    /// Send a text to all who read a channel, and print its seq once it is durable: `im send` with its id.
    #[command(after_help = "Example: im --as alice channel post 00112233445566778899aabbccddeeff Hello, all")]
    Post {
        /// The conversation id of the channel.
        #[arg(value_parser = parse_group)]
        id: ConversationId,
        /// Words, joined by spaces.
        #[arg(required = true)]
        text: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum Device {
    /// Print your devices: id, platform, client, this, connected or away, when it was last seen, separated by tabs.
    #[command(after_help = "Example: im --as alice device list --format json")]
    List,
    /// End the session of one of your devices, wherever it is connected. Its token still holds: whoever uses it again is let in.
    #[command(after_help = "Example: im --as alice device kick phone")]
    Kick {
        /// The device id, as `im device list` prints it.
        #[arg(value_name = "DEVICE")]
        id: DeviceId,
    },
}

fn parse_target(text: &str) -> Result<Target, String> {
    text.parse::<Target>().map_err(|error| match text.strip_prefix('@') {
        Some(_) => format!("{error}; expected @ and a user id of 1 to 64 bytes"),
        None => {
            let hint = if UserId::parse(text).is_ok() { format!("; the user is @{text}") } else { String::new() };
            format!("expected @user, me, or a conversation id of 32 hexadecimal digits{hint}")
        }
    })
}

fn parse_group(text: &str) -> Result<ConversationId, String> {
    text.parse().map_err(|_| {
        "expected a conversation id of 32 hexadecimal digits, as `im list` and `im group create` print it".to_owned()
    })
}

/// `@user`, the @ optional.
fn parse_user(text: &str) -> Result<UserId, IdError> {
    UserId::parse(text.strip_prefix('@').unwrap_or(text))
}

fn parse_seq(text: &str) -> Result<u64, String> {
    text.parse().ok().filter(|seq| *seq > 0).ok_or_else(|| "expected a seq: a whole number from 1 on".to_owned())
}

fn parse_count(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| "expected a whole number from 0 on".to_owned())
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let range = Duration::from_millis(1)..=Duration::from_secs(24 * 3600);
    let seconds = text.trim_end_matches('s').parse().ok();
    let duration = seconds.and_then(|seconds: f64| Duration::try_from_secs_f64(seconds).ok());
    let expected = || "expected seconds from 0.001 to 86400, such as 10 or 0.5".to_owned();
    duration.filter(|duration| range.contains(duration)).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn connection_options_stand_before_or_after_the_command() {
        for line in ["im --as alice/phone send @bob hi there", "im send @bob hi there --as alice/phone"] {
            let arguments = Arguments::try_parse_from(line.split(' ')).unwrap();
            let user = arguments.connection.user.unwrap();
            assert_eq!((user.user.as_str(), user.device.unwrap().as_str()), ("alice", "phone"));
            let Command::Send { target, text } = arguments.command else { panic!("not a send") };
            assert_eq!((target, text.join(" ")), (Target::peer("bob").unwrap(), "hi there".to_owned()));
        }
    }

    #[test]
    fn wrong_usage_is_exit_code_2_and_help_is_0() {
        let code = |line: &str| Arguments::try_parse_from(line.split(' ')).unwrap_err().exit_code();
        for line in [
            "im",
            "im send @bob",
            "im send bob hi",
            "im tail @bob --from 0",
            "im --server nowhere send @bob hi",
            "im --server tcp://host:0 send @bob hi",
            "im --timeout -1 list",
            "im --transport carrier-pigeon list",
            "im group invite 00 @bob",
        ] {
            assert_eq!(code(line), 2, "{line}");
        }
        assert_eq!(code("im --help"), 0);
        assert_eq!(code("im tail --help"), 0);
    }

    fn without_example(command: &clap::Command, found: &mut Vec<String>) {
        if !command.get_after_help().is_some_and(|help| help.to_string().contains("Example")) {
            found.push(command.get_name().to_owned());
        }
        command.get_subcommands().for_each(|inner| without_example(inner, found));
    }

    #[test]
    fn every_command_has_an_example_in_its_help() {
        let mut found = Vec::new();
        without_example(&<Arguments as clap::CommandFactory>::command(), &mut found);
        assert!(found.is_empty(), "{found:?}");
    }

    #[test]
    fn what_is_wrong_names_the_place_the_value_and_what_is_allowed() {
        for (line, words) in [
            (
                "im send bob hi",
                "'bob' for '<TARGET>': expected @user, me, or a conversation id of 32 hexadecimal digits; the user is @bob",
            ),
            ("im send @ hi", "'@' for '<TARGET>': an id must not be empty; expected @ and a user id"),
            ("im chat x/y", "'x/y' for '[TARGET]': expected @user, me"),
            ("im tail @bob --from 0", "'0' for '--from <SEQ>': expected a seq: a whole number from 1 on"),
            ("im tail @bob --count many", "'many' for '--count <N>': expected a whole number"),
            ("im history me --limit -", "'-' for '--limit <N>': expected a whole number"),
            ("im list --timeout soon", "'soon' for '--timeout <SECONDS>': expected seconds from 0.001 to 86400"),
            ("im list --timeout 90000", "'90000' for '--timeout <SECONDS>': expected seconds from 0.001 to 86400"),
            (
                "im list --transport pigeon",
                "'pigeon' for '--transport <TRANSPORT>': \"pigeon\" is no transport; write tcp, tls or quic",
            ),
            (
                "im list --server nowhere",
                "'nowhere' for '--server <URL>': \"nowhere\" is no server address; write tcp://host:port",
            ),
            ("im list --as a/", "'a/' for '--as <USER[/DEVICE]>': an id must not be empty"),
            ("im list --format xml", "'xml' for '--format <FORMAT>'\n  [possible values: plain, json]"),
            ("im group leave 12", "'12' for '<ID>': expected a conversation id of 32 hexadecimal digits, as `im list`"),
            ("im device kick", "<DEVICE>"),
            ("im device kick a\tb", "'a\tb' for '<DEVICE>': an id must not hold control characters or white space"),
            ("im completions dos", "'dos' for '<SHELL>'\n  [possible values: bash"),
            ("im man", "--out <DIR>"),
            ("im send @bob", "<TEXT>..."),
        ] {
            let said = Arguments::try_parse_from(line.split(' ')).unwrap_err().to_string();
            assert!(said.contains(words), "{line}: {said}");
        }
    }

    #[test]
    fn several_servers_by_comma_or_repeated() {
        let line = "im --server tcp://a:1,tls://b:2 list --server quic://c:3";
        let arguments = Arguments::try_parse_from(line.split(' ')).unwrap();
        // The later place wins as a whole; one place takes many.
        assert!(!arguments.connection.server.is_empty());
        let line = "im --server tcp://a:1,tls://b:2 --server quic://c:3 list";
        let arguments = Arguments::try_parse_from(line.split(' ')).unwrap();
        let servers: Vec<String> = arguments.connection.server.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["tcp://a:1", "tls://b:2", "quic://c:3"]);
    }
}
