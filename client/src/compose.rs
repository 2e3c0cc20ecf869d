//! Bodies that name other things: mentions of users, replies to entries, forwarded entries.
//!
//! ```
//! use im_client::compose;
//!
//! let bob = im_proto::UserId::parse("bob")?;
//! let body = compose::Text::new("hello ").mention(&bob).text(", and ").mention_all().body();
//! let answer = compose::Text::new("I agree").reply(7);
//! # assert!(im_proto::body::validate(&body).is_ok() && im_proto::body::validate(&answer).is_ok());
//! # Ok::<(), im_proto::id::IdError>(())
//! ```

use bytes::Bytes;
use im_proto::{UserId, body, v1};

/// A text with mentions, made piece by piece.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Text(v1::Text);

impl Text {
    /// Begins with this.
    pub fn new(text: impl Into<String>) -> Self {
        Self(v1::Text { text: text.into(), mentions: Vec::new() })
    }

    /// The text without its mentions.
    pub fn as_str(&self) -> &str {
        &self.0.text
    }

    /// Goes on with this.
    #[must_use]
    pub fn text(mut self, text: &str) -> Self {
        self.0.text.push_str(text);
        self
    }

    /// Goes on with `@user`, and mentions that user. One who is not in the conversation is refused with `not a member`.
    #[must_use]
    pub fn mention(self, user: &UserId) -> Self {
        let shown = format!("@{user}");
        self.mention_as(&shown, v1::mention::Whom::UserId(user.to_string()))
    }

    /// Goes on with `@all`, and mentions everybody.
    #[must_use]
    pub fn mention_all(self) -> Self {
        self.mention_as("@all", v1::mention::Whom::All(true))
    }

    /// Goes on with a text of the application's choice that is a mention.
    #[must_use]
    pub fn mention_as(mut self, shown: &str, whom: v1::mention::Whom) -> Self {
        // A text of more than 4 GiB is refused for its size before anybody looks at its mentions.
        let bytes = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
        let (offset_bytes, length_bytes) = (bytes(self.0.text.len()), bytes(shown.len()));
        self.0.text.push_str(shown);
        self.0.mentions.push(v1::Mention { whom: Some(whom), offset_bytes, length_bytes });
        self
    }

    /// The encoded body.
    pub fn body(self) -> Bytes {
        body::encode(v1::body::Content::Text(self.0))
    }

    /// The encoded body of an answer to an entry of the same conversation.
    pub fn reply(self, seq: u64) -> Bytes {
        body::encode(v1::body::Content::Quote(v1::Quote { seq, text: Some(self.0) }))
    }
}

/// The encoded body that carries copies of entries.
pub fn forward(title: &str, entries: Vec<v1::ForwardedEntry>) -> Bytes {
    body::encode(v1::body::Content::Forward(v1::Forward { title: title.to_owned(), entries }))
}
