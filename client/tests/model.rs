//! A model of the server with random faults: it refuses, forgets, loses pushes and answers, breaks connections. Whatever it does,
//! what the client was told must agree with the log: every acknowledged send stands at its seq, once, in the order of the calls;
//! every followed conversation comes as its log, each entry once and in order.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use im_client::{Client, Endpoint, Event, FollowAll, Sent, Target};
use im_proto::{
    ConversationId, StatusCode, body,
    environment::Environment,
    method::Method,
    v1::{self, client_frame, server_frame},
};
use prost::Message as _;
use tokio::{sync::mpsc, time::Instant};

use crate::server::{Connection, ME, Server, conversation, environment, joined, message, own_log, sent_at_ms, welcome};

const CONVERSATIONS: u8 = 4;
const SENDS: usize = 300;
/// Entries that the owner remembers for repeats: few, so that `sync first` happens.
const REMEMBERED: u64 = 8;

/// All logs, and what an owner keeps in memory.
struct Model {
    environment: Environment,
    logs: BTreeMap<ConversationId, Vec<v1::Message>>,
    /// Conversations that exist for the client's list, in the order of its own log.
    listed: Vec<ConversationId>,
    /// What others have still to say.
    others: usize,
    /// One in so many steps goes wrong; 0: none.
    trouble: u64,
}

/// What a session may do next in the model.
enum Step {
    Answer(Box<server_frame::Frame>),
    Break,
}

impl Model {
    fn chance(&self, one_in: u64) -> bool {
        self.trouble > 0 && self.environment.random.next_u64().is_multiple_of(one_in * self.trouble)
    }

    fn head(&self, id: ConversationId) -> u64 {
        self.logs.get(&id).map_or(0, |log| log.len() as u64)
    }

    fn append(&mut self, id: ConversationId, sender: &str, client_message_id: Bytes, body: Bytes) -> v1::Message {
        let seq = self.head(id) + 1;
        let message = v1::Message { sender: sender.to_owned(), client_message_id, body, ..message(id, seq) };
        self.logs.entry(id).or_default().push(message.clone());
        message
    }

    /// Puts a conversation on the list: an entry of the user's own log.
    fn list(&mut self, id: ConversationId) -> v1::Message {
        self.listed.push(id);
        let seq = self.head(own_log()) + 1;
        let entry = joined(seq, id, &format!("peer-{}", id.as_bytes()[0]));
        self.logs.entry(own_log()).or_default().push(entry.clone());
        entry
    }

    fn place(&self, id: ConversationId, client_message_id: &Bytes, from: u64) -> Option<&v1::Message> {
        let log = self.logs.get(&id)?;
        let own = log.iter().filter(|entry| entry.sender == ME && entry.client_message_id == client_message_id);
        own.into_iter().find(|entry| entry.seq >= from)
    }

    /// The rules of an owner: repeat, order, append.
    fn send(&mut self, send: &v1::Send) -> v1::SendAck {
        let id = match &send.target {
            Some(v1::send::Target::ConversationId(bytes)) => ConversationId::from_slice(bytes).unwrap(),
            Some(v1::send::Target::PeerUserId(user)) => by_peer(user),
            None => panic!("a send without a target"),
        };
        let refused = |code: StatusCode| v1::SendAck {
            client_message_id: send.client_message_id.clone(),
            status: Some(code.to_status()),
            ..v1::SendAck::default()
        };
        if self.chance(4) {
            return refused(
                [StatusCode::Overloaded, StatusCode::Unavailable, StatusCode::RateLimited]
                    [usize::try_from(self.environment.random.next_u64() % 3).unwrap()],
            );
        }
        let head = self.head(id);
        let remembered_from = head.saturating_sub(REMEMBERED) + 1;
        if let Some(entry) = self.place(id, &send.client_message_id, remembered_from) {
            assert_eq!(entry.body, send.body);
            return accepted(id, entry);
        }
        // Neither remembered nor surely new.
        if send.known_seq + 1 < remembered_from {
            return refused(StatusCode::SyncFirst);
        }
        if !send.after.is_empty() && self.place(id, &send.after, 1).is_none() {
            return refused(StatusCode::OutOfOrder);
        }
        assert!(self.place(id, &send.client_message_id, 1).is_none(), "stored twice: known_seq {}", send.known_seq);
        let entry = self.append(id, ME, send.client_message_id.clone(), send.body.clone());
        accepted(id, &entry)
    }

