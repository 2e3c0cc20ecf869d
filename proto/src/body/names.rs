//! What a body names beside its content: users, all, an entry. Read from the bytes along the way that the check went; nothing is
//! allocated for a body without mentions.

use super::shape::{self, RawField};

/// `Message.flags`: the entry counts as unread.
pub const FLAG_COUNTED: u32 = 1;
/// `Message.flags`: it mentions somebody by name.
pub const FLAG_MENTIONS: u32 = 2;
/// `Message.flags`: it mentions all.
pub const FLAG_MENTIONS_ALL: u32 = 4;

/// What a valid body names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names<'a> {
    /// The entry of the same conversation that it answers.
    pub quoted: Option<u64>,
    /// It mentions all.
    pub all: bool,
    /// Whom it mentions by name, each once, in their order.
    pub users: Vec<&'a str>,
}

impl Names<'_> {
    /// `Message.flags` of the message with that body.
    pub fn flags(&self) -> u32 {
        let named = if self.users.is_empty() { 0 } else { FLAG_MENTIONS };
        FLAG_COUNTED | named | if self.all { FLAG_MENTIONS_ALL } else { 0 }
    }
}

/// What the text or the quote of a valid body names. What a forwarded body inside it names is no concern of its readers.
pub fn names(body: &[u8]) -> Names<'_> {
    let mut names = Names::default();
    for field in known(body) {
        match field.number {
            1 => text(field.bytes(), &mut names),
            9 => {
                for field in known(field.bytes()) {
                    match field.number {
                        1 => names.quoted = Some(field.number_value()),
                        2 => text(field.bytes(), &mut names),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    names.users.sort_unstable();
    names.users.dedup();
    names
}

fn text<'a>(text: &'a [u8], names: &mut Names<'a>) {
    for mention in known(text).filter(|field| field.number == 2) {
        for field in known(mention.bytes()) {
            match field.number {
                1 => names.users.extend(std::str::from_utf8(field.bytes()).ok()),
                2 => names.all |= field.number_value() != 0,
                _ => {}
            }
        }
    }
}

fn known(input: &[u8]) -> impl Iterator<Item = RawField<'_>> {
    shape::fields(input).map_while(Result::ok)
}
