//! The users of a run: clients of the SDK on simulated streams, what they send, and a record of everything that they see.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use im_client::{Backoff, Client, ClientConfig, Endpoint, Event, FollowAll, SendError, Target, compose};
use im_loadtest::checker::{self, History};
use im_proto::{ConversationId, StatusCode, UserId, environment::Environment, v1::EntryKind};
use im_registry::Role;
use parking_lot::Mutex;
use tokio::{sync::mpsc, time::sleep};

use super::{
    chance::{Dice, TraceHash},
    dialer::SimDialer,
    executor::ProcessTasks,
    world::World,
};

/// A client process.
#[derive(Clone)]
pub struct Device {
    pub name: String,
    pub user: UserId,
    pub client: Client,
    number: usize,
    environment: Environment,
    tasks: ProcessTasks,
    /// One send at a time is handed over, so that the order of the record is that of the client.
    order: Arc<tokio::sync::Mutex<()>>,
}

/// Everything that clients did and saw.
#[derive(Default)]
pub struct Record {
    pub history: History,
    clients: Vec<checker::Client>,
    /// Of each entry, as its first observer saw it: all others must see the same.
    entries: BTreeMap<(ConversationId, u64), u64>,
    /// Every acknowledgement on the wire: repeats must name the same seq.
    pub acknowledged: BTreeMap<(Bytes, Bytes), u64>,
    /// By which connections each body was sent.
    pub tried: BTreeMap<Bytes, BTreeSet<u64>>,
    /// Connections that were made.
    pub connections: u64,
    /// How far each device was shown each conversation.
    pub shown: BTreeMap<(usize, ConversationId), u64>,
    /// Read cursors that were acknowledged.
    pub read: BTreeMap<(UserId, ConversationId), u64>,
    /// Bodies that were refused for good.
    pub refused: BTreeMap<Bytes, String>,
    /// Entries of these that an earlier connection's try brought into the log all the same.
    pub stored_late: u64,
    pub open_sends: u64,
    pub sent: u64,
    pub acks: u64,
    pub shown_entries: u64,
    /// Promises that the checker does not know.
    pub broken: Vec<String>,
}

impl Record {
    /// Somebody saw an entry: it is what it is for all others.
    pub fn see(&mut self, who: &str, entry: &im_client::Entry) {
        let hash = entry_hash(entry);
        if *self.entries.entry((entry.conversation, entry.seq)).or_insert(hash) != hash {
            self.broken.push(format!("{who} saw other bytes at seq {} of {}", entry.seq, entry.conversation));
        }
    }
}

/// All users.
pub struct People {
    pub world: Arc<World>,
    pub devices: Mutex<BTreeMap<String, Device>>,
    pub record: Arc<Mutex<Record>>,
    pub groups: Mutex<Vec<ConversationId>>,
    pub users: Vec<String>,
}

impl People {
    /// Users without devices.
    pub fn new(world: Arc<World>) -> Arc<Self> {
        let users = (0..world.plan.users).map(|number| format!("user-{number}")).collect();
        Arc::new(Self { world, devices: Mutex::default(), record: Arc::default(), groups: Mutex::default(), users })
    }

    /// One device of all.
    pub fn one(&self, dice: &mut Dice) -> Option<String> {
        let names: Vec<String> = self.devices.lock().keys().cloned().collect();
        (!names.is_empty()).then(|| dice.pick(&names).clone())
    }

    /// One user.
    pub fn some_user(&self, dice: &mut Dice) -> Option<String> {
        (!self.users.is_empty()).then(|| dice.pick(&self.users).clone())
    }

    /// All devices.
    pub fn all(&self) -> Vec<Device> {
        self.devices.lock().values().cloned().collect()
    }

    /// How many devices a user has.
    pub fn devices(&self, user: &str) -> usize {
        self.devices.lock().values().filter(|device| device.user.as_str() == user).count()
    }

    /// Stops a device or lets it go on.
    pub fn pause(&self, name: &str, pause: bool) {
        let tasks = self.devices.lock().get(name).map(|device| device.tasks.clone());
        match tasks {
            Some(tasks) if pause => tasks.pause(),
            Some(tasks) => tasks.resume(),
            None => {}
        }
    }

    /// Lets all devices go on.
    pub fn resume_all(&self) {
        self.all().iter().for_each(|device| device.tasks.resume());
    }

