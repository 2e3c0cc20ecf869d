//! Protobuf encoding written by hand, so that the tests do not trust the encoder under test.

pub fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

pub fn key(number: i32, wire_type: u64) -> Vec<u8> {
    varint(u64::try_from(number).expect("a field number") << 3 | wire_type)
}

pub fn delimited(number: i32, bytes: &[u8]) -> Vec<u8> {
    [key(number, 2), varint(bytes.len() as u64), bytes.to_vec()].concat()
}
