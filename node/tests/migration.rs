//! A client that changes its network in the middle of a conversation: QUIC keeps the session.

use std::{net::SocketAddr, time::Duration};

use im_client::{Client, ClientConfig, Endpoint, Event, FollowAll, Target, Transport, Trust};
use im_proto::body;
use tokio::{
    net::UdpSocket,
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};

use crate::server::{ANY, Server};

const PATIENCE: Duration = Duration::from_secs(60);
const LOOPBACK: &str = "127.0.0.1:0";
/// Each way.
const MESSAGES: u64 = 200;
/// Messages between one address and the next.
const MOVE_EVERY: u64 = 40;

/// A network between one client and the server, whose address towards the server can change, as behind a router at home that was
/// given another one: what is still on its way to the old address is lost.
struct Relay {
    address: SocketAddr,
    moves: mpsc::Sender<oneshot::Sender<SocketAddr>>,
    _task: JoinSet<()>,
}

impl Relay {
    async fn to(server: String) -> Self {
        let near = UdpSocket::bind(LOOPBACK).await.unwrap();
        let address = near.local_addr().unwrap();
        let (moves, asked) = mpsc::channel(1);
        let mut task = JoinSet::new();
        task.spawn(carry(near, server, asked));
        Self { address, moves, _task: task }
    }

    /// The server's word for the client from now on.
    async fn changes_address(&self) -> SocketAddr {
        let (done, changed) = oneshot::channel();
        self.moves.send(done).await.unwrap();
        changed.await.unwrap()
    }
}

async fn towards(server: &str) -> UdpSocket {
    let far = UdpSocket::bind(LOOPBACK).await.unwrap();
    far.connect(server).await.unwrap();
    far
}

async fn carry(near: UdpSocket, server: String, mut asked: mpsc::Receiver<oneshot::Sender<SocketAddr>>) {
    let (mut far, mut client) = (towards(&server).await, None);
    let (mut up, mut down) = (vec![0; 65_536], vec![0; 65_536]);
    loop {
        tokio::select! {
            biased;
            Some(done) = asked.recv() => {
                // The old socket lives until the new one has a port, so that the two differ.
                far = towards(&server).await;
                let _ = done.send(far.local_addr().unwrap());
            }
            Ok((count, from)) = near.recv_from(&mut up) => {
                client = Some(from);
                let _ = far.send(&up[..count]).await;
            }
            Ok(count) = far.recv(&mut down) => {
                if let Some(client) = client {
                    let _ = near.send_to(&down[..count], client).await;
                }
            }
        }
    }
}

/// What a client heard: the messages of others, and how often it was connected and disconnected.
async fn hear(mut events: mpsc::Receiver<Event>) -> (Vec<u64>, usize, Vec<String>) {
    let (mut seqs, mut connects, mut disconnects) = (Vec::new(), 0, Vec::new());
    while seqs.len() < usize::try_from(MESSAGES).unwrap() {
        match events.recv().await.expect("the client goes on") {
            Event::Message(entry) if !entry.own && entry.sender.is_some() => seqs.push(entry.seq),
            Event::Connected { .. } => connects += 1,
            Event::Disconnected { reason } => disconnects.push(reason),
            _ => {}
        }
    }
    (seqs, connects, disconnects)
}

#[tokio::test]
async fn a_quic_client_whose_address_changes_keeps_its_session() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let relay = Relay::to(server.address("quic")).await;
    let ca = std::fs::read(server.data.join(server.address("ca"))).unwrap();
    let endpoint = Endpoint::new(Transport::Quic, relay.address.to_string()).unwrap();
    let mut config = ClientConfig::new(vec![endpoint], server.token("alice"), &Trust::Pinned(ca)).unwrap();
    config.follow_all = FollowAll::FromStart;
    let alice = Client::connect(config).await.unwrap();
    let bob = server.client("bob").await;
    let mut hearing = JoinSet::new();
    hearing.spawn(hear(alice.events().unwrap()));

    let (to_bob, to_alice) = (Target::peer("bob").unwrap(), Target::peer("alice").unwrap());
    let mut addresses = Vec::new();
    let mut from_bob = Vec::new();
    for number in 1..=MESSAGES {
        if number % MOVE_EVERY == 0 {
            addresses.push(relay.changes_address().await);
        }
        // In both directions, and the first one to speak from the new address is at times the server.
        let (one, other) = (body::text(format!("a{number}")), body::text(format!("b{number}")));
        let both = async { tokio::join!(bob.send(to_alice.clone(), other), alice.send(to_bob.clone(), one)) };
        let (sent, said) = timeout(PATIENCE, both).await.expect("both are acknowledged");
        said.unwrap();
        from_bob.push(sent.unwrap().seq);
    }
    let heard = timeout(PATIENCE, hearing.join_next()).await.expect("all of it arrives").unwrap().unwrap();
    let (seqs, connects, disconnects) = heard;
    addresses.sort();
    addresses.dedup();
    assert!(addresses.len() as u64 >= MESSAGES / MOVE_EVERY - 1, "the address did change: {addresses:?}");
    assert_eq!(seqs, from_bob, "each once, in order");
    assert!(connects <= 1 && disconnects.is_empty(), "it connected again: {disconnects:?}");
    let accepted = "im_gateway_connections_accepted_total{transport=\"quic\"} 1\n";
    let metrics = server.get("/metrics");
    assert!(metrics.contains(accepted), "another connection was made");
}