    /// A further device of a user, which follows everything from the start.
    pub fn add_device(self: Arc<Self>, user: &str) -> Result<Device, String> {
        let number = self.devices.lock().len();
        let name = format!("{user}.{number}");
        let (tasks, _, environment) = self.world.surroundings(&name, 1);
        let token = self.world.token(user, &name, "terminal")?;
        let endpoints: Vec<Endpoint> = self
            .world
            .machines(Role::Gateway)
            .iter()
            .filter_map(|gateway| format!("tcp://{gateway}:7100").parse().ok())
            .collect();
        let dialer = SimDialer::new(&self.world, &self.record, &name);
        let mut dice = Dice::new(self.world.plan.seed, &name);
        let mut config =
            ClientConfig::with_dialer(Arc::new(endpoints), Arc::new(token), Arc::new(dialer), environment.clone());
        config.follow_all = FollowAll::FromStart;
        config.window = self.world.plan.client_window;
        config.event_queue = self.world.plan.event_queue;
        config.connect_timeout = dice.millis(1_500, 4_000);
        config.answer_timeout = dice.millis(4_000, 12_000);
        config.reconnect = Backoff { base: Duration::from_millis(50), max: Duration::from_secs(1) };
        config.call_timeout = Duration::from_secs(8);
        let client = Client::start(config);
        let events = client.events().ok_or("a client has one stream of events")?;
        let user = UserId::parse(user).map_err(|error| error.to_string())?;
        {
            let mut record = self.record.lock();
            let known = record.history.client(user.as_str());
            // Its life counts as one session: the SDK promises order across reconnects.
            record.history.session_started(known);
            record.clients.push(known);
        }
        let device = Device { name: name.clone(), user, client, number, environment, tasks, order: Arc::default() };
        self.devices.lock().insert(name, device.clone());
        let (people, watched) = (Arc::downgrade(&self), device.clone());
        device.environment.spawn(watch(people, watched, events));
        Ok(device)
    }

    /// The conversation that a target means.
    fn conversation(&self, device: &Device, target: &Target) -> ConversationId {
        match target {
            Target::Me => self.world.secret.self_id(&device.user),
            Target::Peer(user) => self.world.secret.direct_id(&device.user, user),
            Target::Conversation(id) => *id,
        }
    }

    /// Sends a message and records what becomes of it. Returns when it has a place among those that may be unacknowledged.
    pub async fn send(self: &Arc<Self>, device: &Device, target: Target, text: compose::Text) {
        let conversation = self.conversation(device, &target);
        let body = text.clone().body();
        let _in_order = device.order.lock().await;
        {
            let mut record = self.record.lock();
            record.open_sends += 1;
            record.sent += 1;
            let record = &mut *record;
            let known = record.history.conversation(conversation);
            let view = record.history.view(record.clients[device.number], known);
            record.history.sent(view, &body, &body);
        }
        self.world.trace.event("send", || format!("{} to {target}: {}", device.name, short(text.as_str())));
        let people = self.clone();
        let number = device.number;
        match device.client.enqueue(target, body.clone()).await {
            Ok(pending) => device.environment.spawn(async move {
                let outcome = pending.await;
                people.outcome(number, conversation, body, outcome.map(|sent| (sent.conversation, sent.seq)));
            }),
            Err(error) => self.outcome(number, conversation, body, Err(error)),
        }
    }

    fn outcome(
        &self,
        number: usize,
        conversation: ConversationId,
        body: Bytes,
        outcome: Result<(ConversationId, u64), SendError>,
    ) {
        let mut record = self.record.lock();
        let record = &mut *record;
        record.open_sends -= 1;
        self.world.trace.event("outcome", || format!("{number} {conversation} {outcome:?}"));
        match outcome {
            Ok((at, seq)) => {
                if at != conversation {
                    record.broken.push(format!("a message to {conversation} was acknowledged in {at}"));
                }
                record.acks += 1;
                let known = record.history.conversation(conversation);
                let view = record.history.view(record.clients[number], known);
                record.history.acknowledged(view, &body, seq);
            }
            Err(SendError::Refused(status)) => {
                if status.code == Some(StatusCode::Internal) {
                    record.broken.push(format!("a message to {conversation} met an internal error"));
                }
                record.refused.insert(body, status.to_string());
            }
            Err(error) => record.broken.push(format!("a message to {conversation} was given up: {error}")),
        }
    }

    fn shown(&self, device: &Device, entry: &im_client::Entry) {
        let mut record = self.record.lock();
        let record = &mut *record;
        let is_event = entry.kind == EntryKind::Event;
        let hash = entry_hash(entry);
        self.world.trace.event("shown", || format!("{} {} {} {hash:x}", device.name, entry.conversation, entry.seq));
        record.see(&device.name, entry);
        record.shown_entries += 1;
        let shown = record.shown.entry((device.number, entry.conversation)).or_default();
        *shown = entry.seq.max(*shown);
        let known = record.history.conversation(entry.conversation);
        let view = record.history.view(record.clients[device.number], known);
        record.history.delivered(view, checked(entry, is_event));
    }

