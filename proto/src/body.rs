//! Bodies: validated as bytes, never decoded and encoded again on the way.

use prost::Message as _;

use crate::{limits, v1};

/// Why a body is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    #[error("a body must not be empty")]
    Empty,
    #[error("a body has at most {} bytes, this one has {found}; larger content is media", limits::BODY_BYTES_MAX)]
    TooLarge { found: usize },
    #[error("the body is no valid message: {0}")]
    Malformed(#[from] prost::DecodeError),
    #[error("only the server writes system events")]
    SystemEvent,
}

/// Checks a body from a client: size, UTF-8, known members well formed. Unknown members pass: a newer client's content is kept.
pub fn validate(body: &[u8]) -> Result<(), BodyError> {
    if body.is_empty() {
        return Err(BodyError::Empty);
    }
    if body.len() > limits::BODY_BYTES_MAX {
        return Err(BodyError::TooLarge { found: body.len() });
    }
    match v1::Body::decode(body)?.content {
        Some(v1::body::Content::Event(_)) => Err(BodyError::SystemEvent),
        _ => Ok(()),
    }
}

/// The encoded body of a plain text.
pub fn text(text: impl Into<String>) -> bytes::Bytes {
    let content = v1::body::Content::Text(v1::Text { text: text.into(), mentions: Vec::new() });
    v1::Body { content: Some(content) }.encode_to_vec().into()
}

/// The encoded body of a system event.
pub fn event(event: v1::system_event::Event) -> bytes::Bytes {
    let content = v1::body::Content::Event(v1::SystemEvent { event: Some(event) });
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
