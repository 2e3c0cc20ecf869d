//! The api over gRPC: the same dispatcher as `Call` on a client connection, the caller's token in the `authorization` metadata.

use std::sync::Arc;

use bytes::Bytes;
use im_proto::{
    FILE_DESCRIPTOR_SET, StatusCode, Timestamp,
    method::Method,
    status::{GRPC_CORRELATION_METADATA, GRPC_METADATA},
    v1::{
        self, channel_service_server as channel, conversation_service_server as conversation,
        device_service_server as device, group_service_server as group, message_service_server as message,
        placement_service_server as placement_server, presence_service_server as presence,
    },
};
use prost::Message;
use tokio::sync::oneshot;
use tonic::{Code, Request, Response, Status, server::NamedService, service::Routes};
use tonic_health::ServingStatus;

use crate::{
    Router, api,
    caller::Caller,
    cluster::Cluster,
    message::{AnswerValue, ReplyTo},
    placement,
};

/// Largest request.
const REQUEST_BYTES_MAX: usize = 1024 * 1024;

#[derive(Clone)]
struct Api {
    cluster: Arc<Cluster>,
}

impl Router {
    /// The api with health and reflection, for a gRPC server.
    pub async fn api_routes(&self) -> Result<Routes, tonic_reflection::server::Error> {
        let api = Api { cluster: self.cluster.clone() };
        let message = message::MessageServiceServer::new(api.clone()).max_decoding_message_size(REQUEST_BYTES_MAX);
        let conversation =
            conversation::ConversationServiceServer::new(api.clone()).max_decoding_message_size(REQUEST_BYTES_MAX);
        let group = group::GroupServiceServer::new(api.clone()).max_decoding_message_size(REQUEST_BYTES_MAX);
        let channel = channel::ChannelServiceServer::new(api.clone()).max_decoding_message_size(REQUEST_BYTES_MAX);
        let device = device::DeviceServiceServer::new(api.clone()).max_decoding_message_size(REQUEST_BYTES_MAX);
        let presence = presence::PresenceServiceServer::new(api.clone()).max_decoding_message_size(REQUEST_BYTES_MAX);
        let placement = placement_server::PlacementServiceServer::new(api).max_decoding_message_size(REQUEST_BYTES_MAX);
        let names = [
            name(&message),
            name(&conversation),
            name(&group),
            name(&channel),
            name(&device),
            name(&presence),
            name(&placement),
        ];
        let routes = self.health_and_reflection(&names).await?;
        let routes = routes.add_service(message).add_service(conversation).add_service(group).add_service(channel);
        let routes = routes.add_service(device);
        Ok(routes.add_service(presence).add_service(placement))
    }

    /// Health and reflection, to which a gRPC server adds the services that it names here. They and the server as a whole (the empty
    /// name) are `SERVING` until the router is asked to stop or has ended by itself.
    pub async fn health_and_reflection(
        &self,
        services: &[&'static str],
    ) -> Result<Routes, tonic_reflection::server::Error> {
        let (health, health_service) = tonic_health::server::health_reporter();
        let services: Vec<&'static str> = services.iter().copied().chain([""]).collect();
        for service in &services {
            health.set_service_status(*service, ServingStatus::Serving).await;
        }
        let (mut stopping, mut ended) = (self.stop.subscribe(), self.ended());
        self.cluster.environment.spawn(async move {
            tokio::select! {
                biased;
                // Nobody holds the router any more: it does not serve either.
                _ = ended.wait_for(Option::is_some) => {}
                _ = stopping.wait_for(|stopping| *stopping) => {}
            }
            for service in services {
                health.set_service_status(service, ServingStatus::NotServing).await;
            }
        });
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .build_v1()?;
        Ok(Routes::new(health_service).add_service(reflection))
    }
}

/// The full name of a service, as health checks name it.
fn name<S: NamedService>(_: &S) -> &'static str {
    S::NAME
}

impl Api {
    async fn call<Q: Message, A: Message + Default>(
        &self,
        method: Method,
        request: Request<Q>,
    ) -> Result<Response<A>, Status> {
        let caller = self.caller(&request)?;
        let bytes = Bytes::from(request.into_inner().encode_to_vec());
        let (sender, receiver) = oneshot::channel();
        api::call(&self.cluster, Arc::new(caller), method.number(), bytes, ReplyTo::Task(sender));
        match receiver.await {
            Ok(Ok(AnswerValue::Reply(reply) | AnswerValue::ReplyInOrder(reply))) => {
                let reply = A::decode(reply).map(Response::new);
                reply.map_err(|error| to_grpc(&self.cluster.mistake(&format!("a reply cannot be read: {error}"))))
            }
            Ok(Ok(_)) => Err(to_grpc(&self.cluster.mistake("the answer to a call is no reply"))),
            Ok(Err(status)) => Err(to_grpc(&status)),
            Err(_) => Err(Status::unavailable("the router is stopping; try another")),
        }
    }

