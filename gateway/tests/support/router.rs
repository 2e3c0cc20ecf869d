//! A router in the hands of the test.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use im_proto::{
    InstanceId, StatusCode, frame,
    link::channel::{LinkItem, RouterEnd},
    v1,
};
use tokio::time::timeout;

use super::{CLUSTER, FromGateway, FromRouter, PATIENCE, ServerFrame};

/// The router's end of a link.
pub struct Router {
    pub name: InstanceId,
    end: RouterEnd,
    next_number: u64,
    received: BTreeMap<u64, FromGateway>,
    pub received_through: u64,
    pub peer: Option<v1::LinkHello>,
}

impl Router {
    /// Before the hellos.
    pub fn new(name: InstanceId, end: RouterEnd) -> Self {
        Self { name, end, next_number: 1, received: BTreeMap::new(), received_through: 0, peer: None }
    }

    /// Says hello as this boot of the router, having received that much of the gateway's boot.
    pub async fn hello(&mut self, boot: u64, received_through: u64) {
        self.hello_of_cluster(CLUSTER, boot, received_through).await;
    }

    pub async fn hello_of_cluster(&mut self, cluster: &str, boot: u64, received_through: u64) {
        let Some(LinkItem::Hello(hello)) = self.end.receiver.recv().await else {
            panic!("the gateway says hello first")
        };
        let answer = v1::LinkHello {
            instance_id: self.name.as_str().to_owned(),
            boot_id: boot,
            peer_boot_id: hello.boot_id,
            received_through,
            cluster_id: cluster.to_owned(),
            shards: hello.shards,
            to_instance_id: String::new(),
        };
        self.received_through = received_through;
        self.peer = Some(hello);
        self.end.sender.send(LinkItem::Hello(answer)).await.expect("the gateway listens");
    }

    /// The next message of the gateway, loads left out.
    pub async fn next(&mut self) -> FromGateway {
        timeout(PATIENCE, self.next_or_end()).await.expect("a message in time").expect("the link lives")
    }

    /// The next load.
    pub async fn next_load(&mut self) -> v1::GatewayLoad {
        match self.next_of_all().await.expect("the link lives") {
            FromGateway::Load(load) => load,
            other => panic!("expected a load, found {other:?}"),
        }
    }

    /// `None` when the link is closed.
    pub async fn next_or_end(&mut self) -> Option<FromGateway> {
        loop {
            match self.next_of_all().await? {
                FromGateway::Load(_) => {}
                message => return Some(message),
            }
        }
    }

    async fn next_of_all(&mut self) -> Option<FromGateway> {
        loop {
            if let Some((number, message)) = self.received.pop_first() {
                self.received_through = number;
                return Some(message);
            }
            let item = self.end.receiver.recv().await?;
            let LinkItem::Batch(batch) = item else { panic!("one hello a link") };
            for (number, message) in (batch.first_number..).zip(&batch.messages) {
                if number > self.received_through {
                    self.received.insert(number, message.message.clone().expect("a message"));
                }
            }
        }
    }

    /// Nothing but loads for a while.
    pub async fn is_silent(&mut self, time: Duration) {
        if let Ok(message) = timeout(time, self.next_or_end()).await {
            panic!("expected nothing, found {message:?}");
        }
    }

    pub async fn next_send(&mut self) -> v1::SessionSend {
        match self.next().await {
            FromGateway::Send(send) => send,
            other => panic!("expected a send, found {other:?}"),
        }
    }

    pub async fn say(&mut self, message: FromRouter) {
        self.say_all(vec![message]).await;
    }

    pub async fn say_all(&mut self, messages: Vec<FromRouter>) {
        let first_number = self.next_number;
        self.next_number += messages.len() as u64;
        self.say_numbered(first_number, messages).await;
    }

    pub async fn say_numbered(&mut self, first_number: u64, messages: Vec<FromRouter>) {
        let messages = messages.into_iter().map(|message| v1::RouterMessage { message: Some(message) }).collect();
        let batch = v1::RouterBatch { first_number, acknowledged_through: self.received_through, messages };
        timeout(PATIENCE, self.end.sender.send(LinkItem::Batch(Arc::new(batch))))
            .await
            .expect("the gateway reads")
            .expect("the link lives");
    }

    /// The number of its next message.
    pub fn next_number(&self) -> u64 {
        self.next_number
    }

    /// The next message gets this number.
    pub fn continue_at(&mut self, number: u64) {
        self.next_number = number;
    }

    pub async fn acknowledge(&mut self, send: &v1::SessionSend, seq: u64) {
        self.say(result(send, seq)).await;
    }
}

pub fn result(send: &v1::SessionSend, seq: u64) -> FromRouter {
    let inner = send.send.as_ref().expect("a send");
    let ack = v1::SendAck {
        client_message_id: inner.client_message_id.clone(),
        conversation_id: send.conversation_id.clone(),
        seq,
        sent_at_ms: 1,
        status: None,
    };
    FromRouter::SendResult(v1::SendResult { session_id: send.session_id, ack: Some(ack), attempt: send.attempt })
}

/// The owner refuses that try.
pub fn refusal(send: &v1::SessionSend, code: StatusCode) -> FromRouter {
    let FromRouter::SendResult(mut result) = result(send, 0) else { unreachable!() };
    result.ack.as_mut().expect("an ack").status = Some(code.to_status());
    FromRouter::SendResult(result)
}

/// A live message for sessions, with a body of this many bytes.
pub fn deliver(sessions: &[u64], seq: u64, body_bytes: usize) -> FromRouter {
    let message = v1::Message { seq, body: vec![0; body_bytes].into(), ..v1::Message::default() };
    let frame = frame::frame_to_bytes(&v1::ServerFrame::from(ServerFrame::Message(message)));
    FromRouter::Deliver(v1::Deliver { frame, session_ids: sessions.to_vec() })
}
