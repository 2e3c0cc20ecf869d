//! Channels as people and other services have them: `im` as a process, and gRPC, on a real server and across a kill.

use std::{path::Path, process::Command};

use im_proto::v1::{
    self, channel_service_client::ChannelServiceClient, conversation_service_client::ConversationServiceClient,
    message_service_client::MessageServiceClient,
};
use tonic::Code;

use crate::{
    api::{as_user, channel, to},
    server::{ANY, Server},
};

/// Runs `im` to its end: its exit code, what it printed, what it said.
fn im(data: &Path, user: &str, arguments: &[&str]) -> (i32, String, String) {
    let all = [["--as", user, "--data", data.to_str().unwrap()].as_slice(), arguments].concat().join("\n");
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "chat::im_as_a_process", "--ignored", "--nocapture", "--quiet"])
        .env_clear()
        .env(crate::chat::ARGUMENTS, all)
        .output()
        .expect("this test starts itself");
    let printed = String::from_utf8(output.stdout).unwrap();
    // What the test runner says of itself comes first.
    let printed = printed.trim_start().strip_prefix("running 1 test\n").unwrap_or(&printed).to_owned();
    (output.status.code().unwrap_or(-1), printed, String::from_utf8(output.stderr).unwrap())
}

#[test]
fn one_posts_by_im_and_others_subscribe_read_and_leave_across_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let server = Server::start(&data, &ANY);
    let (code, printed, said) = im(&data, "alice", &["channel", "create", "news", "@dave"]);
    assert_eq!(code, 0, "{said}");
    let id = printed.trim().to_owned();
    assert_eq!(id.len(), 32, "{printed:?}");
    assert_eq!(im(&data, "bob", &["channel", "subscribe", &id]).1.trim(), id);
    assert_eq!(im(&data, "alice", &["channel", "post", &id, "Hello,", "all"]).1.trim(), "2");
    assert_eq!(im(&data, "dave", &["send", &id, "and", "from", "me"]).1.trim(), "3");
    let (code, _, said) = im(&data, "bob", &["channel", "post", &id, "may", "I?"]);
    assert_eq!(code, 1);
    assert!(said.contains("forbidden"), "{said}");
    drop(server);
    let server = Server::start(&data, &ANY);
    let row = format!("{id}\tchannel\tnews\t3\t2\t0");
    assert!(im(&data, "bob", &["list"]).1.lines().any(|line| line == row));
    let history = ["history", &id, "--from", "2"];
    assert_eq!(im(&data, "carol", &history).1, "Hello, all\nand from me\n", "without a subscription");
    assert_eq!(im(&data, "carol", &["group", "members", &id]).1, "alice\towner\ndave\tadmin\n");
    assert_eq!(im(&data, "bob", &["channel", "unsubscribe", &id]).0, 0);
    assert!(!im(&data, "bob", &["list"]).1.contains(&id));
    let (code, _, said) = im(&data, "dave", &["channel", "unsubscribe", &id]);
    assert_eq!(code, 1, "a writer leaves");
    assert!(said.contains("forbidden"), "{said}");
    assert_eq!(im(&data, "dave", &["group", "leave", &id]).1.trim(), "4");
    let (code, _, said) = im(&data, "bob", &["channel", "subscribe", &"0".repeat(32)]);
    assert_eq!(code, 1);
    assert!(said.contains("not found"), "{said}");
    drop(server);
}

#[tokio::test]
async fn another_service_makes_a_channel_and_subscribes_somebody() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let (alice, bob, channel) = (server.token("alice"), server.token("bob"), channel(&server).await);
    let mut channels = ChannelServiceClient::new(channel.clone());
    let create = v1::ChannelCreateRequest { key: "k".into(), name: "news".to_owned(), writers: Vec::new() };
    let made = channels.create(as_user(&alice, create)).await.unwrap().into_inner();
    let id = made.conversation_id;
    let subscribe = v1::ChannelSubscribeRequest { conversation_id: id.clone(), client_message_id: "s1".into() };
    let first = channels.subscribe(as_user(&bob, subscribe.clone())).await.unwrap().into_inner();
    let again = channels.subscribe(as_user(&bob, subscribe)).await.unwrap().into_inner();
    assert_eq!((first.own_seq, again.own_seq), (1, 1));
    let mut messages = MessageServiceClient::new(channel.clone());
    let send = |name: &'static str| v1::SendRequest {
        target: to(v1::target::Target::ConversationId(id.clone())),
        client_message_id: name.into(),
        body: im_proto::body::text(name),
        known_seq: 0,
    };
    assert_eq!(messages.send(as_user(&alice, send("m1"))).await.unwrap().into_inner().seq, 2);
    assert_eq!(messages.send(as_user(&bob, send("m2"))).await.unwrap_err().code(), Code::PermissionDenied);
    let mut conversations = ConversationServiceClient::new(channel);
    let list = conversations.sync(as_user(&bob, v1::SyncRequest::default())).await.unwrap().into_inner();
    let row = list.conversations.iter().find(|row| row.conversation_id == id).unwrap();
    assert_eq!((row.kind(), row.head, row.unread), (v1::ConversationKind::Channel, 2, 1));
    let leave = v1::ChannelUnsubscribeRequest { conversation_id: id, client_message_id: "u1".into() };
    assert_eq!(channels.unsubscribe(as_user(&bob, leave)).await.unwrap().into_inner().own_seq, 2);
}
