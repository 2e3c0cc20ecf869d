//! The end of a run: everything has come back, the histories are read, and the promises are judged.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use im_client::{CallError, Entry, Target};
use im_proto::{
    ConversationId, UserId,
    body::{FLAG_COUNTED, FLAG_MENTIONS_ALL, names},
    v1::{self, EntryKind, system_event::Event},
};
use prost::Message as _;
use tokio::time::{Instant, sleep};

use super::people::{Device, People, Record, checked, entry_hash};

/// Entries of one page of history.
const PAGE: u32 = 500;

/// A conversation as its history tells it.
struct Log {
    entries: Vec<Entry>,
    head: u64,
    /// Who has to be shown it, from which seq on.
    readers: BTreeMap<UserId, u64>,
}

/// Waits until every send has its outcome; tells how many have none.
pub async fn wait_for_outcomes(people: &People, patience: Duration) -> u64 {
    let deadline = Instant::now() + patience;
    loop {
        let open = people.record.lock().open_sends;
        if open == 0 || Instant::now() >= deadline {
            return open;
        }
        sleep(Duration::from_millis(500)).await;
    }
}

/// Waits until every device was shown what was acknowledged, without anybody asking for a history: a question opens its conversation,
/// and so would bring to light what heads and pushes have kept from everybody. Gives what was not shown.
pub async fn shown_unasked(people: &People, patience: Duration) -> Vec<String> {
    let deadline = Instant::now() + patience;
    loop {
        let missing = not_shown(people);
        if missing.is_empty() {
            return missing;
        }
        if Instant::now() >= deadline {
            return missing.into_iter().map(|text| format!("does not come back unasked: {text}")).collect();
        }
        sleep(Duration::from_secs(1)).await;
    }
}

fn not_shown(people: &People) -> Vec<String> {
    let mut missing = Vec::new();
    for (id, acknowledged) in people.acknowledged_heads() {
        let rows = people.world.store.committed_view(id);
        let events = |through: u64| {
            let rows = rows.iter().filter(move |stored| stored.row.seq <= through);
            rows.map(|stored| (stored.row.seq, event(stored.row.kind, &stored.row.body)))
        };
        // Who has left meanwhile need not be told what was said before.
        let (then, now) = (readers(people, id, events(acknowledged)), readers(people, id, events(u64::MAX)));
        for device in people.all() {
            let reads = then.contains_key(&device.user) && now.contains_key(&device.user);
            let shown = people.shown_through(&device, id);
            if reads && shown < acknowledged {
                missing.push(format!("{} was shown {shown} of {acknowledged} acknowledged in {id}", device.name));
            }
        }
    }
    missing
}

/// Waits until all devices have seen everything and lists agree with logs; gives what does not.
pub async fn settle(people: &Arc<People>, patience: Duration) -> Vec<String> {
    let deadline = Instant::now() + patience;
    loop {
        let missing = match read_all(people).await {
            Ok(logs) => {
                let mut missing = unsettled(people, &logs).await;
                missing.extend(shown_beyond(people, &logs));
                if missing.is_empty() {
                    record(people, &logs);
                    return compare_store(people, &logs);
                }
                missing
            }
            Err(error) => vec![error],
        };
        if Instant::now() >= deadline {
            return missing.into_iter().map(|text| format!("does not come back: {text}")).collect();
        }
        sleep(Duration::from_secs(2)).await;
    }
}

/// Who was shown more than the history had when it was read. A question opens its conversation, and what that still has to do in other
/// logs may be committed after those were read: they are read again, and what was never stored stays in this list.
fn shown_beyond(people: &People, logs: &BTreeMap<ConversationId, Log>) -> Vec<String> {
    let mut beyond = Vec::new();
    for device in people.all() {
        for (id, log) in logs {
            let shown = people.shown_through(&device, *id);
            if shown > log.head {
                beyond.push(format!("{} was shown {shown} in {id}, whose history ends at {}", device.name, log.head));
            }
        }
    }
    beyond
}

