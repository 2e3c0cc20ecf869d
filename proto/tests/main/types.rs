//! All generated message types by name, and the properties that hold for each.

use proptest::{collection::vec, prelude::*};
use prost::{DecodeError, Message};

use crate::{
    generate::{Entropy, random},
    schema::Schema,
};

fn reencoded<M: Message + Default>(bytes: &[u8]) -> Result<Vec<u8>, DecodeError> {
    M::decode(bytes).map(|message| message.encode_to_vec())
}

type Reencode = fn(&[u8]) -> Result<Vec<u8>, DecodeError>;

macro_rules! types {
    ($($name:ident)*) => {
        /// Decodes and encodes again, for each message.
        pub const TYPES: &[(&str, Reencode)] = &[$((stringify!($name), reencoded::<im_proto::v1::$name>)),*];
    };
}

types! {
    Method Body Text Mention Media Sticker Location ContactCard Quote Forward ForwardedEntry CallRecord Recalled Edited Reaction
    Custom SystemEvent GroupCreated ChannelCreated MembersJoined MemberLeft ConversationJoined ConversationLeft VisibilityChanged
    ClientFrame ServerFrame Status Hello Welcome Limits Ping Pong Send SendAck Message Received Signal Typing CustomSignal Receipt Presence Resync
    GoAway Call Reply Renew Renewed Close Refused
    Target SendRequest SendReply HistoryRequest HistoryReply HistoryEntry SyncRequest SyncHave SyncReply ConversationRow
    MemberCursor MarkReadRequest MarkReadReply SignalRequest SignalReply GroupCreateRequest GroupCreateReply GroupInviteRequest GroupInviteReply GroupLeaveRequest
    GroupLeaveReply GroupMembersRequest GroupMembersReply GroupMember LocateRequest LocateReply Endpoint
    DeviceListRequest DeviceListReply Device DeviceKickRequest DeviceKickReply
    PresenceReadRequest PresenceReadReply UserPresence PresenceSubscribeRequest PresenceSubscribeReply
    PresenceSetVisibilityRequest PresenceSetVisibilityReply
    ChannelCreateRequest ChannelCreateReply ChannelSubscribeRequest ChannelSubscribeReply ChannelUnsubscribeRequest
    ChannelUnsubscribeReply
    LinkHello Identity Capability GatewayBatch GatewayMessage SessionOpen SessionAnnounce SessionPresent SessionClose SessionRenew
    SessionSend SessionCall SessionReceived SessionSignal GatewayLoad AudienceWanted RouterBatch RouterMessage SessionOpened SessionRefused
    SessionRenewed SendResult Deliver AudienceSet AudienceDeliver SessionsMove LoadBound CallReply SessionsResync SessionKick SendReturned CapabilityWanted PeerBatch PeerMessage
    PeerFollow PeerUnfollow PeerAudienceDeliver PeerAudienceResync PeerAudienceGone PeerLoads PeerLoad Following PeerWatch PeerPresence PresenceList
    PeerDeliver PeerResyncShard PeerEffect PeerHeads PeerCall PeerAnswer HeadList Head
    GatewayLinkItem RouterLinkItem PeerLinkItem
}

pub fn reencode(name: &str, bytes: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let (_, reencode) = TYPES.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("no type {name}"));
    reencode(bytes)
}

#[test]
fn every_message_of_the_schema_is_tested() {
    let mut listed: Vec<&str> = TYPES.iter().map(|(name, _)| *name).collect();
    listed.sort_unstable();
    let schema = Schema::load();
    let declared: Vec<&str> = schema.message_names().collect();
    assert_eq!(listed, declared, "list a new message in types! of this file");
}

/// The source of a fuzz target.
fn fuzz_target(name: &str) -> String {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
    std::fs::read_to_string(folder.join(name)).expect("a fuzz target")
}

#[test]
fn what_every_method_carries_is_fuzzed() {
    let (schema, target) = (Schema::load(), fuzz_target("api.rs"));
    for method in im_proto::method::Method::ALL {
        let name = method.full_name().strip_prefix("im.v1.").expect("a method of this package");
        let (request, reply) = schema.method(name);
        for message in [request, reply] {
            assert!(target.contains(&format!("read::<v1::{message}>")), "{name}: {message} is not in api.rs");
        }
    }
}

#[test]
fn every_kind_of_link_is_fuzzed_as_a_batch_and_as_an_item() {
    for batch in Schema::load().message_names().filter(|name| name.ends_with("Batch")) {
        for (file, call) in [("link.rs", "take"), ("link_item.rs", "read")] {
            assert!(fuzz_target(file).contains(&format!("{call}::<v1::{batch}>")), "{batch} is not in {file}");
        }
    }
}

#[test]
fn every_fuzz_target_is_built() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).expect("a manifest");
    for file in std::fs::read_dir(folder.join("fuzz_targets")).expect("a folder") {
        let file = file.expect("a file").file_name().into_string().expect("a name");
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{file}\"")), "{file} is no [[bin]]");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_message_round_trips_and_ignores_unknown_fields(entropy in vec(any::<u8>(), 0..400)) {
        let schema = Schema::load();
        for (name, reencode) in TYPES {
            let message = random(&schema, name, &mut Entropy::new(&entropy));
            prop_assert_eq!(reencode(&message.plain), Ok(message.plain.clone()), "{}", name);
            prop_assert_eq!(reencode(&message.with_unknown_fields), Ok(message.plain.clone()), "{} with unknown fields", name);
        }
    }

    #[test]
    fn a_message_cut_or_changed_anywhere_never_panics(
        entropy in vec(any::<u8>(), 0..400),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let schema = Schema::load();
        for (name, reencode) in TYPES {
            let mut bytes = random(&schema, name, &mut Entropy::new(&entropy)).with_unknown_fields;
            if bytes.is_empty() {
                continue;
            }
            let at = at.index(bytes.len());
            let _ = reencode(&bytes[..at]);
            bytes[at] = byte;
            let _ = reencode(&bytes);
        }
    }
}
