//! The golden vectors in `vectors/`: the bytes of every frame, peer message, body and api message, and of every hash.
//!
//! The files are made from the schema by an encoder of their own, with a value for every field, and never change but by addition:
//! `IM_WRITE_VECTORS=1 cargo test -p im-proto vectors` writes them again, and a line that differs is a broken protocol.

use std::{collections::BTreeSet, fmt::Write as _, fs, path::PathBuf};

use bytes::{Bytes, BytesMut};
use im_proto::frame::{self, Decoded};
use prost_types::{FieldDescriptorProto, field_descriptor_proto::Type};

use crate::{
    schema::{Schema, is_repeated, type_name},
    types::reencode,
    wire::{delimited, key, varint},
};

fn path(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("vectors").join(file)
}

/// One file of vectors: what wraps them and where they come from.
struct File {
    name: &'static str,
    about: &'static str,
    vectors: Vec<Vector>,
}

struct Vector {
    name: String,
    message: String,
    /// Lines of hexadecimal digits with a comment.
    text: String,
    bytes: Vec<u8>,
}

/// Writes a message with a value for every field, one line a field.
struct Filler<'a> {
    schema: &'a Schema,
    /// Which member of each oneof is set, counted from the first.
    choice: usize,
    lines: String,
    covered: &'a mut BTreeSet<(String, i32)>,
}

impl Filler<'_> {
    fn message(&mut self, message: &str, depth: usize, only: Option<i32>) -> Vec<u8> {
        let mut out = Vec::new();
        for slot in self.schema.slots(message) {
            let chosen = slot.members.iter().find(|field| Some(field.number()) == only);
            let field = chosen.unwrap_or(&slot.members[self.choice.min(slot.members.len() - 1)]);
            self.covered.insert((message.to_owned(), field.number()));
            out.extend(self.field(message, field, depth));
        }
        out
    }

    fn field(&mut self, message: &str, field: &FieldDescriptorProto, depth: usize) -> Vec<u8> {
        if field.r#type() == Type::Message {
            let mark = self.lines.len();
            let inner = self.message(type_name(field), depth + 1, None);
            let head = [key(field.number(), 2), varint(inner.len() as u64)].concat();
            let below = self.lines.split_off(mark);
            self.line(
                depth,
                &head,
                &format!("{message}.{} = {} of {} bytes", field.name(), type_name(field), inner.len()),
            );
            self.lines.push_str(&below);
            return [head, inner].concat();
        }
        let (bytes, shown) = value(self.schema, message, field);
        self.line(depth, &bytes, &format!("{message}.{} = {shown}", field.name()));
        bytes
    }

    fn line(&mut self, depth: usize, bytes: &[u8], comment: &str) {
        writeln!(self.lines, "{}{} # {comment}", "  ".repeat(depth), hex(bytes)).expect("a string");
    }
}

/// The encoded field with its value, and the value for people.
fn value(schema: &Schema, message: &str, field: &FieldDescriptorProto) -> (Vec<u8>, String) {
    let number = field.number();
    match field.r#type() {
        Type::String => {
            let values: Vec<&str> = if is_repeated(field) {
                text_values(field.name()).to_vec()
            } else {
                vec![text_values(field.name())[0]]
            };
            let bytes = values.iter().flat_map(|value| delimited(number, value.as_bytes())).collect();
            (bytes, format!("{values:?}").trim_matches(['[', ']']).to_owned())
        }
        Type::Bytes => {
            let bytes = bytes_value(message, field.name());
            (delimited(number, &bytes), format!("{} bytes", bytes.len()))
        }
        Type::Double => {
            let value = 52.5_f64;
            ([key(number, 1), value.to_le_bytes().to_vec()].concat(), value.to_string())
        }
        _ if is_repeated(field) => {
            let packed: Vec<u8> = [7, 300].into_iter().flat_map(varint).collect();
            (delimited(number, &packed), "7, 300 (packed)".to_owned())
        }
        _ => {
            let (value, shown) = number_value(schema, field);
            ([key(number, 0), varint(value)].concat(), shown)
        }
    }
}

