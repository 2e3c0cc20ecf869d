//! The commands that ask once and end: `send`, `list`, `group …`, `channel …`, `device …`, `presence`, `invisible`, `locate`, and
//! `history`, which asks page by page.

use std::time::Duration;

use bytes::Bytes;
use im_proto::{Timestamp, body, v1};
use serde::Serialize;

use crate::{client::Client, config::Target};

use super::{
    TEXT_BYTES_MAX,
    args::{Channel, Command, Device, Format, Group},
    failure::Failure,
    history,
    output::{Output, field, rfc3339},
    presence,
};

/// Runs any command but `pipe`, `tail` and `chat`.
pub(super) async fn run(
    client: &Client,
    command: Command,
    timeout: Duration,
    output: &mut Output,
) -> Result<(), Failure> {
    match command {
        Command::Send { target, text } => send(client, target, &text.join(" "), timeout, output).await,
        Command::History { target, from, to, limit } => history::run(client, target, from, to, limit, output).await,
        Command::List => list(client, output).await,
        Command::Group(group) => run_group(client, group, output).await,
        Command::Channel(channel) => run_channel(client, channel, timeout, output).await,
        Command::Presence { users, watch: false } => presence::read(client, &users, output).await,
        Command::Invisible { switch } => presence::invisible(client, switch).await,
        Command::Device(device) => run_device(client, device, output).await,
        Command::Locate => locate(client, output).await,
        Command::Pipe { .. }
        | Command::Presence { .. }
        | Command::Tail { .. }
        | Command::Chat { .. }
        | Command::Completions { .. }
        | Command::Man { .. } => Err(Failure::Usage("no short command".to_owned())),
    }
}

/// The body of a text, if it fits into one.
fn one_message(text: &str) -> Result<Bytes, Failure> {
    let found = text.len();
    if found > TEXT_BYTES_MAX {
        let refusal = format!("a text has at most {TEXT_BYTES_MAX} bytes, this one has {found}: send it in parts");
        return Err(Failure::Failed(refusal));
    }
    Ok(body::text(text))
}

#[derive(Serialize)]
struct SentJson {
    conversation: String,
    seq: u64,
    sent_at: String,
}

async fn send(
    client: &Client,
    target: Target,
    text: &str,
    timeout: Duration,
    output: &mut Output,
) -> Result<(), Failure> {
    let sent = tokio::time::timeout(timeout, client.send(target, one_message(text)?)).await.map_err(|_| {
        let seconds = timeout.as_secs_f32();
        Failure::Failed(format!("not acknowledged within {seconds} s; look into the history before you send it again"))
    })??;
    match output.format() {
        Format::Plain => output.line(&sent.seq.to_string()),
        Format::Json => output.json(&SentJson {
            conversation: sent.conversation.to_string(),
            seq: sent.seq,
            sent_at: rfc3339(sent.sent_at),
        }),
    }
}

#[derive(Serialize)]
struct ConversationJson<'a> {
    conversation: &'a str,
    kind: &'static str,
    name: &'a str,
    head: u64,
    unread: u64,
    mentions: u64,
}

async fn list(client: &Client, output: &mut Output) -> Result<(), Failure> {
    for row in client.conversations().await?.iter().filter(|row| !row.left) {
        let Ok(id) = im_proto::ConversationId::from_slice(&row.conversation_id) else { continue };
        let id = id.to_string();
        let (kind, name) = match row.kind() {
            v1::ConversationKind::Direct => ("direct", format!("@{}", row.peer_user_id)),
            v1::ConversationKind::Group => ("group", row.name.clone()),
            v1::ConversationKind::Channel => ("channel", row.name.clone()),
            v1::ConversationKind::Self_ => ("self", "me".to_owned()),
            v1::ConversationKind::Unspecified => ("unknown", row.name.clone()),
        };
        let v1::ConversationRow { head, unread, mentions, .. } = *row;
        match output.format() {
            Format::Plain => {
                let shown = field(&name);
                output.line(&format!("{id}\t{kind}\t{shown}\t{head}\t{unread}\t{mentions}"))?;
            }
            Format::Json => {
                output.json(&ConversationJson { conversation: &id, kind, name: &name, head, unread, mentions })?;
            }
        }
    }
    Ok(())
}

#[derive(Serialize)]
struct GroupJson {
    conversation: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    seq: Option<u64>,
}

#[derive(Serialize)]
struct MemberJson<'a> {
    user: &'a str,
    role: &'static str,
    joined_seq: u64,
}

async fn run_group(client: &Client, group: Group, output: &mut Output) -> Result<(), Failure> {
    let (conversation, seq) = match group {
        Group::Create { name, members } => (client.create_group(&name, &members).await?, None),
        Group::Invite { id, members } => (id, Some(client.invite(id, &members).await?)),
        Group::Leave { id } => (id, Some(client.leave(id).await?)),
        Group::Members { id } => return members(client, id, output).await,
    };
    changed(conversation, seq, output)
}

