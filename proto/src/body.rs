//! Bodies: validated as bytes, never decoded and encoded again on the way.
//!
//! The check walks the bytes along the shape of `Body` in the schema and allocates nothing. What passes decodes in every protobuf
//! library, to the same content: a field that is not repeated occurs once, and one member of a oneof at most. Fields and members
//! that this version does not know pass as they are, so that a newer client's content survives an older server.
//!
//! Not here: whether the sender may do what the body asks for (edit another's entry, mention all); its receiver decides that.

mod names;
mod rules;
mod shape;

pub use names::{FLAG_COUNTED, FLAG_MENTIONS, FLAG_MENTIONS_ALL, Names, names};

use crate::{id::IdError, limits, status::StatusCode, v1};

/// Why a body is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    #[error("a body must not be empty")]
    Empty,
    #[error("a body has at most {} bytes, this one has {found}: send it in parts", limits::BODY_BYTES_MAX)]
    TooLarge { found: usize },
    #[error("the body is no valid message: {0}")]
    Malformed(&'static str),
    #[error("{message} breaks a rule: {rule}")]
    Rule { message: &'static str, rule: &'static str },
    #[error("{message} names somebody by what is no id: {error}")]
    Id { message: &'static str, error: IdError },
    #[error("bodies hold bodies at most {} deep", limits::BODY_NESTING_MAX)]
    TooDeep,
    #[error("only the server writes system events")]
    SystemEvent,
}

impl BodyError {
    /// The status for the sender.
    pub fn status(&self) -> StatusCode {
        match self {
            BodyError::TooLarge { .. } => StatusCode::TooLarge,
            BodyError::SystemEvent => StatusCode::Forbidden,
            _ => StatusCode::Malformed,
        }
    }
}

/// Checks a body from a client: size, UTF-8, known members well formed. Unknown members pass: a newer client's content is kept.
pub fn validate(body: &[u8]) -> Result<(), BodyError> {
    if body.is_empty() {
        return Err(BodyError::Empty);
    }
    if body.len() > limits::BODY_BYTES_MAX {
        return Err(BodyError::TooLarge { found: body.len() });
    }
    shape::walk(&shape::BODY, body, 0)
}

/// The kind of the entry that a valid body makes.
pub fn entry_kind(body: &[u8]) -> v1::EntryKind {
    match shape::fields(body).map_while(Result::ok).find(|field| shape::BODY.field(field.number).is_some()) {
        Some(field) if field.number == 12 => v1::EntryKind::Recall,
        Some(field) if field.number == 13 => v1::EntryKind::Edit,
        Some(field) if field.number == 14 => v1::EntryKind::Reaction,
        Some(field) if field.number == 15 => v1::EntryKind::Event,
        _ => v1::EntryKind::Message,
    }
}

/// The encoded body of a plain text.
pub fn text(text: impl Into<String>) -> bytes::Bytes {
    encode(v1::body::Content::Text(v1::Text { text: text.into(), mentions: Vec::new() }))
}

/// The encoded body of a system event.
pub fn event(event: v1::system_event::Event) -> bytes::Bytes {
    encode(v1::body::Content::Event(v1::SystemEvent { event: Some(event) }))
}

/// The encoded body of any content.
pub fn encode(content: v1::body::Content) -> bytes::Bytes {
    use prost::Message as _;
    v1::Body { content: Some(content) }.encode_to_vec().into()
}

/// The name of the body's member for people and JSON (`text`, `image`, …), `unknown` for one that this version does not know.
pub fn type_name(body: &v1::Body) -> &'static str {
    use v1::body::Content;
    match &body.content {
        Some(Content::Text(_)) => "text",
        Some(Content::Image(_)) => "image",
        Some(Content::Video(_)) => "video",
        Some(Content::Audio(_)) => "audio",
        Some(Content::File(_)) => "file",
        Some(Content::Sticker(_)) => "sticker",
        Some(Content::Location(_)) => "location",
        Some(Content::Contact(_)) => "contact",
        Some(Content::Quote(_)) => "quote",
        Some(Content::Forward(_)) => "forward",
        Some(Content::CallRecord(_)) => "call_record",
        Some(Content::Recalled(_)) => "recalled",
        Some(Content::Edited(_)) => "edited",
        Some(Content::Reaction(_)) => "reaction",
        Some(Content::Event(_)) => "event",
        Some(Content::Custom(_)) => "custom",
        None => "unknown",
    }
}

#[cfg(test)]
mod tests;
