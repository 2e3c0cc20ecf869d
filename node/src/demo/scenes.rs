//! The scenes of the demonstration, one after another. Each says what it shows, shows it, and checks it.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use im_client::{CallError, Entry, Target, Transport};
use im_proto::{ConversationId, StatusCode, UserId, environment::Environment, method::Method, v1};
use tokio::time::sleep;

use super::{
    person::{Person, line, text},
    server::Server,
};

/// Messages that are on their way while the server is killed.
const FLOW: usize = 1_000;
/// The kill comes when this many of them have arrived.
const KILL_AT: u64 = 300;
/// So many are handed over at a time, with a pause, so that the kill comes in the middle on a fast machine too.
const BURST: usize = 20;
const PAUSE: Duration = Duration::from_millis(5);
const HISTORY_PAGE: u32 = 1_000;

fn say(words: &str) -> anyhow::Result<()> {
    crate::print(words).map_err(|failure| anyhow::anyhow!("{failure}"))
}

/// Everything that is shown.
pub async fn all(server: &mut Server, environment: &Environment) -> anyhow::Result<()> {
    let ready = server.ready.clone();
    let or_off = |address: &Option<String>| address.clone().unwrap_or_else(|| "off".to_owned());
    say(&format!(
        "A server, process {}, on tcp {}, tls {}, quic {}.\n",
        ready.pid,
        or_off(&ready.tcp),
        or_off(&ready.tls),
        or_off(&ready.quic)
    ))?;
    let alice = Person::connect("alice", "laptop", Transport::Tcp, &ready, environment).await?;
    let bob = Person::connect("bob", "laptop", Transport::Tls, &ready, environment).await?;

    direct(&alice, &bob).await?;
    let group = group(&alice, &bob).await?;
    let carol = catch_up(&alice, &bob, group, server, environment).await?;
    let single = only_once(&alice, group).await?;
    bob.until(group, single.seq).await?;
    killed(&alice, &[&bob, &carol], (group, single.seq + 1), server, environment).await?;
    still_once(&alice, single, server, environment).await?;
    same_history(&[&alice, &bob, &carol], group).await?;
    for person in [alice, bob, carol] {
        person.client.close().await;
    }
    Ok(())
}

async fn direct(alice: &Person, bob: &Person) -> anyhow::Result<()> {
    say(
        "\n1. Alice and Bob talk. The first message makes the conversation.\n\n   seq  time          reader      message\n",
    )?;
    let mut conversation = None;
    for (speaker, listener, words) in [
        (alice, bob, "Hello Bob, can you read me?"),
        (bob, alice, "Loud and clear 👋"),
        (alice, bob, "Γειά σου, 你好, नमस्ते: bytes arrive as they were sent."),
    ] {
        let sent = speaker.client.send(Target::peer(listener.name)?, text(words)).await?;
        let entries = listener.until(sent.conversation, sent.seq).await?;
        let entry = entries.last().context("the listener was told")?;
        ensure!(entry.body == text(words), "another body arrived");
        say(&line(entry, listener))?;
        conversation = Some(sent.conversation);
    }
    let conversation = conversation.context("something was said")?;
    ensure!(
        alice.until(conversation, 3).await? == same_but_own(bob.until(conversation, 3).await?),
        "two orders of one talk"
    );
    Ok(())
}

/// Whether an entry is one's own depends on who looks; all else must not.
fn same_but_own(mut entries: Vec<Entry>) -> Vec<Entry> {
    entries.iter_mut().for_each(|entry| entry.own = !entry.own);
    entries
}

