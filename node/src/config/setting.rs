//! One setting: its key, the reason for its default, and a typed place for its value with the range it must keep.

use std::{fmt, net::SocketAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

use super::quantity::{format_duration, format_size, parse_duration, parse_size};

/// A setting of a configuration that is being read, changed or printed.
pub struct Setting<'a> {
    /// As in the file; a dot divides table and key.
    pub key: &'static str,
    /// What it does and the arithmetic behind its default.
    pub comment: &'static str,
    pub slot: Slot<'a>,
}

/// A word out of a fixed list.
pub trait Choice {
    /// All words.
    fn words(&self) -> &'static [&'static str];
    /// The word chosen.
    fn word(&self) -> &'static str;
    /// Chooses a word; `false` if it is not in the list.
    fn choose(&mut self, word: &str) -> bool;
}

/// Where a value lives and what it may be.
pub enum Slot<'a> {
    Path(&'a mut PathBuf),
    /// `None` is written as an empty text.
    File(&'a mut Option<PathBuf>),
    Flag(&'a mut bool),
    /// `None` is written `off`.
    Listen(&'a mut Option<SocketAddr>),
    Duration(&'a mut Duration, RangeInclusive<Duration>),
    Bytes(&'a mut usize, RangeInclusive<usize>),
    Count(&'a mut usize, RangeInclusive<usize>),
    /// A number of events in a second.
    Rate(&'a mut u32, RangeInclusive<u32>),
    Choice(&'a mut dyn Choice),
    /// A text, with what it must be and the check of that.
    Text(&'a mut String, &'static str, fn(&str) -> bool),
}

/// How a default or a range is shown. Also the form in which it is parsed.
impl fmt::Display for Slot<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Slot::Path(path) => write!(f, "{}", path.display()),
            Slot::File(path) => path.iter().try_for_each(|path| write!(f, "{}", path.display())),
            Slot::Flag(flag) => write!(f, "{flag}"),
            Slot::Listen(None) => f.write_str("off"),
            Slot::Listen(Some(address)) => write!(f, "{address}"),
            Slot::Duration(duration, _) => f.write_str(&format_duration(**duration)),
            Slot::Bytes(bytes, _) => f.write_str(&format_size(**bytes as u64)),
            Slot::Count(count, _) => write!(f, "{count}"),
            Slot::Rate(rate, _) => write!(f, "{rate}"),
            Slot::Choice(choice) => f.write_str(choice.word()),
            Slot::Text(text, ..) => f.write_str(text),
        }
    }
}

impl Setting<'_> {
    /// The name of the environment variable that sets it.
    pub fn variable(&self) -> String {
        format!("IM_{}", self.key.replace('.', "_").to_uppercase())
    }

    /// The value as it stands in a TOML file.
    pub fn toml_value(&self) -> String {
        match &self.slot {
            Slot::Count(..) | Slot::Rate(..) | Slot::Flag(_) => self.slot.to_string(),
            slot => toml::Value::String(slot.to_string()).to_string(),
        }
    }

    /// What values are allowed.
    pub fn expected(&self) -> String {
        match &self.slot {
            Slot::Path(_) => "a path".to_owned(),
            Slot::File(_) => "a path, or nothing".to_owned(),
            Slot::Flag(_) => "true or false".to_owned(),
            Slot::Listen(_) => {
                "an address HOST:PORT with a numeric host or localhost (port 0: any free one), or off".to_owned()
            }
            Slot::Duration(_, range) => format!(
                "a duration from {} to {} such as 500ms, 30s, 5m, 12h or 30d",
                format_duration(*range.start()),
                format_duration(*range.end())
            ),
            Slot::Bytes(_, range) => format!(
                "a size from {} to {} such as 512B, 64KiB or 1MiB",
                format_size(*range.start() as u64),
                format_size(*range.end() as u64)
            ),
            Slot::Count(_, range) => format!("a whole number from {} to {}", range.start(), range.end()),
            Slot::Rate(_, range) => format!("a whole number from {} to {}", range.start(), range.end()),
            Slot::Choice(choice) => format!("one of {}", choice.words().join(", ")),
            Slot::Text(_, expected, _) => (*expected).to_owned(),
        }
    }

    /// Sets the value from a text; `false` if it is none of the allowed values, and then nothing is changed.
    pub fn set(&mut self, text: &str) -> bool {
        match &mut self.slot {
            Slot::Path(path) => put(*path, Some(PathBuf::from(text)).filter(|_| !text.is_empty())),
            Slot::File(path) => put(*path, Some(Some(PathBuf::from(text)).filter(|path| !path.as_os_str().is_empty()))),
            Slot::Flag(flag) => put(*flag, text.parse().ok()),
            Slot::Listen(address) if text == "off" => put(*address, Some(None)),
            Slot::Listen(address) => put(*address, parse_address(text).map(Some)),
            Slot::Duration(duration, range) => put(*duration, parse_duration(text).filter(|d| range.contains(d))),
            Slot::Bytes(bytes, range) => {
                let parsed = parse_size(text).and_then(|size| usize::try_from(size).ok());
                put(*bytes, parsed.filter(|size| range.contains(size)))
            }
            Slot::Count(count, range) => put(*count, text.parse().ok().filter(|count| range.contains(count))),
            Slot::Rate(rate, range) => put(*rate, text.parse().ok().filter(|rate| range.contains(rate))),
            Slot::Choice(choice) => choice.choose(text),
            Slot::Text(value, _, check) => put(*value, Some(text.to_owned()).filter(|text| check(text))),
        }
    }
}

fn put<T>(place: &mut T, value: Option<T>) -> bool {
    value.map(|value| *place = value).is_some()
}

/// No name is looked up: the server starts without a network.
fn parse_address(text: &str) -> Option<SocketAddr> {
    match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}").parse().ok(),
        None => text.parse().ok(),
    }
}
