//! The api over gRPC, on a real server: what another service does.

use bytes::Bytes;
use im_proto::{
    StatusCode,
    status::GRPC_METADATA,
    v1::{
        self, conversation_service_client::ConversationServiceClient, group_service_client::GroupServiceClient,
        message_service_client::MessageServiceClient, placement_service_client::PlacementServiceClient,
    },
};
use prost::Message as _;
use tonic::{Code, Request, transport::Channel};

use crate::server::{ANY, Server};

pub async fn channel(server: &Server) -> Channel {
    Channel::from_shared(format!("http://{}", server.address("api"))).unwrap().connect().await.unwrap()
}

pub fn as_user<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

pub fn to(target: v1::target::Target) -> Option<v1::Target> {
    Some(v1::Target { target: Some(target) })
}

fn text(text: &str) -> Bytes {
    let content = v1::body::Content::Text(v1::Text { text: text.to_owned(), ..v1::Text::default() });
    v1::Body { content: Some(content) }.encode_to_vec().into()
}

#[tokio::test]
async fn what_a_service_sends_is_what_a_client_reads_once() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let (alice, channel) = (server.token("alice"), channel(&server).await);
    let mut messages = MessageServiceClient::new(channel.clone());
    let send = v1::SendRequest {
        target: to(v1::target::Target::PeerUserId("bob".to_owned())),
        client_message_id: Bytes::from_static(b"once"),
        body: text("from a service"),
        known_seq: 0,
    };
    let first = messages.send(as_user(&alice, send.clone())).await.unwrap().into_inner();
    let again = messages.send(as_user(&alice, send.clone())).await.unwrap().into_inner();
    assert_eq!((first.seq, again.seq, &first.conversation_id), (1, 1, &again.conversation_id));
    let other = v1::SendRequest { body: text("something else"), ..send };
    assert_eq!(messages.send(as_user(&alice, other)).await.unwrap_err().code(), Code::FailedPrecondition);

    let page =
        server.client("bob").await.history(im_client::Target::peer("alice").unwrap(), 1, 0, 0, false).await.unwrap();
    assert_eq!((page.head, &page.entries[0].body), (1, &text("from a service")));

    let mut conversations = ConversationServiceClient::new(channel);
    let bob = server.token("bob");
    let list = conversations.sync(as_user(&bob, v1::SyncRequest::default())).await.unwrap().into_inner();
    let row = list.conversations.iter().find(|row| row.conversation_id == first.conversation_id).unwrap();
    assert_eq!((row.head, row.unread, row.peer_user_id.as_str()), (1, 1, "alice"));
}

#[tokio::test]
async fn a_group_and_a_place_to_connect_are_there_for_services_too() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let (alice, channel) = (server.token("alice"), channel(&server).await);
    let mut groups = GroupServiceClient::new(channel.clone());
    let create = v1::GroupCreateRequest {
        key: Bytes::from_static(b"key"),
        name: "trip".to_owned(),
        members: vec!["bob".to_owned()],
    };
    let group = groups.create(as_user(&alice, create)).await.unwrap().into_inner();
    let ask = v1::GroupMembersRequest {
        conversation_id: group.conversation_id.clone(),
        ..v1::GroupMembersRequest::default()
    };
    let members = groups.members(as_user(&alice, ask.clone())).await.unwrap().into_inner();
    assert_eq!((members.total, members.name.as_str()), (2, "trip"));
    let stranger = groups.members(as_user(&server.token("mallory"), ask)).await.unwrap_err();
    assert_eq!(stranger.code(), Code::NotFound, "what one may not read looks as if it were not there");

    let mut placement = PlacementServiceClient::new(channel);
    let located = placement.locate(as_user(&alice, v1::LocateRequest {})).await.unwrap().into_inner();
    let mut offered: Vec<_> = located.endpoints.iter().map(|endpoint| endpoint.transport.as_str()).collect();
    offered.sort_unstable();
    assert_eq!(offered, ["quic", "tcp", "tls"]);
    assert!(placement.locate(v1::LocateRequest {}).await.is_ok(), "also without a token");
}

#[tokio::test]
async fn without_a_good_token_nothing_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let foreign = Server::start(&folder.path().join("other"), &ANY).token("alice");
    let mut messages = MessageServiceClient::new(channel(&server).await);
    let ask = v1::HistoryRequest { target: to(v1::target::Target::PeerUserId("bob".to_owned())), ..Default::default() };
    let number = |refused: &tonic::Status, why: &str| {
        assert_eq!(refused.code(), Code::Unauthenticated, "{why}: {refused}");
        refused.metadata().get(GRPC_METADATA).expect("a status of ours").to_str().unwrap().to_owned()
    };
    let unauthenticated = StatusCode::Unauthenticated.number().to_string();
    assert_eq!(number(&messages.history(ask.clone()).await.unwrap_err(), "no token"), unauthenticated);
    for token in ["", "nonsense", "a.b.c", &foreign] {
        let refused = messages.history(as_user(token, ask.clone())).await.unwrap_err();
        assert_eq!(number(&refused, token), unauthenticated);
    }
    let mut small = as_user(&server.token("alice"), ask.clone());
    let token = small.metadata().get("authorization").unwrap().to_str().unwrap().replace("Bearer", "bearer");
    small.metadata_mut().insert("authorization", token.parse().unwrap());
    let stranger = messages.history(small).await.unwrap_err();
    assert_eq!(stranger.code(), Code::NotFound, "the name of the scheme has no case");
    let (head, signature) = foreign.rsplit_once('.').unwrap();
    let unsigned = format!("{head}.");
    let refused = messages.history(as_user(&unsigned, ask)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "without {signature}");
}