fn number_value(schema: &Schema, field: &FieldDescriptorProto) -> (u64, String) {
    let value = match (field.r#type(), field.name()) {
        (Type::Bool, _) => return (1, "true".to_owned()),
        (Type::Enum, _) => {
            let (name, value) = schema.enum_values(type_name(field)).last().expect("a value");
            return (u64::try_from(*value).expect("not negative"), format!("{value} ({name})"));
        }
        (Type::Int64, "from" | "to") => return ((-2_i64) as u64, "-2".to_owned()),
        (_, "offset_bytes") => 8,
        (_, "length_bytes") => 6,
        (_, name) if name.ends_with("_at_ms") || name == "server_time_ms" => 1_800_000_000_123,
        (Type::Uint32, _) => 100 + u64::try_from(field.number()).expect("positive"),
        _ => (1 << 33) + u64::try_from(field.number()).expect("positive"),
    };
    (value, value.to_string())
}

fn text_values(field: &str) -> &'static [&'static str] {
    match field {
        "user_id" | "sender" | "creator" | "peer_user_id" => &["alice"],
        "members" | "user_ids" | "writers" => &["alice", "bøb"],
        "text" => &["grüße 你好 👋"],
        "token" => &["header.claims.signature"],
        "cluster_id" => &["test"],
        "endpoints" => &["tls://chat.example:7101", "quic://chat.example:7101"],
        "features" => &["a", "b"],
        "address" => &["192.0.2.1:7100"],
        "emoji" => &["👍"],
        _ => &["x"],
    }
}

fn bytes_value(message: &str, field: &str) -> Vec<u8> {
    match (message, field) {
        (_, "conversation_id" | "conversation_ids" | "self_conversation_id" | "target" | "origin") => (0..16).collect(),
        ("PeerEffect", "body") => {
            let left = im_proto::v1::ConversationLeft { conversation_id: Bytes::from_static(&[1; 16]), left_seq: 4 };
            im_proto::body::event(im_proto::v1::system_event::Event::ConversationLeft(left)).to_vec()
        }
        (_, "body") => im_proto::body::text("hi").to_vec(),
        (_, "client_message_id" | "after" | "key") => b"m-1".to_vec(),
        (_, "mac" | "content_hash") => (0..32).collect(),
        ("Capability", "identity") => vec![0x0a, 5, b'a', b'l', b'i', b'c', b'e'],
        ("Deliver" | "PeerDeliver", "frame") => vec![0, 0, 0, 4, 0x12, 2, 0x0a, 0],
        _ => vec![0xde, 0xad, 0xbe, 0xef],
    }
}

fn hex(bytes: &[u8]) -> String {
    let digits: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    digits.join(" ")
}

