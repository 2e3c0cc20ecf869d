use proptest::{collection::vec, prelude::*};

use super::*;

const LIMIT: usize = 100;

fn framed(payload: &[u8]) -> Vec<u8> {
    [&u32::try_from(payload.len()).expect("short").to_be_bytes()[..], payload].concat()
}

fn ping(echo: &'static [u8]) -> v1::client_frame::Frame {
    v1::client_frame::Frame::Ping(v1::Ping { echo: Bytes::from_static(echo) })
}

fn decode(payload: &[u8]) -> Result<Decoded<v1::client_frame::Frame>, FrameError> {
    decode_client_frame(Bytes::copy_from_slice(payload))
}

proptest! {
    #[test]
    fn a_stream_cut_anywhere_gives_the_same_frames(
        payloads in vec(vec(any::<u8>(), 1..=LIMIT), 0..6),
        pieces in vec(1_usize..40, 1..30),
    ) {
        let stream: Vec<u8> = payloads.iter().flat_map(|payload| framed(payload)).collect();
        let (mut input, mut found, mut rest) = (BytesMut::new(), Vec::new(), stream.as_slice());
        for piece in pieces.iter().cycle() {
            while let Some(payload) = split_frame(&mut input, LIMIT).expect("no bad length") {
                found.push(payload.to_vec());
            }
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(rest.len().min(*piece));
            input.extend_from_slice(now);
            rest = later;
        }
        prop_assert!(input.is_empty());
        prop_assert_eq!(found, payloads);
    }

    #[test]
    fn a_length_is_judged_by_its_prefix_alone(length in any::<u32>(), rest in vec(any::<u8>(), 0..8)) {
        let mut input = BytesMut::from([&length.to_be_bytes()[..], &rest].concat().as_slice());
        let before = input.capacity();
        let result = split_frame(&mut input, LIMIT);
        match length as usize {
            0 => prop_assert_eq!(result, Err(FrameError::Empty)),
            length if length > LIMIT => prop_assert!(matches!(result, Err(FrameError::TooLarge { .. })), "over the limit"),
            length => prop_assert_eq!(result.map(|frame| frame.is_some()), Ok(rest.len() >= length)),
        }
        prop_assert!(input.capacity() <= before, "nothing is allocated for an announced length");
    }

    #[test]
    fn garbage_never_panics(payload in vec(any::<u8>(), 0..300)) {
        let payload = Bytes::from(payload);
        let _ = decode_client_frame(payload.clone());
        let _ = decode_server_frame(payload);
    }
}

#[test]
fn a_prefix_that_is_not_complete_asks_for_more() {
    for length in 0..PREFIX_BYTES {
        let mut input = BytesMut::from(&[0xff_u8; PREFIX_BYTES][..length]);
        assert_eq!(split_frame(&mut input, LIMIT), Ok(None));
        assert_eq!(input.len(), length);
    }
}

#[test]
fn a_frame_of_exactly_the_limit_passes() {
    let mut input = BytesMut::from(framed(&[1; LIMIT]).as_slice());
    assert_eq!(split_frame(&mut input, LIMIT).map(|frame| frame.map(|frame| frame.len())), Ok(Some(LIMIT)));
    let mut input = BytesMut::from(framed(&[1; LIMIT + 1]).as_slice());
    let error = split_frame(&mut input, LIMIT).expect_err("too large");
    assert_eq!(error.status(), StatusCode::TooLarge);
    assert_eq!(FrameError::Empty.status(), StatusCode::Malformed);
}

#[test]
fn what_is_encoded_is_split_and_decoded_again() {
    let frame = v1::ClientFrame::from(ping(b"x"));
    let mut input = BytesMut::from(frame_to_bytes(&frame).as_ref());
    let mut appended = BytesMut::new();
    encode_frame(&frame, &mut appended);
    assert_eq!(input, appended);
    let payload = split_frame(&mut input, LIMIT).expect("good").expect("whole");
    assert_eq!(decode_client_frame(payload), Ok(Decoded::Frame(ping(b"x"))));
}

#[test]
fn an_unknown_member_is_reported_by_its_number() {
    // Field 100: empty bytes; field 536,870,911 (the greatest): a number.
    assert_eq!(decode(&[0xa2, 0x06, 0]), Ok(Decoded::Unknown(100)));
    assert_eq!(decode(&[0xf8, 0xff, 0xff, 0xff, 0x0f, 1]), Ok(Decoded::Unknown(536_870_911)));
    assert_eq!(decode(&[0xa2, 0x06, 0, 0xaa, 0x06, 0]), Ok(Decoded::Unknown(100)));
    assert_eq!(decode_server_frame(Bytes::from_static(&[0xa2, 0x06, 0])), Ok(Decoded::Unknown(100)));
}

#[test]
fn unknown_fields_around_and_in_a_known_member_are_ignored() {
    let expected = Ok(Decoded::Frame(ping(b"x")));
    assert_eq!(decode(&[0x12, 3, 0x0a, 1, b'x']), expected);
    assert_eq!(decode(&[0x12, 3, 0x0a, 1, b'x', 0xa2, 0x06, 0]), expected, "known first");
    assert_eq!(decode(&[0xa2, 0x06, 0, 0x12, 3, 0x0a, 1, b'x']), expected, "unknown first");
    assert_eq!(decode(&[0x12, 6, 0x0a, 1, b'x', 0xa0, 0x06, 5]), expected, "within");
}

#[test]
fn of_several_known_members_the_last_counts_as_in_every_protobuf_library() {
    assert_eq!(decode(&[0x1a, 0, 0x12, 3, 0x0a, 1, b'x']), Ok(Decoded::Frame(ping(b"x"))));
}

#[test]
fn a_member_of_the_wrong_wire_type_and_field_0_are_malformed() {
    for payload in [&[0x10_u8, 1][..], &[0x02, 0], &[0x12], &[0x12, 5, 0], &[0x80], &[0x13, 0x14]] {
        let error = decode(payload).expect_err("malformed");
        assert_eq!(error.status(), StatusCode::Malformed, "{payload:?}");
    }
}