async fn group(alice: &Person, bob: &Person) -> anyhow::Result<ConversationId> {
    say("\n2. Alice makes a group with Bob and Carol. Carol is not connected; the others talk.\n\n")?;
    let members = [UserId::parse("bob")?, UserId::parse("carol")?];
    let group = alice.client.create_group("trip", &members).await?;
    for (number, speaker) in (0..6).map(|number| (number, if number % 2 == 0 { alice } else { bob })) {
        let listener = if number % 2 == 0 { bob } else { alice };
        let sent = speaker.client.send(group.into(), text(format!("trip, thought {}", number + 1))).await?;
        let entries = listener.until(group, sent.seq).await?;
        say(&line(entries.last().context("the listener was told")?, listener))?;
    }
    alice.client.send(Target::peer("carol")?, text("Carol, read the group when you are back.")).await?;
    Ok(group)
}

async fn catch_up(
    alice: &Person,
    bob: &Person,
    group: ConversationId,
    server: &Server,
    environment: &Environment,
) -> anyhow::Result<Person> {
    say("\n3. Carol connects for the first time and catches up.\n\n")?;
    let head = bob.until(group, 7).await?;
    let carol = Person::connect("carol", "laptop", Transport::Quic, &server.ready, environment).await?;
    let entries = carol.until(group, 7).await?;
    for entry in &entries {
        say(&line(entry, &carol))?;
    }
    let bodies = |entries: &[Entry]| {
        entries.iter().map(|entry| (entry.seq, entry.sent_at, entry.body.clone())).collect::<Vec<_>>()
    };
    ensure!(bodies(&entries) == bodies(&head), "Carol reads something else than Bob");
    let sent = alice.client.send(Target::peer("carol")?, text("There you are.")).await?;
    let told = carol.until(sent.conversation, sent.seq).await?;
    ensure!(told.len() == 2, "Carol should have two messages of Alice");
    for entry in &told {
        say(&line(entry, &carol))?;
    }
    Ok(carol)
}

/// A message as a client with its own ids sends it.
#[derive(Clone)]
struct Single {
    request: v1::SendRequest,
    seq: u64,
}

async fn only_once(alice: &Person, group: ConversationId) -> anyhow::Result<Single> {
    say("\n4. Alice sends one message three times, as a client does that saw no acknowledgement.\n\n")?;
    let request = v1::SendRequest {
        target: Some(v1::Target { target: Some(v1::target::Target::ConversationId(group.to_bytes())) }),
        client_message_id: Bytes::from_static(b"only-once"),
        body: text("Said three times, stored once."),
        known_seq: alice.seen(group),
    };
    let mut seqs = Vec::new();
    for _ in 0..3 {
        let reply: v1::SendReply = alice.client.call(Method::MessageSend, &request).await?;
        seqs.push(reply.seq);
    }
    say(&format!("        acknowledged three times, each time as seq {}\n", seqs[0]))?;
    ensure!(seqs.iter().all(|seq| *seq == seqs[0]), "a repeat got another seq: {seqs:?}");
    Ok(Single { request, seq: seqs[0] })
}

async fn killed(
    alice: &Person,
    others: &[&Person],
    (group, first): (ConversationId, u64),
    server: &mut Server,
    environment: &Environment,
) -> anyhow::Result<()> {
    say(&format!(
        "\n5. Alice sends {FLOW} messages; in the middle the server is killed (SIGKILL) and started again.\n\n"
    ))?;
    let sender = alice.client.clone();
    let (finished, mut outcome) = tokio::sync::oneshot::channel();
    environment.spawn(async move {
        // Nobody waits for the outcome if the scene failed.
        let _ = finished.send(flow(sender, group).await);
    });
    let watcher = others.last().context("somebody watches")?;
    watcher.until(group, first + KILL_AT).await?;
    server.kill().await?;
    let seen = watcher.seen(group) + 1 - first;
    ensure!(outcome.try_recv().is_err(), "all messages were acknowledged before the kill");
    say(&format!("        killed when {} had {seen} of {FLOW} on {}\n", watcher.name, watcher.transport))?;
    server.start_again().await?;
    say(&format!("        started again as process {}\n", server.ready.pid))?;
    let seqs = outcome.await.context("the sender is gone")??;
    let expected: Vec<u64> = (first..).take(FLOW).collect();
    ensure!(seqs == expected, "the acknowledged seqs are not {first} to {}", first + FLOW as u64 - 1);
    for person in others.iter().copied().chain([alice]) {
        let entries = person.until(group, first + FLOW as u64 - 1).await?;
        let flow = &entries[first as usize - 1..];
        ensure!(flow.len() == FLOW, "{} has {} of {FLOW}", person.name, flow.len());
        for (number, entry) in flow.iter().enumerate() {
            ensure!(entry.body == text(flow_text(number)), "{} has another message at {}", person.name, entry.seq);
        }
        say(&line(&flow[0], person))?;
        say(&line(&flow[FLOW - 1], person))?;
    }
    say(&format!("        all {FLOW} acknowledged; each member has each of them once, in order\n"))
}