/// How often the oneofs below a message must be filled to see every member once.
fn choices(schema: &Schema, message: &str) -> usize {
    let slots = schema.slots(message);
    let here = slots.iter().map(|slot| slot.members.len()).max().unwrap_or(1);
    let fields = slots.iter().flat_map(|slot| &slot.members).filter(|field| field.r#type() == Type::Message);
    fields.map(|field| choices(schema, type_name(field))).max().unwrap_or(1).max(here)
}

/// A vector for each member of the oneof of `message`, more if the member has oneofs of its own.
fn of_members(schema: &Schema, message: &str, covered: &mut BTreeSet<(String, i32)>, wrap: Wrap) -> Vec<Vector> {
    let mut vectors = Vec::new();
    let slots = schema.slots(message);
    let one_of = slots.iter().find(|slot| slot.one_of.is_some()).expect("a oneof");
    for member in &one_of.members {
        let count = if member.r#type() == Type::Message { choices(schema, type_name(member)) } else { 1 };
        for choice in 0..count {
            let mut filler = Filler { schema, choice, lines: String::new(), covered };
            let bytes = filler.message(message, wrap.depth(), Some(member.number()));
            let number = if choice == 0 { String::new() } else { format!(" {}", choice + 1) };
            let name = format!("{message}.{}{number}", member.name());
            vectors.push(wrap.finish(name, message, filler.lines, bytes));
        }
    }
    vectors
}

/// What stands around a message on the wire.
#[derive(Clone, Copy)]
enum Wrap {
    Nothing,
    LengthPrefix,
    /// A batch of one message.
    Batch(&'static str),
}

impl Wrap {
    fn depth(self) -> usize {
        match self {
            Wrap::Nothing => 0,
            Wrap::LengthPrefix | Wrap::Batch(_) => 1,
        }
    }

    fn finish(self, name: String, message: &str, lines: String, bytes: Vec<u8>) -> Vector {
        let (message, head, comment) = match self {
            Wrap::Nothing => (message, Vec::new(), String::new()),
            Wrap::LengthPrefix => {
                let length = u32::try_from(bytes.len()).expect("short").to_be_bytes().to_vec();
                (message, length, format!("length = {}", bytes.len()))
            }
            Wrap::Batch(batch) => {
                let head =
                    [key(1, 0), varint(7), key(2, 0), varint(300), key(3, 2), varint(bytes.len() as u64)].concat();
                (
                    batch,
                    head,
                    format!(
                        "{batch}: first_number = 7, acknowledged_through = 300, a message of {} bytes",
                        bytes.len()
                    ),
                )
            }
        };
        let text = if head.is_empty() { lines } else { format!("{} # {comment}\n{lines}", hex(&head)) };
        Vector { name, message: message.to_owned(), text, bytes: [head, bytes].concat() }
    }
}

fn of_messages(schema: &Schema, messages: &[&str], covered: &mut BTreeSet<(String, i32)>) -> Vec<Vector> {
    let mut vectors = Vec::new();
    for message in messages {
        for choice in 0..choices(schema, message) {
            let mut filler = Filler { schema, choice, lines: String::new(), covered };
            let bytes = filler.message(message, 0, None);
            let name = if choice == 0 { (*message).to_owned() } else { format!("{message} {}", choice + 1) };
            vectors.push(Wrap::Nothing.finish(name, message, filler.lines, bytes));
        }
    }
    vectors
}

fn files(schema: &Schema, covered: &mut BTreeSet<(String, i32)>) -> Vec<File> {
    let api: Vec<&str> = schema
        .messages_of("api.proto")
        .iter()
        .map(String::as_str)
        .filter(|name| name.ends_with("Request") || name.ends_with("Reply"))
        .collect();
    vec![
        File {
            name: "client_frames.txt",
            about: "Frames from a client, with their length prefix.",
            vectors: of_members(schema, "ClientFrame", covered, Wrap::LengthPrefix),
        },
        File {
            name: "server_frames.txt",
            about: "Frames from a server, with their length prefix.",
            vectors: of_members(schema, "ServerFrame", covered, Wrap::LengthPrefix),
        },
        File { name: "bodies.txt", about: "Bodies.", vectors: of_members(schema, "Body", covered, Wrap::Nothing) },
        File {
            name: "api.txt",
            about: "Requests and replies of the api.",
            vectors: of_messages(schema, &api, covered),
        },
        File {
            name: "gateway_batches.txt",
            about: "From a gateway to a router: the hello of a link, and a batch of each message.",
            vectors: [
                of_messages(schema, &["LinkHello"], covered),
                of_members(schema, "GatewayMessage", covered, Wrap::Batch("GatewayBatch")),
            ]
            .into_iter()
            .flatten()
            .collect(),
        },
        File {
            name: "router_batches.txt",
            about: "From a router to a gateway: a batch of each message.",
            vectors: of_members(schema, "RouterMessage", covered, Wrap::Batch("RouterBatch")),
        },
        File {
            name: "peer_batches.txt",
            about: "Between routers: a batch of each message.",
            vectors: of_members(schema, "PeerMessage", covered, Wrap::Batch("PeerBatch")),
        },
        File {
            name: "link_items.txt",
            about: "What travels on links over gRPC.",
            vectors: ["GatewayLinkItem", "RouterLinkItem", "PeerLinkItem"]
                .into_iter()
                .flat_map(|item| of_members(schema, item, covered, Wrap::Nothing))
                .collect(),
        },
    ]
}

fn render(file: &File) -> String {
    let mut out = format!(
        "# {}\n# A vector is a line `= NAME (MESSAGE)`, then its bytes in hexadecimal digits; what follows a `#` is a comment.\n",
        file.about
    );
    for vector in &file.vectors {
        write!(out, "\n= {} ({})\n{}", vector.name, vector.message, vector.text).expect("a string");
    }
    out
}

/// Name, message and bytes of each vector of a file.
fn load(file: &str) -> Vec<(String, String, Vec<u8>)> {
    let text = fs::read_to_string(path(file)).expect("the file of vectors");
    let mut vectors: Vec<(String, String, Vec<u8>)> = Vec::new();
    for line in text.lines() {
        if let Some((name, message)) = line.strip_prefix("= ").and_then(|head| head.rsplit_once(' ')) {
            vectors.push((name.to_owned(), message.trim_matches(['(', ')']).to_owned(), Vec::new()));
            continue;
        }
        let digits: String = line.split('#').next().unwrap_or_default().split_whitespace().collect();
        for at in (0..digits.len()).step_by(2) {
            let byte = u8::from_str_radix(&digits[at..at + 2], 16).expect("hexadecimal digits");
            vectors.last_mut().expect("a name first").2.push(byte);
        }
    }
    vectors
}

const FILES: [&str; 8] = [
    "client_frames.txt",
    "server_frames.txt",
    "bodies.txt",
    "api.txt",
    "gateway_batches.txt",
    "router_batches.txt",
    "peer_batches.txt",
    "link_items.txt",
];

#[test]
fn the_vectors_are_what_the_schema_says() {
    let schema = Schema::load();
    for file in files(&schema, &mut BTreeSet::new()) {
        let rendered = render(&file);
        if std::env::var_os("IM_WRITE_VECTORS").is_some() {
            fs::write(path(file.name), &rendered).expect("written");
        }
        let golden = fs::read_to_string(path(file.name)).unwrap_or_default();
        let different = golden.lines().zip(rendered.lines()).find(|(golden, now)| golden != now);
        assert_eq!(different, None, "{}: the golden bytes and those of the schema differ", file.name);
        assert_eq!(golden, rendered, "{}: something was added; see the head of this test's source", file.name);
        let loaded: Vec<Vec<u8>> = load(file.name).into_iter().map(|(_, _, bytes)| bytes).collect();
        assert_eq!(loaded, file.vectors.into_iter().map(|vector| vector.bytes).collect::<Vec<_>>());
    }
}

#[test]
fn the_vectors_hold_every_field_of_every_message() {
    let schema = Schema::load();
    let mut covered = BTreeSet::new();
    files(&schema, &mut covered);
    for message in schema.message_names() {
        // A batch has a list of messages, one of each in its vectors; `Method` is an option of the schema, never on the wire.
        if message.ends_with("Batch") || message == "Method" {
            continue;
        }
        for field in &schema.message(message).field {
            assert!(covered.contains(&(message.to_owned(), field.number())), "{message}.{}", field.name());
        }
    }
}

#[test]
fn every_vector_decodes_and_encodes_to_the_same_bytes() {
    for file in FILES {
        for (name, message, bytes) in load(file) {
            let payload = if message.ends_with("Frame") { &bytes[frame::PREFIX_BYTES..] } else { &bytes };
            assert_eq!(reencode(&message, payload), Ok(payload.to_vec()), "{name}");
        }
    }
}

#[test]
fn every_frame_vector_is_split_and_decoded_as_its_member() {
    for file in ["client_frames.txt", "server_frames.txt"] {
        for (name, message, bytes) in load(file) {
            let mut input = BytesMut::from(bytes.as_slice());
            let payload = frame::split_frame(&mut input, 1024).expect("a good length").expect("whole");
            assert!(input.is_empty(), "{name}");
            let known = match message.as_str() {
                "ClientFrame" => matches!(frame::decode_client_frame(payload), Ok(Decoded::Frame(_))),
                _ => matches!(frame::decode_server_frame(payload), Ok(Decoded::Frame(_))),
            };
            assert!(known, "{name}");
        }
    }
}

#[test]
fn a_frame_cut_at_any_byte_is_incomplete_and_its_payload_malformed() {
    for file in ["client_frames.txt", "server_frames.txt"] {
        for (name, message, bytes) in load(file) {
            for length in 0..bytes.len() {
                let mut input = BytesMut::from(&bytes[..length]);
                assert_eq!(frame::split_frame(&mut input, 1024), Ok(None), "{name} cut at {length}");
            }
            let payload = Bytes::from(bytes).slice(frame::PREFIX_BYTES..);
            for length in 1..payload.len() {
                let cut = payload.slice(..length);
                let malformed = match message.as_str() {
                    "ClientFrame" => frame::decode_client_frame(cut).is_err(),
                    _ => frame::decode_server_frame(cut).is_err(),
                };
                assert!(malformed, "{name}: payload cut at {length}");
            }
        }
    }
}

#[test]
fn a_message_cut_at_any_byte_is_malformed_or_a_shorter_message() {
    for file in FILES {
        for (_, message, bytes) in load(file).into_iter().filter(|(_, message, _)| !message.ends_with("Frame")) {
            for length in 0..bytes.len() {
                if let Ok(encoded) = reencode(&message, &bytes[..length]) {
                    assert!(encoded.len() <= length);
                }
            }
        }
    }
}

#[test]
fn the_bodies_of_the_vectors_pass_but_for_events() {
    for (name, _, bytes) in load("bodies.txt") {
        let is_event = name.starts_with("Body.event");
        assert_eq!(
            im_proto::body::validate(&bytes).is_err(),
            is_event,
            "{name}: {:?}",
            im_proto::body::validate(&bytes)
        );
    }
}

mod hashes {
    //! `vectors/hashes.txt`: what every implementation must compute alike.

    use std::collections::BTreeMap;

    use im_proto::{
        ConversationId, InstanceId, ShardCount, ShardId, UserId,
        key::{ClusterSecret, RouterSecret, parse_secret},
        shard::{rendezvous_owner, rendezvous_weight},
        v1,
    };
    use prost::Message as _;

    /// The golden lines: a name, then `key=value` pairs, the last of them the result.
    fn lines() -> Vec<(String, BTreeMap<String, String>)> {
        let text = std::fs::read_to_string(super::path("hashes.txt")).expect("the file of vectors");
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines
            .map(|line| {
                let mut words = line.split_whitespace();
                let name = words.next().expect("a name").to_owned();
                let pairs = words.map(|word| word.split_once('=').expect("key=value"));
                (name, pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
            })
            .collect()
    }

    fn bytes(digits: &str) -> Vec<u8> {
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).expect("digits")).collect()
    }

    fn check(name: &str, values: &BTreeMap<String, String>) {
        let value = |key: &str| values.get(key).unwrap_or_else(|| panic!("{name} has no {key}")).as_str();
        let user = |key: &str| UserId::parse(value(key)).expect("a user id");
        let cluster = || ClusterSecret::new(parse_secret(value("secret")).expect("a secret"));
        let conversation = || value("conversation").parse::<ConversationId>().expect("a conversation id");
        let instance = |name: &str| InstanceId::parse(name).expect("an instance id");
        let shard = || ShardId(value("shard").parse().expect("a number"));
        let (found, result) = match name {
            "direct" => (cluster().direct_id(&user("one"), &user("other")).to_string(), "id"),
            "self" => (cluster().self_id(&user("user")).to_string(), "id"),
            "group" => (cluster().group_id(&user("creator"), &bytes(value("key"))).to_string(), "id"),
            "channel" => (cluster().channel_id(&user("creator"), &bytes(value("key"))).to_string(), "id"),
            "shard" => {
                let count = ShardCount::new(value("count").parse().expect("a number")).expect("in range");
                (count.shard_of(&conversation()).0.to_string(), "shard")
            }
            "rendezvous_weight" => {
                (format!("{:016x}", rendezvous_weight(shard(), &instance(value("instance")))), "weight")
            }
            "rendezvous_owner" => {
                let instances: Vec<InstanceId> = value("instances").split(',').map(instance).collect();
                (rendezvous_owner(shard(), &instances).expect("an owner").to_string(), "owner")
            }
            "capability" => {
                let secret = RouterSecret::new(parse_secret(value("secret")).expect("a secret"));
                let identity = v1::Identity::decode(bytes(value("identity")).as_slice()).expect("an identity");
                let capability = secret.capability(&identity);
                assert_eq!(capability.identity, bytes(value("identity")));
                (capability.mac.iter().map(|byte| format!("{byte:02x}")).collect(), "mac")
            }
            other => panic!("no such vector: {other}"),
        };
        assert_eq!(found, value(result), "{name} {values:?}");
    }

    #[test]
    fn every_hash_is_what_it_always_was() {
        let lines = lines();
        for (name, values) in &lines {
            check(name, values);
        }
        for name in
            ["direct", "self", "group", "channel", "shard", "rendezvous_weight", "rendezvous_owner", "capability"]
        {
            assert!(lines.iter().filter(|(line, _)| line == name).count() >= 2, "two vectors of {name}");
        }
    }
}
