//! What a call carries: every type of request, which servers read, and of reply, which clients read, from the same bytes.
//!
//! A test of `im-proto` holds the list against the table of methods.
#![no_main]

use im_proto::{method::Method, v1};
use libfuzzer_sys::fuzz_target;
use prost::Message;

fn read<M: Message + Default>(data: &[u8]) {
    if let Ok(message) = M::decode(data) {
        let encoded = message.encode_to_vec();
        assert_eq!(M::decode(encoded.as_slice()).map(|again| again.encode_to_vec()), Ok(encoded));
    }
}

fuzz_target!(|data: (u32, &[u8])| {
    let (number, data) = data;
    assert!(Method::from_number(number).is_none_or(|method| method.number() == number));
    read::<v1::SendRequest>(data);
    read::<v1::HistoryRequest>(data);
    read::<v1::SyncRequest>(data);
    read::<v1::MarkReadRequest>(data);
    read::<v1::SignalRequest>(data);
    read::<v1::GroupCreateRequest>(data);
    read::<v1::GroupInviteRequest>(data);
    read::<v1::GroupLeaveRequest>(data);
    read::<v1::GroupMembersRequest>(data);
    read::<v1::LocateRequest>(data);
    read::<v1::PresenceReadRequest>(data);
    read::<v1::PresenceSubscribeRequest>(data);
    read::<v1::PresenceSetVisibilityRequest>(data);
    read::<v1::ChannelCreateRequest>(data);
    read::<v1::ChannelSubscribeRequest>(data);
    read::<v1::ChannelUnsubscribeRequest>(data);
    read::<v1::DeviceListRequest>(data);
    read::<v1::DeviceKickRequest>(data);
    read::<v1::SendReply>(data);
    read::<v1::HistoryReply>(data);
    read::<v1::SyncReply>(data);
    read::<v1::MarkReadReply>(data);
    read::<v1::SignalReply>(data);
    read::<v1::GroupCreateReply>(data);
    read::<v1::GroupInviteReply>(data);
    read::<v1::GroupLeaveReply>(data);
    read::<v1::GroupMembersReply>(data);
    read::<v1::LocateReply>(data);
    read::<v1::PresenceReadReply>(data);
    read::<v1::PresenceSubscribeReply>(data);
    read::<v1::PresenceSetVisibilityReply>(data);
    read::<v1::ChannelCreateReply>(data);
    read::<v1::ChannelSubscribeReply>(data);
    read::<v1::ChannelUnsubscribeReply>(data);
    read::<v1::DeviceListReply>(data);
    read::<v1::DeviceKickReply>(data);
});
