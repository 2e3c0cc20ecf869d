//! What must hold for a known message of a body beyond its shape.

use super::{
    BodyError,
    shape::{self, RawField, RawValue, Shape},
};
use crate::{id, limits};

/// Checks the rules of one message whose shape was found good.
pub(super) fn check(shape: &Shape, input: &[u8], nesting: usize) -> Result<(), BodyError> {
    let rule = |holds: bool, rule| if holds { Ok(()) } else { Err(BodyError::Rule { message: shape.message, rule }) };
    let id = |number| {
        match find(input, number) {
            None => Ok(()),
            Some(field) => {
                text(field).ok_or(id::IdError::Character).and_then(|text| id::check_text(text, limits::ID_BYTES_MAX))
            }
        }
        .map_err(|error| BodyError::Id { message: shape.message, error })
    };
    let length = |number| find(input, number).map_or(0, |field| field.bytes().len());
    match shape.message {
        "Text" => check_mentions(input),
        "Mention" => id(1),
        "ContactCard" => {
            rule(length(1) > 0, "user_id is set")?;
            id(1)
        }
        "Body" => {
            rule(nesting == 0 || ![12, 13, 14].iter().any(|number| find(input, *number).is_some()), "it holds content")
        }
        "SystemEvent" => Err(BodyError::SystemEvent),
        "Media" => rule([0, 32].contains(&length(9)), "content_hash is 32 bytes or absent"),
        "Location" => {
            rule(degrees(input, 1).is_some_and(|degrees| degrees.abs() <= 90.0), "latitude is -90 to 90 degrees")?;
            rule(degrees(input, 2).is_some_and(|degrees| degrees.abs() <= 180.0), "longitude is -180 to 180 degrees")
        }
        "Sticker" => rule(length(1) <= limits::EMOJI_BYTES_MAX, "an emoji has at most 64 bytes"),
        "Quote" | "Recalled" => rule(names_entry(input), "seq is set"),
        "Edited" => {
            rule(names_entry(input), "seq is set")?;
            rule(length(2) > 0, "body is set")
        }
        "Reaction" => {
            rule(names_entry(input), "seq is set")?;
            rule((1..=limits::EMOJI_BYTES_MAX).contains(&length(2)), "an emoji has 1 to 64 bytes")
        }
        "Custom" => rule((1..=limits::CUSTOM_TYPE_BYTES_MAX).contains(&length(1)), "type has 1 to 128 bytes"),
        _ => Ok(()),
    }
}

/// Each mention is a range of the text, on the edges of characters.
fn check_mentions(input: &[u8]) -> Result<(), BodyError> {
    let broken = |rule| Err(BodyError::Rule { message: "Text", rule });
    let mut mentions = known(input).filter(|field| field.number == 2).peekable();
    if mentions.peek().is_none() {
        return Ok(());
    }
    let text = find(input, 1).and_then(text).unwrap_or("");
    for (count, mention) in mentions.enumerate() {
        if count >= limits::MENTIONS_MAX {
            return broken("it has at most 256 mentions");
        }
        let range = |number| {
            // A longer number is cut to 32 bits by whoever decodes it.
            let value = find(mention.bytes(), number).map_or(0, |field| field.number_value());
            u32::try_from(value).ok().and_then(|value| usize::try_from(value).ok())
        };
        let (Some(offset), Some(length)) = (range(3), range(4)) else {
            return broken("a mention is a range of the text");
        };
        if offset.checked_add(length).and_then(|end| text.get(offset..end)).is_none() {
            return broken("a mention is a range of the text, on the edges of characters");
        }
    }
    Ok(())
}

/// Whether field 1 is the seq of an entry.
fn names_entry(input: &[u8]) -> bool {
    find(input, 1).is_some_and(|field| field.number_value() > 0)
}

/// A coordinate; 0 if absent, `None` if it is no number.
fn degrees(input: &[u8], number: u32) -> Option<f64> {
    match find(input, number).map(|field| field.value) {
        None => Some(0.0),
        Some(RawValue::Fixed64(bits)) => Some(f64::from_bits(bits)).filter(|degrees| degrees.is_finite()),
        Some(_) => None,
    }
}

fn known(input: &[u8]) -> impl Iterator<Item = RawField<'_>> {
    shape::fields(input).map_while(Result::ok)
}

fn find(input: &[u8], number: u32) -> Option<RawField<'_>> {
    known(input).find(|field| field.number == number)
}

fn text(field: RawField<'_>) -> Option<&str> {
    std::str::from_utf8(field.bytes()).ok()
}