fn one_of_each_user(people: &People) -> BTreeMap<UserId, Device> {
    let mut chosen = BTreeMap::new();
    for device in people.all() {
        chosen.entry(device.user.clone()).or_insert(device);
    }
    chosen
}

async fn lists(people: &People) -> Result<BTreeMap<UserId, Vec<v1::ConversationRow>>, String> {
    let mut lists = BTreeMap::new();
    for (user, device) in one_of_each_user(people) {
        let rows = device.client.conversations().await;
        lists.insert(user.clone(), rows.map_err(|error| format!("the list of {user}: {error}"))?);
    }
    Ok(lists)
}

async fn read_all(people: &Arc<People>) -> Result<BTreeMap<ConversationId, Log>, String> {
    let lists = lists(people).await?;
    let devices = one_of_each_user(people);
    let mut logs = BTreeMap::new();
    for (user, device) in &devices {
        let own = people.world.secret.self_id(user);
        let mut ids: BTreeSet<ConversationId> = [own].into();
        for row in lists.get(user).into_iter().flatten().filter(|row| !row.left) {
            ids.extend(ConversationId::from_slice(&row.conversation_id));
        }
        for id in ids {
            if let std::collections::btree_map::Entry::Vacant(place) = logs.entry(id) {
                match read(device, id).await {
                    Ok((entries, head)) => {
                        place.insert(Log { entries, head, readers: BTreeMap::new() });
                    }
                    Err(CallError::Refused(status))
                        if id == own && status.code == Some(im_proto::StatusCode::NotFound) => {}
                    Err(error) => return Err(format!("{user} reads {id}: {error}")),
                }
            }
        }
    }
    for (id, log) in &mut logs {
        let events = log.entries.iter().map(|entry| (entry.seq, event(entry.kind, &entry.body)));
        log.readers = readers(people, *id, events);
    }
    Ok(logs)
}

async fn read(device: &Device, id: ConversationId) -> Result<(Vec<Entry>, u64), CallError> {
    let mut entries: Vec<Entry> = Vec::new();
    loop {
        let from = entries.last().map_or(1, |entry| entry.seq + 1);
        let page = device.client.history(Target::Conversation(id), from, 0, PAGE, false).await?;
        let (head, is_empty) = (page.head, page.entries.is_empty());
        entries.extend(page.entries);
        if is_empty || entries.last().is_some_and(|entry| entry.seq >= head) {
            return Ok((entries, head));
        }
    }
}

/// Who is in it at the end, by its entries.
fn readers(
    people: &People,
    id: ConversationId,
    events: impl Iterator<Item = (u64, Option<Event>)>,
) -> BTreeMap<UserId, u64> {
    let users: Vec<UserId> = people.users.iter().filter_map(|user| UserId::parse(user).ok()).collect();
    let secret = &people.world.secret;
    for user in &users {
        for other in &users {
            if secret.direct_id(user, other) == id {
                return [(user.clone(), 1), (other.clone(), 1)].into();
            }
        }
    }
    let mut members = BTreeMap::new();
    let mut is_channel = false;
    for (seq, event) in events {
        match event {
            Some(Event::ChannelCreated(created)) => {
                is_channel = true;
                members.extend(created.members.iter().filter_map(|user| Some((UserId::parse(user).ok()?, seq))));
            }
            Some(Event::GroupCreated(created)) => {
                members.extend(created.members.iter().filter_map(|user| Some((UserId::parse(user).ok()?, seq))));
            }
            Some(Event::MembersJoined(joined)) => {
                members.extend(joined.members.iter().filter_map(|user| Some((UserId::parse(user).ok()?, seq))));
            }
            Some(Event::MemberLeft(left)) => {
                members.retain(|user: &UserId, _| user.as_str() != left.user_id);
            }
            _ => {}
        }
    }
    if is_channel {
        for user in users {
            if let Some(joined) = subscribed(people, &user, id) {
                members.entry(user).or_insert(joined);
            }
        }
    }
    members
}