    fn call(&self, call: &v1::Call) -> v1::Reply {
        let reply = if self.chance(4) {
            Err(StatusCode::Unavailable)
        } else if call.method == Method::ConversationSync.number() {
            Ok(self.sync(&v1::SyncRequest::decode(call.request.clone()).unwrap()).encode_to_vec())
        } else {
            self.history(&v1::HistoryRequest::decode(call.request.clone()).unwrap()).map(|reply| reply.encode_to_vec())
        };
        let (status, payload) = match reply {
            Ok(payload) => (None, payload.into()),
            Err(code) => (Some(code.to_status()), Bytes::new()),
        };
        v1::Reply { request_id: call.request_id, status, payload, last: true }
    }

    /// Two conversations a page.
    fn sync(&self, request: &v1::SyncRequest) -> v1::SyncReply {
        let start = request.page.first().copied().map_or(0, usize::from);
        let rows = self.listed.iter().skip(start).take(2).map(|id| v1::ConversationRow {
            conversation_id: id.to_bytes(),
            peer_user_id: format!("peer-{}", id.as_bytes()[0]),
            head: self.head(*id),
            first_seq: 1,
            joined_seq: 1,
            ..v1::ConversationRow::default()
        });
        let next = start + 2;
        let next = if next < self.listed.len() { vec![u8::try_from(next).unwrap()].into() } else { Bytes::new() };
        v1::SyncReply { version: self.head(own_log()), conversations: rows.collect(), next, invisible: false }
    }

    fn history(&self, request: &v1::HistoryRequest) -> Result<v1::HistoryReply, StatusCode> {
        let id = match request.target.as_ref().and_then(|target| target.target.as_ref()) {
            Some(v1::target::Target::ConversationId(bytes)) => ConversationId::from_slice(bytes).unwrap(),
            Some(v1::target::Target::PeerUserId(user)) => by_peer(user),
            None => panic!("a history of nothing"),
        };
        let log = self.logs.get(&id).ok_or(StatusCode::NotFound)?;
        let from = usize::try_from(request.from - 1).unwrap();
        // A page is often shorter than wanted.
        let limit = usize::try_from(self.environment.random.next_u64() % 7 + 1).unwrap();
        let limit = limit.min(usize::try_from(request.limit).unwrap().max(1));
        let entries = log.iter().skip(from).take(limit).cloned();
        let entries = entries.map(|entry| v1::HistoryEntry { message: Some(entry), gone_reason: 0 }).collect();
        Ok(v1::HistoryReply { conversation_id: id.to_bytes(), entries, head: log.len() as u64, first_seq: 1 })
    }
}

fn by_peer(user: &str) -> ConversationId {
    conversation(user.rsplit('-').next().unwrap().parse().unwrap())
}

fn accepted(id: ConversationId, entry: &v1::Message) -> v1::SendAck {
    v1::SendAck {
        client_message_id: entry.client_message_id.clone(),
        conversation_id: id.to_bytes(),
        seq: entry.seq,
        sent_at_ms: sent_at_ms(entry.seq),
        status: None,
    }
}

/// Serves connections one after the other, others write meanwhile. A word of `calm` ends all trouble, its end ends the server.
async fn run_server(server: Arc<Server>, mut model: Model, mut calm: mpsc::Receiver<()>) -> Model {
    loop {
        let (_, mut connection) = tokio::select! {
            biased;
            told = calm.recv() => match told {
                Some(()) => {
                    model.trouble = 0;
                    continue;
                }
                None => return model,
            },
            accepted = server.accept_raw() => accepted,
        };
        if !matches!(connection.expect().await, client_frame::Frame::Hello(_)) {
            panic!("no hello");
        }
        let sync_version = model.head(own_log());
        connection.send(server_frame::Frame::Welcome(v1::Welcome { sync_version, ..welcome() })).await;
        serve(&mut connection, &mut model, &mut calm).await;
    }
}