    /// Identity comes from the token alone.
    fn caller<Q>(&self, request: &Request<Q>) -> Result<Caller, Status> {
        let token = request
            .metadata()
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim())
            .ok_or_else(|| {
                let text = "send the metadata `authorization: Bearer TOKEN`".to_owned();
                to_grpc(&v1::Status { text, ..StatusCode::Unauthenticated.to_status() })
            })?;
        let verified = self
            .cluster
            .verifier
            .verify(token, self.cluster.environment.clock.now())
            .map_err(|error| to_grpc(&v1::Status { text: error.to_string(), ..error.status().to_status() }))?;
        Ok(Caller {
            self_id: self.cluster.config.cluster_secret.self_id(&verified.user),
            user: verified.user,
            device: verified.device,
            platform: verified.platform,
            session: None,
            gateway_boot: 0,
            expires_at: verified.expires_at,
            opened_at: Timestamp::default(),
        })
    }
}

/// The gRPC code of a status, its number and its correlation id in the metadata.
fn to_grpc(status: &v1::Status) -> Status {
    let code = match StatusCode::from_number(status.code) {
        Some(StatusCode::Malformed | StatusCode::TooLarge) => Code::InvalidArgument,
        Some(StatusCode::Unauthenticated | StatusCode::TokenExpired | StatusCode::Revoked) => Code::Unauthenticated,
        Some(StatusCode::Forbidden | StatusCode::Blocked | StatusCode::Muted | StatusCode::NotAMember) => {
            Code::PermissionDenied
        }
        Some(StatusCode::NotFound | StatusCode::Gone) => Code::NotFound,
        Some(StatusCode::AlreadyExists) => Code::AlreadyExists,
        Some(StatusCode::PreconditionFailed | StatusCode::SyncFirst | StatusCode::OutOfOrder) => {
            Code::FailedPrecondition
        }
        Some(StatusCode::RateLimited | StatusCode::Overloaded) => Code::ResourceExhausted,
        Some(StatusCode::Unavailable | StatusCode::Draining) => Code::Unavailable,
        Some(StatusCode::UnknownMethod) => Code::Unimplemented,
        _ => Code::Internal,
    };
    let mut out = Status::new(code, status.text.clone());
    out.metadata_mut().insert(GRPC_METADATA, status.code.into());
    if let Ok(id) = status.correlation_id.parse()
        && !status.correlation_id.is_empty()
    {
        out.metadata_mut().insert(GRPC_CORRELATION_METADATA, id);
    }
    out
}

macro_rules! service {
    ($service:path { $($name:ident: $method:ident, $request:ident => $reply:ident;)* }) => {
        #[tonic::async_trait]
        impl $service for Api {
            $(
                async fn $name(&self, request: Request<v1::$request>) -> Result<Response<v1::$reply>, Status> {
                    self.call(Method::$method, request).await
                }
            )*
        }
    };
}

service!(message::MessageService {
    send: MessageSend, SendRequest => SendReply;
    history: MessageHistory, HistoryRequest => HistoryReply;
});

service!(conversation::ConversationService {
    sync: ConversationSync, SyncRequest => SyncReply;
    mark_read: ConversationMarkRead, MarkReadRequest => MarkReadReply;
    signal: ConversationSignal, SignalRequest => SignalReply;
});

service!(group::GroupService {
    create: GroupCreate, GroupCreateRequest => GroupCreateReply;
    invite: GroupInvite, GroupInviteRequest => GroupInviteReply;
    leave: GroupLeave, GroupLeaveRequest => GroupLeaveReply;
    members: GroupMembers, GroupMembersRequest => GroupMembersReply;
});

service!(channel::ChannelService {
    create: ChannelCreate, ChannelCreateRequest => ChannelCreateReply;
    subscribe: ChannelSubscribe, ChannelSubscribeRequest => ChannelSubscribeReply;
    unsubscribe: ChannelUnsubscribe, ChannelUnsubscribeRequest => ChannelUnsubscribeReply;
});

service!(device::DeviceService {
    list: DeviceList, DeviceListRequest => DeviceListReply;
    kick: DeviceKick, DeviceKickRequest => DeviceKickReply;
});

service!(presence::PresenceService {
    read: PresenceRead, PresenceReadRequest => PresenceReadReply;
    subscribe: PresenceSubscribe, PresenceSubscribeRequest => PresenceSubscribeReply;
    set_visibility: PresenceSetVisibility, PresenceSetVisibilityRequest => PresenceSetVisibilityReply;
});

#[tonic::async_trait]
impl placement_server::PlacementService for Api {
    async fn locate(&self, request: Request<v1::LocateRequest>) -> Result<Response<v1::LocateReply>, Status> {
        // Without a token anybody may ask; a wrong token is refused all the same.
        let caller = match request.metadata().contains_key("authorization") {
            true => Some(self.caller(&request)?),
            false => None,
        };
        Ok(Response::new(placement::locate(&self.cluster, caller.as_ref())))
    }
}
