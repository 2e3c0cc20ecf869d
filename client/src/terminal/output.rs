//! Results on standard output: plain, or one JSON object a line. A closed pipe ends the program quietly.
//!
//! What others wrote is printed plain without control characters, whichever command prints it: a terminal would obey them.

use std::{
    borrow::Cow,
    io::{self, BufWriter, Stdout, Write},
};

use im_proto::{Timestamp, body, v1};
use serde::Serialize;

use crate::event::Entry;

use super::{args::Format, failure::Failure};

/// Bytes gathered before they are written, unless the writer has nothing more to say for now.
const BUFFER_BYTES: usize = 64 * 1024;

pub(super) struct Output<W: Write = Stdout> {
    writer: BufWriter<W>,
    format: Format,
}

/// An entry in JSON; the names are part of the command line's contract.
#[derive(Serialize)]
struct EntryJson<'a> {
    conversation: String,
    seq: u64,
    sender: &'a str,
    sent_at: String,
    /// As text if it is printable, else in hexadecimal.
    client_message_id: String,
    r#type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
}

impl Output {
    pub(super) fn new(format: Format) -> Self {
        Self::to(io::stdout(), format)
    }
}

impl<W: Write> Output<W> {
    fn to(writer: W, format: Format) -> Self {
        Self { writer: BufWriter::with_capacity(BUFFER_BYTES, writer), format }
    }

    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// Prints an entry. False if the format has no place for it: plain prints texts only.
    pub(super) fn entry(&mut self, entry: &Entry) -> Result<bool, Failure> {
        let decoded = entry.decode_body().unwrap_or_default();
        let text = match &decoded.content {
            Some(v1::body::Content::Text(text)) => Some(text.text.as_str()),
            _ => None,
        };
        match (self.format, text) {
            (Format::Plain, Some(text)) => self.line(text)?,
            (Format::Plain, None) => return Ok(false),
            (Format::Json, text) => self.json(&EntryJson {
                conversation: entry.conversation.to_string(),
                seq: entry.seq,
                sender: entry.sender.as_ref().map_or("", |sender| sender.as_str()),
                sent_at: rfc3339(entry.sent_at),
                client_message_id: printable(&entry.client_message_id),
                r#type: if entry.gone_reason == 0 { body::type_name(&decoded) } else { "gone" },
                text,
            })?,
        }
        Ok(true)
    }

    /// Prints a line, its control characters as spaces.
    pub(super) fn line(&mut self, text: &str) -> Result<(), Failure> {
        self.line_as_it_is(&harmless(text))
    }

    /// Prints a line of this program's own.
    pub(super) fn line_as_it_is(&mut self, text: &str) -> Result<(), Failure> {
        let mut write = || {
            self.writer.write_all(text.as_bytes())?;
            self.writer.write_all(b"\n")
        };
        write().map_err(Failure::of_output)
    }

    /// Prints an object.
    pub(super) fn json(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        serde_json::to_writer(&mut self.writer, value).map_err(|error| Failure::of_output(error.into()))?;
        self.line_as_it_is("")
    }

    /// Writes what was gathered.
    pub(super) fn flush(&mut self) -> Result<(), Failure> {
        self.writer.flush().map_err(Failure::of_output)
    }
}

/// The text with a space for each control character (C0, DEL, C1): they move cursors, change titles and clear screens. Ends of lines
/// and tabs stay, which move it no further than text does.
pub(super) fn harmless(text: &str) -> Cow<'_, str> {
    let steers = |c: char| c.is_control() && c != '\n' && c != '\t';
    if text.contains(steers) { Cow::Owned(text.replace(steers, " ")) } else { Cow::Borrowed(text) }
}

/// The text as one field of a line whose fields are separated by tabs.
pub(super) fn field(text: &str) -> String {
    text.replace(char::is_control, " ")
}

