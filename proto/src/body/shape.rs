//! The walk over an encoded body along its schema, without an allocation. The shapes are generated from `body.proto`.

use prost::encoding::{WireType, decode_key, decode_varint};

use super::{BodyError, rules};
use crate::limits;

/// What a message may hold.
pub(super) struct Shape {
    /// Its name, for its rules and for errors.
    pub(super) message: &'static str,
    fields: &'static [Field],
}

pub(super) struct Field {
    number: u32,
    repeated: bool,
    /// It is a member of the message's oneof; build.rs sees to it that there is one at most.
    one_of: bool,
    kind: Kind,
}

pub(super) enum Kind {
    Varint,
    Fixed64,
    Text,
    Bytes,
    /// Bytes that are an encoded `Body`.
    Body,
    Message(&'static Shape),
}

include!(concat!(env!("OUT_DIR"), "/body_shapes.rs"));

impl Shape {
    pub(super) fn field(&self, number: u32) -> Option<&Field> {
        self.fields.iter().find(|field| field.number == number)
    }
}

/// A field as it stands on the wire.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawField<'a> {
    pub(super) number: u32,
    pub(super) value: RawValue<'a>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum RawValue<'a> {
    Varint(u64),
    Fixed32,
    Fixed64(u64),
    Bytes(&'a [u8]),
}

impl<'a> RawField<'a> {
    pub(super) fn bytes(&self) -> &'a [u8] {
        if let RawValue::Bytes(bytes) = self.value { bytes } else { &[] }
    }

    pub(super) fn number_value(&self) -> u64 {
        if let RawValue::Varint(value) = self.value { value } else { 0 }
    }
}

/// The fields of a message in their order; ends after the first that is malformed.
pub(super) fn fields(mut input: &[u8]) -> impl Iterator<Item = Result<RawField<'_>, BodyError>> {
    std::iter::from_fn(move || {
        if input.is_empty() {
            return None;
        }
        let field = next_field(&mut input);
        if field.is_err() {
            input = &[];
        }
        Some(field)
    })
}

fn next_field<'a>(input: &mut &'a [u8]) -> Result<RawField<'a>, BodyError> {
    let (number, wire_type) = decode_key(input).map_err(|_| BodyError::Malformed("a field has no valid key"))?;
    let value = match wire_type {
        WireType::Varint => RawValue::Varint(varint(input)?),
        WireType::SixtyFourBit => {
            let (value, rest) = input.split_first_chunk::<8>().ok_or(CUT_SHORT)?;
            *input = rest;
            RawValue::Fixed64(u64::from_le_bytes(*value))
        }
        WireType::ThirtyTwoBit => {
            let (_, rest) = input.split_first_chunk::<4>().ok_or(CUT_SHORT)?;
            *input = rest;
            RawValue::Fixed32
        }
        WireType::LengthDelimited => {
            let length = usize::try_from(varint(input)?).map_err(|_| CUT_SHORT)?;
            let (value, rest) = input.split_at_checked(length).ok_or(CUT_SHORT)?;
            *input = rest;
            RawValue::Bytes(value)
        }
        WireType::StartGroup | WireType::EndGroup => return Err(BodyError::Malformed("groups are not used")),
    };
    Ok(RawField { number, value })
}

const CUT_SHORT: BodyError = BodyError::Malformed("it ends in the middle of a field");

fn varint(input: &mut &[u8]) -> Result<u64, BodyError> {
    decode_varint(input).map_err(|_| BodyError::Malformed("a variable-length number is not complete"))
}

/// Checks a message and everything in it. `nesting` counts the bodies around it; the depth of messages is the schema's own.
pub(super) fn walk(shape: &Shape, input: &[u8], nesting: usize) -> Result<(), BodyError> {
    let mut seen = 0_u64;
    let mut member_seen = false;
    for raw in fields(input) {
        let raw = raw?;
        let Some(field) = shape.field(raw.number) else { continue };
        if !field.repeated {
            let bit = 1_u64 << (field.number % 64);
            if seen & bit != 0 {
                return Err(BodyError::Malformed("a field that is not repeated occurs twice"));
            }
            seen |= bit;
        }
        if field.one_of && std::mem::replace(&mut member_seen, true) {
            return Err(BodyError::Malformed("two members of a oneof are set"));
        }
        check_value(field, &raw, nesting)?;
    }
    rules::check(shape, input, nesting)
}

fn check_value(field: &Field, raw: &RawField<'_>, nesting: usize) -> Result<(), BodyError> {
    match (&field.kind, raw.value) {
        (Kind::Varint, RawValue::Varint(_))
        | (Kind::Fixed64, RawValue::Fixed64(_))
        | (Kind::Bytes, RawValue::Bytes(_)) => Ok(()),
        (Kind::Text, RawValue::Bytes(text)) => {
            std::str::from_utf8(text).map(|_| ()).map_err(|_| BodyError::Malformed("a text is not UTF-8"))
        }
        (Kind::Message(shape), RawValue::Bytes(bytes)) => walk(shape, bytes, nesting),
        // Whether it may be empty is the rule of the message that holds it.
        (Kind::Body, RawValue::Bytes([])) => Ok(()),
        (Kind::Body, RawValue::Bytes(_)) if nesting >= limits::BODY_NESTING_MAX => Err(BodyError::TooDeep),
        (Kind::Body, RawValue::Bytes(body)) => walk(&BODY, body, nesting + 1),
        _ => Err(BodyError::Malformed("a field has the wrong wire type")),
    }
}
