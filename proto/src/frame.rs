//! Framing: a 4-byte big-endian unsigned length, then that many bytes of one protobuf message.
//!
//! Sans-IO: decoding takes what was read so far, encoding appends to a buffer. A length is checked before anything is allocated.
//!
//! All fields of a frame are members of its oneof. A frame without a member that this version knows is reported by the number of
//! its first field; unknown fields beside a known member are ignored, as everywhere in a message.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

use crate::{status::StatusCode, v1};

/// Bytes of the length prefix.
pub const PREFIX_BYTES: usize = 4;

/// Why a stream cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame must not be empty")]
    Empty,
    #[error("a frame has at most {limit} bytes here, this one announces {announced}")]
    TooLarge { announced: u32, limit: usize },
    #[error("the frame is no valid protobuf message: {0}")]
    Malformed(#[from] prost::DecodeError),
}

impl FrameError {
    /// The status of the `Close` with which the connection ends.
    pub fn status(&self) -> StatusCode {
        match self {
            FrameError::TooLarge { .. } => StatusCode::TooLarge,
            FrameError::Empty | FrameError::Malformed(_) => StatusCode::Malformed,
        }
    }
}

/// Takes the next whole frame (without its prefix) out of `input`, or `None` if more bytes are needed.
pub fn split_frame(input: &mut BytesMut, limit: usize) -> Result<Option<Bytes>, FrameError> {
    let Some(length) = peek_length(input, limit)? else { return Ok(None) };
    if input.len() < PREFIX_BYTES + length {
        return Ok(None);
    }
    input.advance(PREFIX_BYTES);
    Ok(Some(input.split_to(length).freeze()))
}

/// The length of the frame at the start of `input`, checked; `None` if the prefix is not complete.
pub fn peek_length(input: &[u8], limit: usize) -> Result<Option<usize>, FrameError> {
    let Some(prefix) = input.first_chunk::<PREFIX_BYTES>() else { return Ok(None) };
    let announced = u32::from_be_bytes(*prefix);
    match usize::try_from(announced) {
        Ok(0) => Err(FrameError::Empty),
        Ok(length) if length <= limit => Ok(Some(length)),
        _ => Err(FrameError::TooLarge { announced, limit }),
    }
}

/// Appends a frame. A message over 4 GiB cannot be built by this project's limits.
pub fn encode_frame<M: Message>(message: &M, out: &mut BytesMut) {
    let length = message.encoded_len();
    out.reserve(PREFIX_BYTES + length);
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    message.encode_raw(out);
}

/// A frame of its own buffer, for sharing between connections.
pub fn frame_to_bytes<M: Message>(message: &M) -> Bytes {
    let mut out = BytesMut::with_capacity(PREFIX_BYTES + message.encoded_len());
    encode_frame(message, &mut out);
    out.freeze()
}

/// A client's frame, or the field number of a member that this version does not know.
#[derive(Clone, Debug, PartialEq)]
pub enum Decoded<F> {
    Frame(F),
    Unknown(u32),
}

/// Decodes the payload of a frame from a client.
pub fn decode_client_frame(payload: Bytes) -> Result<Decoded<v1::client_frame::Frame>, FrameError> {
    let tag = first_field(&payload);
    Ok(match v1::ClientFrame::decode(payload)?.frame {
        Some(frame) => Decoded::Frame(frame),
        None => Decoded::Unknown(tag),
    })
}

/// Decodes the payload of a frame from a server.
pub fn decode_server_frame(payload: Bytes) -> Result<Decoded<v1::server_frame::Frame>, FrameError> {
    let tag = first_field(&payload);
    Ok(match v1::ServerFrame::decode(payload)?.frame {
        Some(frame) => Decoded::Frame(frame),
        None => Decoded::Unknown(tag),
    })
}

/// The field number of the first field, 0 if there is none. In a frame without a known member it is the unknown one.
fn first_field(mut payload: &[u8]) -> u32 {
    prost::encoding::decode_key(&mut payload).map_or(0, |(field, _)| field)
}

impl From<v1::server_frame::Frame> for v1::ServerFrame {
    fn from(frame: v1::server_frame::Frame) -> Self {
        Self { frame: Some(frame) }
    }
}

impl From<v1::client_frame::Frame> for v1::ClientFrame {
    fn from(frame: v1::client_frame::Frame) -> Self {
        Self { frame: Some(frame) }
    }
}

#[cfg(test)]
mod tests;