fn printable(id: &[u8]) -> String {
    match std::str::from_utf8(id) {
        Ok(text) if !text.is_empty() && text.chars().all(|c| !c.is_control()) => text.to_owned(),
        _ => id.iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

/// RFC 3339 with milliseconds, in UTC.
pub(super) fn rfc3339(time: Timestamp) -> String {
    let (seconds, millis) = (time.as_millis().div_euclid(1000), time.as_millis().rem_euclid(1000));
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// Year, month and day of a day since 1970-01-01. Howard Hinnant's `civil_from_days`
/// (<https://howardhinnant.github.io/date_algorithms.html>).
pub(super) fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use im_proto::{ConversationId, UserId};

    use super::*;

    fn entry(body: Bytes) -> Entry {
        Entry {
            conversation: ConversationId::from_bytes([0xab; 16]),
            seq: 7,
            sender: UserId::parse("alice").ok(),
            sent_at: Timestamp::from_millis(1_700_000_000_123),
            client_message_id: Bytes::from_static(&[0, 1, 255]),
            body,
            kind: v1::EntryKind::Message,
            flags: 1,
            own: false,
            gone_reason: 0,
        }
    }

    fn printed(format: Format, entry: &Entry) -> (bool, String) {
        let mut output = Output::to(Vec::new(), format);
        let shown = output.entry(entry).unwrap();
        output.flush().unwrap();
        (shown, String::from_utf8(output.writer.get_ref().clone()).unwrap())
    }

    #[test]
    fn plain_is_the_text_and_a_newline() {
        for text in ["", " tabs\tand spaces ", "two\nlines", "مرحبا 👩‍👩‍👧‍👦 \u{202e}x"] {
            assert_eq!(printed(Format::Plain, &entry(body::text(text))), (true, format!("{text}\n")));
        }
    }

    #[test]
    fn nothing_that_steers_a_terminal_is_printed_plain() {
        let hostile = "\x1b[2J\x1b]0;pwned\x07 \u{9b}2J\u{7f}\rover";
        let shown = " [2J ]0;pwned   2J  over\n";
        assert_eq!(printed(Format::Plain, &entry(body::text(hostile))), (true, shown.to_owned()));
        let mut output = Output::to(Vec::new(), Format::Plain);
        output.line(hostile).unwrap();
        output.flush().unwrap();
        assert_eq!(output.writer.get_ref(), shown.as_bytes(), "a line of any command");
        assert_eq!(field("a\tb\nc\x1b[2J"), "a b c [2J", "a field has no separators of its own");
        assert!(printed(Format::Json, &entry(body::text(hostile))).1.contains(r"\u001b[2J"));
    }

    #[test]
    fn plain_skips_what_is_no_text() {
        let left = v1::system_event::Event::MemberLeft(v1::MemberLeft { user_id: "bob".to_owned() });
        assert_eq!(printed(Format::Plain, &entry(body::event(left))), (false, String::new()));
        assert_eq!(printed(Format::Plain, &entry(Bytes::from_static(b"\xff"))), (false, String::new()));
    }

    #[test]
    fn json_has_the_fields_of_the_contract() {
        let expected = "{\"conversation\":\"abababababababababababababababab\",\"seq\":7,\"sender\":\"alice\",\
                        \"sent_at\":\"2023-11-14T22:13:20.123Z\",\"client_message_id\":\"0001ff\",\"type\":\"text\",\
                        \"text\":\"a\\\"b\"}\n";
        assert_eq!(printed(Format::Json, &entry(body::text("a\"b"))), (true, expected.to_owned()));
        let mut gone = entry(Bytes::new());
        gone.gone_reason = 2;
        assert!(printed(Format::Json, &gone).1.contains("\"type\":\"gone\"}"));
        let left = v1::system_event::Event::MemberLeft(v1::MemberLeft { user_id: "bob".to_owned() });
        assert!(printed(Format::Json, &entry(body::event(left))).1.contains("\"type\":\"event\"}"));
    }

    #[test]
    fn times_are_rfc_3339() {
        for (millis, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199_999, "2024-02-29T23:59:59.999Z"),
            (-1, "1969-12-31T23:59:59.999Z"),
            (4_102_444_800_000, "2100-01-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(Timestamp::from_millis(millis)), text);
        }
    }
}
