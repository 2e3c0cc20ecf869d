//! Presence on a real server: clients that watch, one that hides, and a service that asks.

use std::time::Duration;

use im_client::{Event, Target};
use im_proto::{
    StatusCode, UserId, body,
    status::GRPC_METADATA,
    v1::{self, presence_service_client::PresenceServiceClient},
};
use tokio::sync::mpsc;
use tonic::Code;

use crate::{
    api::{as_user, channel},
    server::{ANY, Server},
};

/// The next word that says so.
async fn next(events: &mut mpsc::Receiver<Event>, online: bool) -> v1::UserPresence {
    let wait = async {
        loop {
            if let Event::Presence(mut users) = events.recv().await.expect("the client goes on")
                && let Some(user) = users.pop().filter(|user| user.online == online)
            {
                return user;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.expect("a word")
}

#[tokio::test]
async fn people_are_seen_to_come_hide_and_go_by_clients_and_not_through_services() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let alice = server.client("alice").await;
    let mut events = alice.events().unwrap();
    alice.send(Target::peer("bob").unwrap(), body::text("are you there?")).await.unwrap();
    let bob_id = UserId::parse("bob").unwrap();
    // The message may reach bob's own log a moment later; until then they share nothing.
    let mut known = Vec::new();
    let bob = server.client("bob").await;
    while known.is_empty() {
        known = alice.watch_presence(std::slice::from_ref(&bob_id)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    if !known[0].online {
        next(&mut events, true).await;
    }

    bob.set_invisible(true).await.unwrap();
    let hidden = next(&mut events, false).await;
    assert!(hidden.last_seen_ms > 0);
    let read = alice.presence(std::slice::from_ref(&bob_id)).await.unwrap();
    assert_eq!(read, [hidden], "who reads knows the same");
    let own = bob.presence(std::slice::from_ref(&bob_id)).await.unwrap();
    assert!(own[0].online && own[0].invisible);

    let (token, mut service) = (server.token("bob"), PresenceServiceClient::new(channel(&server).await));
    let watch = v1::PresenceSubscribeRequest { user_ids: vec!["alice".to_owned()] };
    let refused = service.subscribe(as_user(&token, watch)).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "there is no session to tell");
    let number = StatusCode::Forbidden.number().to_string();
    assert_eq!(refused.metadata().get(GRPC_METADATA).unwrap().to_str().unwrap(), number);
    let seen = v1::PresenceSetVisibilityRequest { invisible: false };
    assert!(service.set_visibility(as_user(&token, seen)).await.unwrap().into_inner().seq > 0);
    next(&mut events, true).await;
    bob.close().await;
    next(&mut events, false).await;
}
