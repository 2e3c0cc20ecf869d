//! All data moves between stores, and is the same afterwards.

use std::{collections::BTreeSet, fs, path::Path};

use bytes::Bytes;
use im_client::{Client, Entry, Target};
use im_proto::{ConversationId, body};

use crate::{
    cluster::Cluster,
    server::{ANY, Server, code, imd, stderr, stdout},
};

const MESSAGES: u64 = 300;

/// A server on which alice has written to bob and to a group.
async fn filled(data: &Path) {
    let server = Server::start(data, &ANY);
    let alice = server.client("alice").await;
    let group = alice.create_group("trip", &[im_proto::UserId::parse("bob").unwrap()]).await.unwrap();
    for number in 1..=MESSAGES {
        alice.send(Target::peer("bob").unwrap(), body::text(format!("{number}"))).await.unwrap();
    }
    alice.send(group.into(), body::text("to all")).await.unwrap();
    alice.close().await;
    stop(server);
}

fn stop(mut server: Server) {
    server.signal("TERM");
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}

/// A conversation as a user sees it: id, name, head, unread, and every entry with all its bytes.
type Seen = (Bytes, String, u64, u64, Vec<Entry>);

/// All that bob can read.
async fn read_back(bob: Client) -> Vec<Seen> {
    let mut seen = Vec::new();
    for row in bob.conversations().await.unwrap() {
        let id = ConversationId::from_slice(&row.conversation_id).unwrap();
        let page = bob.history(id.into(), 1, 0, 1000, false).await.unwrap();
        assert_eq!((page.head, page.entries.len() as u64), (row.head, row.head), "{row:?}");
        seen.push((row.conversation_id, row.name, row.head, row.unread, page.entries));
    }
    bob.close().await;
    seen.sort_by(|one, other| one.0.cmp(&other.0));
    let heads: BTreeSet<u64> = seen.iter().map(|(_, _, head, ..)| *head).collect();
    assert!(heads.is_superset(&BTreeSet::from([2, MESSAGES])), "the group and what alice said: {heads:?}");
    seen
}

fn done(arguments: &[&str]) -> String {
    let output = imd(arguments);
    assert_eq!(code(&output), 0, "{arguments:?}: {}", stderr(&output));
    stdout(&output)
}

fn refused(arguments: &[&str], says: &str) {
    let output = imd(arguments);
    let said = stderr(&output);
    assert!(code(&output) == 2 && said.contains(says), "{arguments:?}: {said}");
}

fn copy_keys(from: &Path, to: &Path) {
    for file in ["signing.pk8", "verify.json"] {
        fs::copy(from.join("keys").join(file), to.join("keys").join(file)).unwrap();
    }
}

#[tokio::test]
async fn what_was_exported_and_imported_is_served_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (source, target, file) = (path("source"), path("target"), path("file.im"));
    filled(Path::new(&source)).await;
    let server = Server::start(Path::new(&source), &ANY);
    refused(&["export", "--data", &source, "--to", &file], "in use by another server");
    let before = read_back(server.client("bob").await).await;
    stop(server);

    let said = done(&["export", "--data", &source, "--to", &file]);
    assert!(said.contains("4 conversations"), "{said}");
    refused(&["export", "--data", &source, "--to", &file], "is there already");
    refused(&["export", "--data", &path("nowhere"), "--to", &path("none")], "there is no data directory");
    refused(&["import", "--data", &source, "--from", &file], "holds messages already");

    done(&["import", "--data", &target, "--from", &file]);
    copy_keys(Path::new(&source), Path::new(&target));
    let server = Server::start(Path::new(&target), &ANY);
    assert_eq!(read_back(server.client("bob").await).await, before);
    // Numbering goes on.
    let alice = server.client("alice").await;
    let sent = alice.send(Target::peer("bob").unwrap(), body::text("later")).await.unwrap();
    assert_eq!(sent.seq, MESSAGES + 1);
    alice.close().await;
    stop(server);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs etcd and CQL: run through deploy/test.sh"]
async fn one_server_becomes_a_cluster_and_back() {
    let _alone = crate::cluster::alone().await;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (source, file) = (path("source"), path("file.im"));
    filled(Path::new(&source)).await;
    let server = Server::start(Path::new(&source), &ANY);
    let before = read_back(server.client("bob").await).await;
    stop(server);
    let first = done(&["export", "--data", &source, "--to", &file]);

    // The directory of the server is that of the cluster's secrets.
    done(&["secrets", "--out", &source]);
    let cluster = Cluster::of_secrets(Path::new(&source));
    cluster.import(&file);
    let router = cluster.router("router1");
    let gateway = cluster.gateway("gateway1");
    assert_eq!(read_back(cluster.client("bob", &[&gateway]).await).await, before, "in the cluster");
    let again = path("again.im");
    cluster.refuse_export(&again, "stop all routers first");
    stop(router);
    stop(gateway);

    let second = cluster.export(&again);
    // How many state rows there are depends on who read meanwhile; what they say was compared.
    let totals = |said: &str| {
        let (_, totals) = said.split_once(" holds ").unwrap();
        totals.split(", ").filter(|total| !total.contains("state")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(totals(&first), totals(&second));
    let back = path("back");
    done(&["import", "--data", &back, "--from", &again]);
    copy_keys(Path::new(&source), Path::new(&back));
    let server = Server::start(Path::new(&back), &ANY);
    assert_eq!(read_back(server.client("bob").await).await, before);
    stop(server);
}