/// One session.
async fn serve(connection: &mut Connection, model: &mut Model, calm: &mut mpsc::Receiver<()>) {
    loop {
        let pause = Duration::from_millis(model.environment.random.next_u64() % 20);
        tokio::select! {
            biased;
            Some(()) = calm.recv(), if model.trouble > 0 => {
                // From here on nothing goes wrong, and the client is told that something may have been lost.
                model.trouble = 0;
                connection.send(server_frame::Frame::Resync(v1::Resync { reason: 1, spread_ms: 50 })).await;
            }
            frame = connection.next() => {
                let Some(frame) = frame else { return };
                for step in answer(frame, model) {
                    match step {
                        Step::Answer(frame) => connection.send(*frame).await,
                        Step::Break => return,
                    }
                }
            }
            () = tokio::time::sleep(pause), if model.trouble > 0 && model.others > 0 => {
                model.others -= 1;
                let number = u8::try_from(model.environment.random.next_u64() % u64::from(CONVERSATIONS)).unwrap() + 1;
                let id = conversation(number);
                if !model.listed.contains(&id) {
                    let entry = model.list(id);
                    if !model.chance(4) {
                        connection.send(server_frame::Frame::Message(entry)).await;
                    }
                }
                let seq = model.head(id) + 1;
                let entry = model.append(id, "bob", format!("bob-{seq}").into(), body::text(seq.to_string()));
                if !model.chance(2) {
                    connection.send(server_frame::Frame::Message(entry)).await;
                }
            }
        }
    }
}

fn answer(frame: client_frame::Frame, model: &mut Model) -> Vec<Step> {
    let answer = match frame {
        client_frame::Frame::Ping(ping) => server_frame::Frame::Pong(v1::Pong { echo: ping.echo }),
        client_frame::Frame::Send(send) => server_frame::Frame::SendAck(model.send(&send)),
        client_frame::Frame::Call(call) => server_frame::Frame::Reply(model.call(&call)),
        _ => return vec![],
    };
    match model.environment.random.next_u64() % 16 {
        // The request took effect, the answer is lost with the connection.
        0 if model.chance(2) => vec![Step::Break],
        1 if model.chance(2) => {
            let resync = v1::Resync { reason: 2, spread_ms: 100 };
            vec![Step::Answer(Box::new(server_frame::Frame::Resync(resync))), Step::Answer(Box::new(answer))]
        }
        2 if model.chance(2) => {
            let go_away = v1::GoAway { reason: None, reconnect_after_ms: 20, endpoints: vec![] };
            vec![Step::Answer(Box::new(answer)), Step::Answer(Box::new(server_frame::Frame::GoAway(go_away)))]
        }
        _ => vec![Step::Answer(Box::new(answer))],
    }
}

/// What the client was told.
struct Told {
    /// Per send in the order of the calls: where it went, its text, its place.
    sent: Vec<(ConversationId, String, Sent)>,
    events: BTreeMap<ConversationId, Vec<v1::Message>>,
}

async fn run_client(client: &Client, random: &Environment) -> (Vec<(ConversationId, String)>, Vec<Sent>) {
    let mut calls = Vec::new();
    let mut pending = Vec::new();
    for number in 0..SENDS {
        let place = u8::try_from(random.random.next_u64() % u64::from(CONVERSATIONS)).unwrap() + 1;
        // By whatever name where the first sync tells that both are one, else always by the same.
        let by_name = if place <= 2 { random.random.next_u64().is_multiple_of(3) } else { place == 3 };
        let target = if by_name {
            Target::peer(&format!("peer-{place}")).unwrap()
        } else {
            Target::Conversation(conversation(place))
        };
        let text = format!("send {number}");
        pending.push(client.enqueue(target, body::text(text.as_str())).await.unwrap());
        calls.push((conversation(place), text));
        if random.random.next_u64().is_multiple_of(8) {
            tokio::time::sleep(Duration::from_millis(random.random.next_u64() % 300)).await;
        }
    }
    let mut sent = Vec::new();
    for pending in pending {
        sent.push(pending.await.unwrap());
    }
    (calls, sent)
}