    /// What the checker's client of a device is.
    pub fn checked_client(&self, device: &Device) -> checker::Client {
        self.record.lock().clients[device.number]
    }

    /// Of each conversation the greatest seq that was acknowledged.
    pub fn acknowledged_heads(&self) -> BTreeMap<ConversationId, u64> {
        let mut heads = BTreeMap::<ConversationId, u64>::new();
        for ((conversation, _), seq) in &self.record.lock().acknowledged {
            if let Ok(id) = ConversationId::from_slice(conversation) {
                let head = heads.entry(id).or_default();
                *head = (*head).max(*seq);
            }
        }
        heads
    }

    /// How far a device was shown a conversation.
    pub fn shown_through(&self, device: &Device, conversation: ConversationId) -> u64 {
        self.record.lock().shown.get(&(device.number, conversation)).copied().unwrap_or(0)
    }

    /// A device's part of the run: it sends at random moments to random conversations.
    pub async fn live(self: Arc<Self>, device: Device) {
        let plan = self.world.plan.clone();
        let mut dice = Dice::new(plan.seed, &format!("life of {}", device.name));
        for number in 0..plan.sends {
            sleep(dice.millis(0, plan.send_pause_ms)).await;
            let target = self.target(&device, &mut dice);
            let long = if dice.percent(3) { dice.between(500, 6_000) } else { dice.between(0, 120) };
            let text = format!("{}/{number} {}", device.name, "x".repeat(usize::try_from(long).unwrap_or(0)));
            let text = compose::Text::new(text);
            let text = match dice.between(0, 9) {
                0 => text.mention_all(),
                // Who is not in the conversation is refused, and that is an outcome.
                1 => text.mention(&device.user),
                2 => UserId::parse(dice.pick::<String>(&self.users)).map_or(text.clone(), |user| text.mention(&user)),
                _ => text,
            };
            self.send(&device, target.clone(), text).await;
            if dice.percent(30) {
                let (people, reader) = (self.clone(), device.clone());
                device.environment.spawn(async move { people.read(&reader, target).await });
            }
        }
    }

    /// Many messages at once, over the edge of a bucket.
    pub async fn burst(self: Arc<Self>, device: Device, count: u64) {
        let mut dice = Dice::new(self.world.plan.seed, "burst");
        let target = self.target(&device, &mut dice);
        for number in 0..count {
            self.send(&device, target.clone(), compose::Text::new(format!("{}/burst {number}", device.name))).await;
        }
    }

    /// A device says that its user has read what it was shown. An acknowledged cursor never falls back.
    async fn read(&self, device: &Device, target: Target) {
        let conversation = self.conversation(device, &target);
        let seq = self.shown_through(device, conversation);
        let marked = device.client.mark_read(Target::Conversation(conversation), seq).await;
        self.world.trace.event("read", || format!("{} {conversation} {seq} {marked:?}", device.name));
        if let Ok(marked) = marked {
            let mut record = self.record.lock();
            let read = record.read.entry((device.user.clone(), conversation)).or_default();
            *read = marked.read_seq.max(*read);
        }
    }

    fn target(&self, device: &Device, dice: &mut Dice) -> Target {
        let groups = self.groups.lock().clone();
        match dice.between(0, 9) {
            0 => Target::Me,
            1..=5 if !groups.is_empty() => Target::Conversation(*dice.pick(&groups)),
            _ => {
                let user: &String = dice.pick(self.users.as_slice());
                Target::peer(user).unwrap_or(Target::Peer(device.user.clone()))
            }
        }
    }