async fn run_channel(client: &Client, channel: Channel, timeout: Duration, output: &mut Output) -> Result<(), Failure> {
    let id = match channel {
        Channel::Create { name, writers } => client.create_channel(&name, &writers).await?,
        Channel::Subscribe { id } => client.subscribe(id).await.map(|()| id).map_err(Failure::of_channel)?,
        Channel::Unsubscribe { id } => client.unsubscribe(id).await.map(|()| id).map_err(Failure::of_channel)?,
        Channel::Post { id, text } => {
            return send(client, Target::Conversation(id), &text.join(" "), timeout, output).await;
        }
    };
    changed(id, None, output)
}

/// Prints the seq of the entry, or the id of what has none.
fn changed(id: im_proto::ConversationId, seq: Option<u64>, output: &mut Output) -> Result<(), Failure> {
    match output.format() {
        Format::Plain => output.line(&seq.map_or(id.to_string(), |seq| seq.to_string())),
        Format::Json => output.json(&GroupJson { conversation: id.to_string(), seq }),
    }
}

async fn members(client: &Client, id: im_proto::ConversationId, output: &mut Output) -> Result<(), Failure> {
    for member in client.members(id).await? {
        let role = match member.role() {
            v1::Role::Owner => "owner",
            v1::Role::Admin => "admin",
            v1::Role::Member | v1::Role::Unspecified => "member",
        };
        match output.format() {
            Format::Plain => output.line(&format!("{}\t{role}", member.user_id))?,
            Format::Json => {
                output.json(&MemberJson { user: &member.user_id, role, joined_seq: member.joined_seq })?;
            }
        }
    }
    Ok(())
}

#[derive(Serialize)]
struct DeviceJson<'a> {
    device: &'a str,
    platform: &'a str,
    client_name: &'a str,
    client_version: &'a str,
    connected: bool,
    current: bool,
    /// Absent while it is not stored yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    first_seen: Option<String>,
    last_seen: String,
}

#[derive(Serialize)]
struct KickedJson {
    device: String,
    was_connected: bool,
}

async fn run_device(client: &Client, command: Device, output: &mut Output) -> Result<(), Failure> {
    match command {
        Device::List => {
            let devices = client.devices().await?;
            devices.iter().try_for_each(|device| print_device(device, output))
        }
        Device::Kick { id } => {
            let was_connected = client.kick_device(&id).await.map_err(Failure::of_device)?;
            match output.format() {
                Format::Plain => output.line(if was_connected { "kicked" } else { "was not connected" }),
                Format::Json => output.json(&KickedJson { device: id.to_string(), was_connected }),
            }
        }
    }
}

fn print_device(device: &v1::Device, output: &mut Output) -> Result<(), Failure> {
    let v1::Device { device_id, platform, client_name, client_version, connected, current, .. } = device;
    let time = |millis| rfc3339(Timestamp::from_millis(millis));
    let last_seen = time(device.last_seen_ms);
    match output.format() {
        Format::Plain => {
            // A client may call itself anything.
            let client = field(&format!("{client_name} {client_version}"));
            let state = match (current, connected) {
                (true, _) => "this",
                (false, true) => "connected",
                (false, false) => "away",
            };
            output.line(&format!("{device_id}\t{platform}\t{}\t{state}\t{last_seen}", client.trim()))
        }
        Format::Json => output.json(&DeviceJson {
            device: device_id,
            platform,
            client_name,
            client_version,
            connected: *connected,
            current: *current,
            first_seen: (device.first_seen_ms != 0).then(|| time(device.first_seen_ms)),
            last_seen,
        }),
    }
}

#[derive(Serialize)]
struct EndpointJson<'a> {
    transport: &'a str,
    address: &'a str,
    gateway: &'a str,
}

async fn locate(client: &Client, output: &mut Output) -> Result<(), Failure> {
    for endpoint in client.locate().await?.endpoints {
        let v1::Endpoint { transport, address, gateway_id } = &endpoint;
        match output.format() {
            Format::Plain => output.line(&format!("{transport}://{address}"))?,
            Format::Json => output.json(&EndpointJson { transport, address, gateway: gateway_id })?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use im_proto::limits;

    use super::*;

    #[test]
    fn a_text_has_the_same_limit_however_it_is_sent() {
        let longest = "x".repeat(TEXT_BYTES_MAX);
        assert!(one_message(&longest).unwrap().len() <= limits::BODY_BYTES_MAX);
        match one_message(&"x".repeat(70_000)).map(|body| body.len()) {
            Err(Failure::Failed(text)) => {
                assert_eq!(text, "a text has at most 65520 bytes, this one has 70000: send it in parts");
            }
            other => panic!("{other:?}"),
        }
    }
}
