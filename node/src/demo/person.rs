//! A user with one client: what they were told, entry by entry.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Context as _, bail};
use im_client::{Client, ClientConfig, Endpoint, Entry, Event, FollowAll, Transport, Trust};
use im_proto::{ConversationId, DeviceId, Platform, Timestamp, UserId, environment::Environment, v1};
use prost::Message as _;
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

use crate::{
    data_directory::Ready,
    token::{self, Holder},
};

/// Longer than a start of the server on a busy machine, and than every back-off of the client.
const PATIENCE: Duration = Duration::from_secs(60);
const TOKEN_LIFETIME: Duration = Duration::from_secs(3600);

/// What somebody was told so far.
#[derive(Debug, Default)]
struct Told {
    entries: BTreeMap<ConversationId, Vec<Entry>>,
    ended: Option<String>,
}

/// A user at a client.
pub struct Person {
    pub name: &'static str,
    pub transport: Transport,
    pub client: Client,
    told: watch::Receiver<Told>,
}

impl Person {
    /// Connects, and follows every conversation from its first entry.
    pub async fn connect(
        name: &'static str,
        device: &str,
        transport: Transport,
        ready: &Ready,
        environment: &Environment,
    ) -> anyhow::Result<Self> {
        let address = match transport {
            Transport::Tcp => &ready.tcp,
            Transport::Tls => &ready.tls,
            Transport::Quic => &ready.quic,
        };
        let endpoint = Endpoint::new(transport, address.as_ref().context("the server does not listen for it")?)?;
        let ca = ready.ca.as_ref().context("the server names no CA")?;
        let trust = Trust::Pinned(fs::read(ca).context("read the development CA")?);
        let mut config = ClientConfig::new(vec![endpoint], sign(name, device, &ready.data, environment)?, &trust)?;
        config.environment = environment.clone();
        config.follow_all = FollowAll::FromStart;
        config.client_name = "imd demo".to_owned();
        let client =
            Client::connect(config).await.with_context(|| format!("{name} cannot connect over {transport}"))?;
        let events = client.events().context("the events are taken")?;
        let (sender, told) = watch::channel(Told::default());
        environment.spawn(listen(events, sender));
        Ok(Self { name, transport, client, told })
    }

    /// Waits until this person was told of the entry at `seq`, and gives the entries so far. Any hole or repeat fails.
    pub async fn until(&self, conversation: ConversationId, seq: u64) -> anyhow::Result<Vec<Entry>> {
        let mut told = self.told.clone();
        let waited = timeout(
            PATIENCE,
            told.wait_for(|told| {
                told.ended.is_some() || told.entries.get(&conversation).is_some_and(|log| reaches(log, seq))
            }),
        )
        .await;
        let entries = match waited {
            Ok(Ok(told)) => match &told.ended {
                Some(reason) => bail!("{}'s client ended: {reason}", self.name),
                None => told.entries.get(&conversation).cloned().unwrap_or_default(),
            },
            _ => bail!("{} was told only up to {} of {seq}", self.name, self.seen(conversation)),
        };
        for (place, entry) in (1..).zip(&entries) {
            anyhow::ensure!(entry.seq == place, "{} was told seq {} where {place} should be", self.name, entry.seq);
        }
        Ok(entries)
    }

    /// The last seq this person was told of.
    pub fn seen(&self, conversation: ConversationId) -> u64 {
        self.told.borrow().entries.get(&conversation).and_then(|log| log.last()).map_or(0, |entry| entry.seq)
    }
}

fn reaches(log: &[Entry], seq: u64) -> bool {
    log.last().is_some_and(|entry| entry.seq >= seq)
}

async fn listen(mut events: mpsc::Receiver<Event>, told: watch::Sender<Told>) {
    while let Some(event) = events.recv().await {
        match event {
            Event::Message(entry) => {
                told.send_modify(|told| told.entries.entry(entry.conversation).or_default().push(entry));
            }
            Event::Closed(reason) => told.send_modify(|told| told.ended = Some(reason.to_string())),
            _ => {}
        }
    }
}

fn sign(name: &str, device: &str, data: &Path, environment: &Environment) -> anyhow::Result<String> {
    let holder =
        Holder { user: UserId::parse(name)?, device: DeviceId::parse(device)?, platform: Platform::parse("terminal")? };
    let key = data.join("keys").join("signing.pk8");
    token::sign(&key, &data.join("cluster.json"), &holder, TOKEN_LIFETIME, environment)
}

/// One line of the transcript: seq, time, the reader's transport, what was said.
pub fn line(entry: &Entry, reader: &Person) -> String {
    let sender = entry.sender.as_ref().map_or("the server", UserId::as_str);
    let what = match entry.decode_body().and_then(|body| body.content) {
        Some(v1::body::Content::Text(text)) => format!("{sender}: {}", text.text),
        Some(v1::body::Content::Event(_)) => format!("({sender} made the group)"),
        _ => format!("{sender}: (another kind of body)"),
    };
    format!(
        "{:>6}  {}  {:<4} {:<6} {what}\n",
        entry.seq,
        time_of_day(entry.sent_at),
        reader.transport.as_str(),
        reader.name
    )
}

/// Hours, minutes, seconds and milliseconds, UTC.
fn time_of_day(time: Timestamp) -> String {
    let millis = time.as_millis().rem_euclid(86_400_000);
    let (seconds, millis) = (millis / 1000, millis % 1000);
    format!("{:02}:{:02}:{:02}.{millis:03}Z", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// An encoded text body.
pub fn text(text: impl Into<String>) -> bytes::Bytes {
    let content = v1::body::Content::Text(v1::Text { text: text.into(), ..v1::Text::default() });
    v1::Body { content: Some(content) }.encode_to_vec().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_of_day_wraps_at_midnight() {
        assert_eq!(time_of_day(Timestamp::from_millis(86_400_000 + 3_723_004)), "01:02:03.004Z");
        assert_eq!(time_of_day(Timestamp::from_millis(-1)), "23:59:59.999Z");
    }
}