async fn run(seed: u64) -> (Model, Told, Duration) {
    let server = Arc::new(Server::new());
    let surroundings = environment(seed ^ 0x5eed);
    let mut model = Model {
        environment: surroundings.clone(),
        logs: BTreeMap::new(),
        listed: vec![],
        others: 1_000,
        trouble: 1 + seed % 6,
    };
    for number in [1, 2] {
        model.list(conversation(number));
    }
    let endpoints = vec!["tcp://a:1".parse::<Endpoint>().unwrap(), "tcp://b:2".parse().unwrap()];
    let mut config = server.config_for(endpoints, seed);
    config.follow_all = FollowAll::FromStart;
    config.event_queue = if seed.is_multiple_of(2) { 16 } else { 1024 };
    config.window = if seed.is_multiple_of(3) { 4 } else { 256 };
    let client = Client::start(config);
    let mut events = client.events().unwrap();
    let (calm, calm_end) = mpsc::channel(1);
    let started = Instant::now();
    let serving = run_server(server.clone(), model, calm_end);
    let using = async {
        let (calls, sent) = run_client(&client, &environment(seed ^ 0xca11)).await;
        calm.send(()).await.unwrap();
        // All that is on its way has time to arrive.
        tokio::time::sleep(Duration::from_secs(60)).await;
        client.close().await;
        drop(calm);
        calls.into_iter().zip(sent).map(|((id, text), sent)| (id, text, sent)).collect()
    };
    let reading = async {
        let mut all: BTreeMap<ConversationId, Vec<v1::Message>> = BTreeMap::new();
        let slow = environment(seed ^ 0x510);
        while let Some(event) = events.recv().await {
            if slow.random.next_u64().is_multiple_of(32) {
                tokio::time::sleep(Duration::from_millis(slow.random.next_u64() % 200)).await;
            }
            match event {
                Event::Message(entry) => all.entry(entry.conversation).or_default().push(v1::Message {
                    conversation_id: entry.conversation.to_bytes(),
                    seq: entry.seq,
                    sender: entry.sender.as_ref().map(ToString::to_string).unwrap_or_default(),
                    sent_at_ms: entry.sent_at.as_millis(),
                    client_message_id: entry.client_message_id,
                    body: entry.body,
                    kind: entry.kind.into(),
                    flags: 0,
                }),
                Event::Closed(_) => break,
                _ => {}
            }
        }
        all
    };
    let all = async { tokio::join!(serving, using, reading) };
    let ended = tokio::time::timeout(Duration::from_secs(24 * 3600), all).await;
    let (model, sent, events) = ended.unwrap_or_else(|_| panic!("seed {seed} does not end"));
    (model, Told { sent, events }, started.elapsed())
}

fn check(seed: u64, model: &Model, told: &Told) {
    assert_eq!(told.sent.len(), SENDS);
    let mut last: BTreeMap<ConversationId, u64> = BTreeMap::new();
    for (id, text, sent) in &told.sent {
        assert_eq!(sent.conversation, *id, "seed {seed}");
        let entry = &model.logs[id][usize::try_from(sent.seq).unwrap() - 1];
        assert_eq!((entry.sender.as_str(), &entry.body), (ME, &body::text(text.as_str())), "seed {seed}: {text}");
        let before = last.insert(*id, sent.seq).unwrap_or(0);
        assert!(sent.seq > before, "seed {seed}: {text} at {} after {before}", sent.seq);
    }
    let own: usize = model.logs.values().flatten().filter(|entry| entry.sender == ME).count();
    assert_eq!(own, SENDS, "seed {seed}: stored twice");
    for id in model.listed.iter().chain([&own_log()]) {
        let none = Vec::new();
        let log = &model.logs.get(id).unwrap_or(&none);
        let seen = told.events.get(id).unwrap_or(&none);
        let seqs = |entries: &[v1::Message]| entries.iter().map(|entry| entry.seq).collect::<Vec<u64>>();
        assert_eq!(seqs(seen), seqs(log), "seed {seed}: conversation {id}");
        assert_eq!(seen, *log, "seed {seed}: conversation {id}");
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_the_server_does_the_client_agrees_with_the_log() {
    for seed in 0..60 {
        let (model, told, _) = run(seed).await;
        check(seed, &model, &told);
    }
}

#[tokio::test(start_paused = true)]
async fn the_same_seed_gives_the_same_run() {
    let (first, told_first, time_first) = run(7).await;
    let (second, told_second, time_second) = run(7).await;
    assert_eq!(time_first, time_second);
    assert_eq!(first.logs, second.logs);
    assert_eq!(told_first.sent, told_second.sent);
    assert_eq!(told_first.events, told_second.events);
}