fn flow_text(number: usize) -> String {
    format!("message {} of {FLOW}", number + 1)
}

async fn flow(alice: im_client::Client, group: ConversationId) -> anyhow::Result<Vec<u64>> {
    let mut pending = Vec::with_capacity(FLOW);
    for number in 0..FLOW {
        pending.push(alice.enqueue(group.into(), text(flow_text(number))).await?);
        if number % BURST == BURST - 1 {
            sleep(PAUSE).await;
        }
    }
    let mut seqs = Vec::with_capacity(FLOW);
    for sent in pending {
        seqs.push(sent.await?.seq);
    }
    Ok(seqs)
}

async fn still_once(alice: &Person, single: Single, server: &Server, environment: &Environment) -> anyhow::Result<()> {
    say("\n6. The message of scene 4 again, to the server that was started since, and from another device.\n\n")?;
    let phone = Person::connect("alice", "phone", Transport::Quic, &server.ready, environment).await?;
    for client in [&alice.client, &phone.client] {
        let reply: v1::SendReply = client.call(Method::MessageSend, &single.request).await?;
        ensure!(reply.seq == single.seq, "a repeat got seq {} instead of {}", reply.seq, single.seq);
    }
    let other = v1::SendRequest { body: text("Something else under the same id."), ..single.request };
    let refused: Result<v1::SendReply, CallError> = phone.client.call(Method::MessageSend, &other).await;
    let code = refused.as_ref().err().and_then(CallError::code);
    ensure!(
        code == Some(StatusCode::PreconditionFailed),
        "another body under the same id was not refused: {refused:?}"
    );
    phone.client.close().await;
    say(&format!("        still seq {}; another text under the same id is refused\n", single.seq))
}

async fn same_history(people: &[&Person], group: ConversationId) -> anyhow::Result<()> {
    say("\n7. All three read the whole group back, each over their own transport.\n\n")?;
    let mut first: Option<Vec<Entry>> = None;
    for person in people {
        let mut entries: Vec<Entry> = Vec::new();
        loop {
            let page = person.client.history(group.into(), entries.len() as u64 + 1, 0, HISTORY_PAGE, false).await?;
            let (count, head) = (page.entries.len(), page.head);
            entries.extend(page.entries);
            if entries.len() as u64 == head {
                break;
            }
            ensure!(count > 0, "the history ends at {} of {head}", entries.len());
        }
        ensure!((1..).zip(&entries).all(|(seq, entry)| entry.seq == seq), "{}'s history has a hole", person.name);
        entries.iter_mut().for_each(|entry| entry.own = false);
        let mut live = person.until(group, entries.len() as u64).await?;
        live.iter_mut().for_each(|entry| entry.own = false);
        ensure!(live == entries, "{} was told something else than what is stored", person.name);
        say(&format!("        {:<4} {:<6} {} entries\n", person.transport.as_str(), person.name, entries.len()))?;
        match &first {
            None => first = Some(entries),
            Some(first) => ensure!(*first == entries, "{} reads another history", person.name),
        }
    }
    say("        byte for byte the same, and the same as what they were told live\n")
}
