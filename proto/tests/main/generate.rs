//! Encodings of any message, made from the schema.

use prost_types::{FieldDescriptorProto, field_descriptor_proto::Type};

use crate::{
    schema::{Schema, is_repeated, type_name},
    wire::{delimited, key, varint},
};

/// Random choices out of given bytes; zeros when they are used up, so that a smaller input makes a smaller message.
pub struct Entropy<'a> {
    bytes: &'a [u8],
}

impl<'a> Entropy<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    fn byte(&mut self) -> u8 {
        let Some((byte, rest)) = self.bytes.split_first() else { return 0 };
        self.bytes = rest;
        *byte
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::from(self.byte()) % limit
    }

    fn number(&mut self) -> u64 {
        let width = self.below(9);
        (0..width).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    fn bytes(&mut self) -> Vec<u8> {
        let length = self.below(9);
        (0..length).map(|_| self.byte()).collect()
    }

    fn text(&mut self) -> String {
        let length = self.below(5);
        (0..length).map(|_| ['a', '\0', 'é', '你', '👍', '\u{202e}'][self.below(6)]).collect()
    }
}

/// One message, encoded with and without fields that the schema does not know, at every depth.
#[derive(Default)]
pub struct Generated {
    pub plain: Vec<u8>,
    pub with_unknown_fields: Vec<u8>,
}

impl Generated {
    fn append(&mut self, bytes: &[u8]) {
        self.plain.extend_from_slice(bytes);
        self.with_unknown_fields.extend_from_slice(bytes);
    }

    fn append_unknown_field(&mut self, entropy: &mut Entropy<'_>) {
        let number = 1_000 + i32::from(entropy.byte());
        self.with_unknown_fields.extend(match entropy.below(4) {
            0 => Vec::new(),
            1 => [key(number, 0), varint(entropy.number())].concat(),
            2 => [key(number, 1), vec![7; 8]].concat(),
            _ => delimited(number, &entropy.bytes()),
        });
    }
}

/// A message in the form that every encoder writes: fields in order, defaults left out.
pub fn random(schema: &Schema, message: &str, entropy: &mut Entropy<'_>) -> Generated {
    random_within(schema, message, entropy, 0)
}

fn random_within(schema: &Schema, message: &str, entropy: &mut Entropy<'_>, depth: usize) -> Generated {
    let mut out = Generated::default();
    out.append_unknown_field(entropy);
    for slot in schema.slots(message) {
        let field = slot.members[entropy.below(slot.members.len())];
        let occurrences = if is_repeated(field) { entropy.below(4) } else { entropy.below(2) };
        if field.r#type() == Type::Message {
            if depth > 6 {
                continue;
            }
            for _ in 0..occurrences {
                let inner = random_within(schema, type_name(field), entropy, depth + 1);
                out.plain.extend(delimited(field.number(), &inner.plain));
                out.with_unknown_fields.extend(delimited(field.number(), &inner.with_unknown_fields));
            }
        } else if is_repeated(field) {
            out.append(&repeated_scalar(schema, field, occurrences, entropy));
        } else if occurrences == 1 {
            // A member of a oneof is written even if it has the default value.
            out.append(&scalar(schema, field, entropy, slot.one_of.is_some()));
        }
        out.append_unknown_field(entropy);
    }
    out
}

fn repeated_scalar(schema: &Schema, field: &FieldDescriptorProto, count: usize, entropy: &mut Entropy<'_>) -> Vec<u8> {
    if count == 0 {
        return Vec::new();
    }
    if matches!(field.r#type(), Type::String | Type::Bytes) {
        return (0..count).flat_map(|_| scalar(schema, field, entropy, true)).collect();
    }
    let packed: Vec<u8> = (0..count).flat_map(|_| varint(number(schema, field, entropy))).collect();
    delimited(field.number(), &packed)
}

fn scalar(schema: &Schema, field: &FieldDescriptorProto, entropy: &mut Entropy<'_>, even_default: bool) -> Vec<u8> {
    let bytes = match field.r#type() {
        Type::String => entropy.text().into_bytes(),
        Type::Bytes => entropy.bytes(),
        Type::Double => {
            let value = f64::from(entropy.byte());
            let is_default = value == 0.0 && !even_default;
            return if is_default {
                Vec::new()
            } else {
                [key(field.number(), 1), value.to_le_bytes().to_vec()].concat()
            };
        }
        _ => {
            let number = number(schema, field, entropy);
            let is_default = number == 0 && !even_default;
            return if is_default { Vec::new() } else { [key(field.number(), 0), varint(number)].concat() };
        }
    };
    if bytes.is_empty() && !even_default { Vec::new() } else { delimited(field.number(), &bytes) }
}

/// A value as it stands on the wire: a negative one has 64 bits.
fn number(schema: &Schema, field: &FieldDescriptorProto, entropy: &mut Entropy<'_>) -> u64 {
    match field.r#type() {
        Type::Bool => u64::from(entropy.byte() % 2),
        Type::Uint32 => entropy.number() & u64::from(u32::MAX),
        Type::Uint64 | Type::Int64 => entropy.number(),
        Type::Enum => {
            let values = schema.enum_values(type_name(field));
            u64::try_from(values[entropy.below(values.len())].1).expect("no negative values")
        }
        other => panic!("this test cannot make a {other:?} yet"),
    }
}