/// Since when a user reads a channel, by the user's own log.
fn subscribed(people: &People, user: &UserId, channel: ConversationId) -> Option<u64> {
    let mut since = None;
    for stored in people.world.store.committed_view(people.world.secret.self_id(user)) {
        match event(stored.row.kind, &stored.row.body) {
            Some(Event::ConversationJoined(joined)) if joined.conversation_id == channel.to_bytes() => {
                since = Some(joined.joined_seq);
            }
            Some(Event::ConversationLeft(left)) if left.conversation_id == channel.to_bytes() => since = None,
            _ => {}
        }
    }
    since
}

fn event(kind: EntryKind, body: &[u8]) -> Option<Event> {
    match v1::Body::decode(body).ok()?.content? {
        v1::body::Content::Event(event) if kind == EntryKind::Event => event.event,
        _ => None,
    }
}

/// What has not arrived everywhere yet.
async fn unsettled(people: &Arc<People>, logs: &BTreeMap<ConversationId, Log>) -> Vec<String> {
    let lists = match lists(people).await {
        Ok(lists) => lists,
        Err(error) => return vec![error],
    };
    let mut missing = Vec::new();
    for (id, log) in logs {
        for device in people.all() {
            let shown = people.shown_through(&device, *id);
            if log.readers.contains_key(&device.user) && shown < log.head {
                missing.push(format!("{} was shown {shown} of {} in {id}", device.name, log.head));
            }
        }
        for (user, rows) in &lists {
            let row = rows.iter().find(|row| row.conversation_id == id.as_bytes()[..]);
            let is_own = people.world.secret.self_id(user) == *id;
            match (log.readers.get(user), row) {
                _ if is_own => {}
                (Some(_), Some(row)) if !row.left && row.head == log.head => {
                    missing.extend(miscounted(people, user, *id, log, row));
                }
                (None, row) if row.is_none_or(|row| row.left) => {}
                (reader, row) => missing.push(format!("the list of {user} at {id}: {row:?}, in it since {reader:?}")),
            }
        }
    }
    missing
}

/// What is unread, by the list and by the entries beyond the read cursor; and a cursor that fell back.
fn miscounted(
    people: &People,
    user: &UserId,
    id: ConversationId,
    log: &Log,
    row: &v1::ConversationRow,
) -> Option<String> {
    let beyond: Vec<&Entry> = log.entries.iter().filter(|entry| entry.seq > row.read_seq).collect();
    let counted = |wanted: &dyn Fn(&Entry) -> bool| beyond.iter().filter(|entry| wanted(entry)).count() as u64;
    let is_named = |entry: &Entry| {
        entry.flags & FLAG_MENTIONS_ALL != 0 || names(&entry.body).users.iter().any(|named| *named == user.as_str())
    };
    let unread = counted(&|entry| entry.flags & FLAG_COUNTED != 0);
    let mentions = counted(&|entry| entry.kind == EntryKind::Message && is_named(entry));
    let own = counted(&|entry| entry.sender.as_ref() == Some(user));
    let read = people.record.lock().read.get(&(user.clone(), id)).copied().unwrap_or(0);
    let is_right = (row.unread, row.mentions, own) == (unread, mentions, 0) && row.read_seq >= read;
    (!is_right).then(|| {
        format!("the list of {user} at {id}: {unread} unread, {mentions} mentions, {own} own beyond, {read} read; it says {row:?}")
    })
}

