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
    Custom SystemEvent GroupCreated MembersJoined MemberLeft ConversationJoined ConversationLeft
    ClientFrame ServerFrame Status Hello Welcome Limits Ping Pong Send SendAck Message Received Signal Typing CustomSignal Receipt Resync
    GoAway Call Reply Renew Renewed Close Refused
    Target SendRequest SendReply HistoryRequest HistoryReply HistoryEntry SyncRequest SyncHave SyncReply ConversationRow
    MemberCursor MarkReadRequest MarkReadReply SignalRequest SignalReply GroupCreateRequest GroupCreateReply GroupInviteRequest GroupInviteReply GroupLeaveRequest
    GroupLeaveReply GroupMembersRequest GroupMembersReply GroupMember LocateRequest LocateReply Endpoint
    PresenceReadRequest PresenceReadReply UserPresence
    LinkHello Identity Capability GatewayBatch GatewayMessage SessionOpen SessionAnnounce SessionPresent SessionClose SessionRenew
    SessionSend SessionCall SessionReceived SessionSignal GatewayLoad AudienceWanted RouterBatch RouterMessage SessionOpened SessionRefused
    SessionRenewed SendResult Deliver AudienceSet AudienceDeliver SessionsMove LoadBound CallReply SessionsResync SessionKick SendReturned CapabilityWanted PeerBatch PeerMessage
    PeerFollow PeerUnfollow PeerAudienceDeliver PeerAudienceResync PeerAudienceGone PeerLoads PeerLoad Following
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
