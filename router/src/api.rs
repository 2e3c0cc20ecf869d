//! The one dispatcher of api calls, from gateways and from gRPC: declared audience, then the shard that answers.

use std::sync::Arc;

use bytes::Bytes;
use im_proto::{
    ConversationId, StatusCode, UserId, limits,
    method::{Audience, Method},
    v1,
};
use prost::Message as _;
use tokio::time::Instant;

use crate::{
    caller::Caller,
    cluster::Cluster,
    message::{AnswerValue, Call, ReplyTo, ShardMessage, TimedReply},
    placement,
    user_limits::Limited,
};

/// Handles a call of an authenticated client.
pub fn call(cluster: &Arc<Cluster>, caller: Arc<Caller>, number: u32, request: Bytes, reply_to: ReplyTo) {
    let Some(method) = Method::from_number(number) else {
        return cluster.answer(reply_to, Err(StatusCode::UnknownMethod.to_status()));
    };
    if !method.audience().contains(&Audience::Client) {
        return cluster.answer(reply_to, Err(StatusCode::Forbidden.to_status()));
    }
    let reply_to = ReplyTo::Timed(Box::new(TimedReply { method, since: Instant::now(), to: reply_to }));
    if let Err(status) = charge(cluster, &caller, method) {
        return cluster.answer(reply_to, Err(status));
    }
    if method == Method::PlacementLocate {
        let reply = placement::locate(cluster, Some(&caller)).encode_to_vec();
        return cluster.answer(reply_to, Ok(AnswerValue::Reply(reply.into())));
    }
    match conversation_of(cluster, &caller, method, &request) {
        Ok(id) => {
            let shard = cluster.shard_of(&id);
            cluster.send(shard, ShardMessage::Call(Call { caller, method, request }), reply_to);
        }
        Err(StatusCode::Internal) => {
            let status = cluster.mistake("a call that is answered here was sent to a conversation");
            cluster.answer(reply_to, Err(status));
        }
        Err(status) => cluster.answer(reply_to, Err(status.to_status())),
    }
}

/// A call costs what its method declares. A send by call is a send, and is charged where it is numbered.
fn charge(cluster: &Cluster, caller: &Caller, method: Method) -> Result<(), v1::Status> {
    match method {
        Method::MessageSend => Ok(()),
        method => cluster.user_limits.take(cluster, &caller.user, Limited::Calls, method.cost()),
    }
}

/// The conversation whose owner answers a call.
pub fn conversation_of(
    cluster: &Cluster,
    caller: &Caller,
    method: Method,
    request: &Bytes,
) -> Result<ConversationId, StatusCode> {
    macro_rules! decode {
        ($message:ty) => {
            <$message>::decode(request.clone()).map_err(|_| StatusCode::Malformed)?
        };
    }
    match method {
        Method::MessageSend => target(cluster, caller, decode!(v1::SendRequest).target),
        Method::MessageHistory => target(cluster, caller, decode!(v1::HistoryRequest).target),
        Method::ConversationMarkRead => target(cluster, caller, decode!(v1::MarkReadRequest).target),
        Method::ConversationSignal => target(cluster, caller, decode!(v1::SignalRequest).target),
        Method::ConversationSync
        | Method::PresenceRead
        | Method::PresenceSubscribe
        | Method::PresenceSetVisibility
        | Method::DeviceList
        | Method::DeviceKick => Ok(caller.self_id),
        // The list that a channel comes into or goes out of.
        Method::ChannelSubscribe | Method::ChannelUnsubscribe => Ok(caller.self_id),
        Method::ChannelCreate => {
            let key = key(decode!(v1::ChannelCreateRequest).key)?;
            Ok(cluster.config.cluster_secret.channel_id(&caller.user, &key))
        }
        Method::GroupCreate => {
            let key = key(decode!(v1::GroupCreateRequest).key)?;
            Ok(cluster.config.cluster_secret.group_id(&caller.user, &key))
        }
        Method::GroupInvite => id(&decode!(v1::GroupInviteRequest).conversation_id),
        Method::GroupLeave => id(&decode!(v1::GroupLeaveRequest).conversation_id),
        Method::GroupMembers => id(&decode!(v1::GroupMembersRequest).conversation_id),
        Method::PlacementLocate => Err(StatusCode::Internal),
    }
}

fn target(cluster: &Cluster, caller: &Caller, target: Option<v1::Target>) -> Result<ConversationId, StatusCode> {
    match target.and_then(|target| target.target) {
        Some(v1::target::Target::ConversationId(bytes)) => id(&bytes),
        Some(v1::target::Target::PeerUserId(peer)) => {
            let peer = UserId::parse(&peer).map_err(|_| StatusCode::Malformed)?;
            Ok(cluster.config.cluster_secret.direct_id(&caller.user, &peer))
        }
        None => Err(StatusCode::Malformed),
    }
}

/// What makes a creation idempotent.
fn key(key: Bytes) -> Result<Bytes, StatusCode> {
    match key.len() {
        0 => Err(StatusCode::Malformed),
        bytes if bytes > limits::CLIENT_MESSAGE_ID_BYTES_MAX => Err(StatusCode::TooLarge),
        _ => Ok(key),
    }
}

fn id(bytes: &[u8]) -> Result<ConversationId, StatusCode> {
    ConversationId::from_slice(bytes).map_err(|_| StatusCode::Malformed)
}