/// Hands everything to the checker.
fn record(people: &People, logs: &BTreeMap<ConversationId, Log>) {
    for (id, log) in logs {
        {
            let mut record = people.record.lock();
            let known = record.history.conversation(*id);
            for entry in &log.entries {
                record.history.stored(known, checked(entry, entry.kind == EntryKind::Event));
            }
            record.history.stored_through(known, log.head);
        }
        for device in people.all() {
            if let Some(joined) = log.readers.get(&device.user) {
                let client = people.checked_client(&device);
                let mut record = people.record.lock();
                let known = record.history.conversation(*id);
                let view = record.history.view(client, known);
                record.history.follows(view, joined - 1);
            }
        }
    }
}

/// The histories as clients read them against what the replicas hold.
fn compare_store(people: &People, logs: &BTreeMap<ConversationId, Log>) -> Vec<String> {
    let mut broken = Vec::new();
    for (id, log) in logs {
        let stored = people.world.store.committed_view(*id);
        let stored: BTreeMap<u64, _> = stored.into_iter().map(|stored| (stored.row.seq, stored)).collect();
        for entry in &log.entries {
            let Some(found) = stored.get(&entry.seq) else {
                broken.push(format!("{id} seq {}: the store has no row", entry.seq));
                continue;
            };
            let row = &found.row;
            if row.body != entry.body || row.client_message_id != entry.client_message_id {
                broken.push(format!("{id} seq {}: the store has another row", entry.seq));
            }
        }
        broken.extend(repeated_effects(*id, &log.entries));
        broken.extend(repeated_calls(*id, &log.entries, people.world.plan.dedupe_entries));
        broken.extend(stored_although_refused(&mut people.record.lock(), *id, &log.entries));
        let mut hashes = BTreeMap::new();
        for entry in &log.entries {
            if let Some(other) = hashes.insert(entry.seq, entry_hash(entry)) {
                broken.push(format!("{id} seq {}: twice in the history, {other:x}", entry.seq));
            }
        }
        if let Some(pair) = log.entries.windows(2).find(|pair| pair[0].sent_at > pair[1].sent_at) {
            broken.push(format!("{id} seq {}: time runs backwards", pair[1].seq));
        }
    }
    broken
}

/// A refusal is the end of what its connection sent. A try over an earlier one may still arrive (SPEC.md §5): that is counted.
fn stored_although_refused(record: &mut Record, id: ConversationId, entries: &[Entry]) -> Vec<String> {
    let mut broken = Vec::new();
    for entry in entries {
        let Some(reason) = record.refused.get(&entry.body) else { continue };
        if record.tried.get(&entry.body).is_some_and(|connections| connections.len() > 1) {
            record.stored_late += 1;
        } else {
            broken.push(format!("{id} seq {}: stored although it was refused: {reason}", entry.seq));
        }
    }
    broken
}

/// A call that is made again has the effect of one while its entry is among the newest that an owner remembers (SPEC.md, `Call`).
fn repeated_calls(id: ConversationId, entries: &[Entry], remembered: usize) -> Vec<String> {
    let mut last = BTreeMap::new();
    let mut broken = Vec::new();
    for entry in entries.iter().filter(|entry| entry.kind == EntryKind::Event && !entry.client_message_id.is_empty()) {
        let key = (&entry.sender, &entry.client_message_id);
        if let Some(before) = last.insert(key, entry.seq)
            && entry.seq - before <= remembered as u64
        {
            broken.push(format!("{id} seq {}: the same call made the entry at seq {before}", entry.seq));
        }
    }
    broken
}

/// An effect of another log's entry is appended once.
fn repeated_effects(id: ConversationId, entries: &[Entry]) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let mut broken = Vec::new();
    // What has a sender is no effect: the user called for it.
    for entry in entries.iter().filter(|entry| entry.sender.is_none()) {
        let key = match event(entry.kind, &entry.body) {
            Some(Event::ConversationJoined(joined)) => (joined.conversation_id, joined.joined_seq),
            Some(Event::ConversationLeft(left)) => (left.conversation_id, left.left_seq),
            _ => continue,
        };
        if !seen.insert(key) {
            broken.push(format!("{id} seq {}: an effect was appended twice", entry.seq));
        }
    }
    broken
}