    /// Groups are made, people come and go.
    pub async fn organise(self: Arc<Self>, device: Device, stay: bool) {
        let mut dice = Dice::new(self.world.plan.seed, &format!("groups of {}", device.name));
        let other = |dice: &mut Dice| UserId::parse(dice.pick::<String>(&self.users)).ok();
        if stay {
            let members: Vec<UserId> = (0..dice.between(1, 4)).filter_map(|_| other(&mut dice)).collect();
            for _ in 0..8 {
                let made = device.client.create_group("a group", &members).await;
                self.world.trace.event("group", || format!("{} {made:?}", device.name));
                if let Ok(group) = made {
                    self.groups.lock().push(group);
                    break;
                }
            }
        }
        for _ in 0..dice.between(0, 4) {
            sleep(dice.millis(500, 6_000)).await;
            let groups = self.groups.lock().clone();
            if groups.is_empty() {
                continue;
            }
            let group = *dice.pick(&groups);
            if dice.percent(65) {
                let members: Vec<UserId> = (0..dice.between(1, 2)).filter_map(|_| other(&mut dice)).collect();
                let invited = device.client.invite(group, &members).await;
                self.world.trace.event("invite", || format!("{} {group} {members:?} {invited:?}", device.name));
            } else {
                let left = device.client.leave(group).await;
                self.world.trace.event("leave", || format!("{} {group} {left:?}", device.name));
            }
        }
    }
}

/// A channel, whose readers come and go.
impl People {
    /// One user posts, others subscribe, read on, unsubscribe; what a reader writes is refused, and that is an outcome.
    pub async fn broadcast(self: Arc<Self>, device: Device) {
        let (plan, mut dice) = (self.world.plan.clone(), Dice::new(self.world.plan.seed, "channel"));
        let Some(channel) = self.make_channel(&device, &mut dice).await else { return };
        let target = Target::Conversation(channel);
        for number in 0..plan.sends {
            sleep(dice.millis(0, plan.send_pause_ms)).await;
            let someone = self.one(&mut dice).and_then(|name| self.devices.lock().get(&name).cloned());
            let what = dice.between(0, 9);
            match someone {
                Some(reader) if what < 4 => {
                    let (people, target) = (self.clone(), target.clone());
                    let reads = reader.clone();
                    reader.environment.spawn(async move {
                        let outcome = match what {
                            0 | 1 => reads.client.subscribe(channel).await,
                            2 => reads.client.unsubscribe(channel).await,
                            _ => return people.read(&reads, target).await,
                        };
                        people.world.trace.event("channel", || format!("{} {what} {outcome:?}", reads.name));
                    });
                }
                Some(reader) if what == 4 => self.post(&reader, &target, number).await,
                _ => self.post(&device, &target, number).await,
            }
        }
        for reader in self.all() {
            let (people, name) = (self.clone(), reader.name.clone());
            let client = reader.client.clone();
            reader.environment.spawn(async move {
                let outcome = client.subscribe(channel).await;
                people.world.trace.event("channel", || format!("{name} stays {outcome:?}"));
            });
        }
    }

    async fn make_channel(&self, device: &Device, dice: &mut Dice) -> Option<ConversationId> {
        let writer = UserId::parse(dice.pick::<String>(&self.users)).ok();
        let writers: Vec<UserId> = writer.into_iter().collect();
        for _ in 0..8 {
            let made = device.client.create_channel("news", &writers).await;
            self.world.trace.event("channel", || format!("{} {made:?}", device.name));
            if let Ok(channel) = made {
                return Some(channel);
            }
        }
        None
    }

    async fn post(self: &Arc<Self>, device: &Device, target: &Target, number: u64) {
        let text = compose::Text::new(format!("{}/post {number}", device.name));
        self.send(device, target.clone(), text).await;
    }
}

fn short(text: &str) -> &str {
    text.split_whitespace().next().unwrap_or_default()
}

/// An entry as the checker takes it: a message is known by its body, which no two sends share.
pub fn checked(entry: &im_client::Entry, event: bool) -> checker::Entry<'_> {
    checker::Entry {
        seq: entry.seq,
        sender: entry.sender.as_ref().map_or("", |sender| sender.as_str()),
        client_message_id: if event { &[] } else { &entry.body },
        body: &entry.body,
        event,
    }
}

/// Everything of an entry that all must see alike.
pub fn entry_hash(entry: &im_client::Entry) -> u64 {
    let mut hash = TraceHash::default();
    hash.add(entry.sender.as_ref().map_or("", |sender| sender.as_str()).as_bytes());
    hash.add(&entry.client_message_id);
    hash.add(&entry.body);
    hash.add(&entry.sent_at.as_millis().to_be_bytes());
    hash.value()
}

async fn watch(people: Weak<People>, device: Device, mut events: mpsc::Receiver<Event>) {
    while let Some(event) = events.recv().await {
        let Some(people) = people.upgrade() else { return };
        match event {
            Event::Message(entry) => people.shown(&device, &entry),
            Event::Signal(_) => {}
            Event::Closed(reason) => {
                people.record.lock().broken.push(format!("{} was closed: {reason}", device.name));
                return;
            }
            other => people.world.trace.event("notice", || format!("{} {other:?}", device.name)),
        }
    }
}
