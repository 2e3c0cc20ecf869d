//! What `imd cluster status` shows: the registry's view, and what each process says of itself at `/metrics`.

mod owners;

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use im_proto::{ConversationId, InstanceId, ShardCount};
use im_registry::{Instance, Role, View};
use serde::Serialize;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};

use super::files::Identity;
use crate::failure::Failure;

/// How long a process may take to answer; then it is shown without numbers.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);
/// Far above what a process has to say of itself.
const ANSWER_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// What is asked for besides.
#[derive(Clone, Copy, Debug, Default)]
pub struct Details {
    /// Each shard with its owner and epoch.
    pub shards: bool,
    /// Who owns this conversation.
    pub conversation: Option<ConversationId>,
}

/// The whole cluster at a moment.
#[derive(Debug, Serialize)]
pub struct Status {
    cluster: String,
    generation: Option<u64>,
    routers: Vec<Router>,
    gateways: Vec<Gateway>,
    shards: Shards,
    #[serde(skip_serializing_if = "Option::is_none")]
    owners: Option<Vec<owners::Owner>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    conversation: Option<owners::Conversation>,
}

#[derive(Debug, Serialize)]
struct Process {
    id: String,
    addresses: BTreeMap<String, String>,
    zone: String,
    version: String,
    draining: bool,
    /// It answered at its `http` address.
    answers: bool,
}

#[derive(Debug, Serialize)]
struct Router {
    #[serde(flatten)]
    process: Process,
    /// In the registry.
    shards: usize,
    sessions: Option<u64>,
    conversations_open: Option<u64>,
    entries_committed: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Gateway {
    #[serde(flatten)]
    process: Process,
    connections: Option<u64>,
    sessions: Option<u64>,
    links_up: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Shards {
    total: u32,
    owned: usize,
    /// Whose owner is not the one that it should have: they are about to move.
    moving: Vec<u32>,
    without_owner: Vec<u32>,
    /// Smallest and greatest epoch of a claim.
    epochs: Option<(u64, u64)>,
}

/// Asks all processes at once.
pub async fn gather(identity: &Identity, view: &View, generation: Option<u64>, details: Details) -> Status {
    let mut asking = JoinSet::new();
    for instance in view.instances.values() {
        let (id, address) = (instance.id.clone(), address_of(instance, "http"));
        asking.spawn(async move { (id, metrics(address).await) });
    }
    let answers = asking.join_all().await.into_iter().filter_map(|(id, numbers)| Some((id, numbers?))).collect();
    assemble((&identity.cluster.cluster_id[..], identity.shards), view, generation, &answers, details)
}

/// `answers` are of those that gave one.
fn assemble(
    (cluster, count): (&str, ShardCount),
    view: &View,
    generation: Option<u64>,
    answers: &BTreeMap<InstanceId, Numbers>,
    details: Details,
) -> Status {
    let answer = |instance: &Instance| answers.get(&instance.id);
    let number = |instance: &Instance, name: &str| answer(instance).and_then(|numbers| numbers.get(name)).copied();
    let process = |instance: &Instance| Process {
        id: instance.id.to_string(),
        addresses: instance
            .endpoints
            .iter()
            .map(|endpoint| (endpoint.transport.clone(), endpoint.address.clone()))
            .collect(),
        zone: instance.zone.clone(),
        version: instance.version.clone(),
        draining: instance.draining,
        answers: answer(instance).is_some(),
    };
    let routers = view.of_role(Role::Router).map(|instance| Router {
        process: process(instance),
        shards: view.claims.values().filter(|claim| claim.owner == instance.id).count(),
        sessions: number(instance, "im_router_sessions"),
        conversations_open: number(instance, "im_router_conversations_open"),
        entries_committed: number(instance, "im_router_entries_committed_total"),
    });
    let gateways = view.of_role(Role::Gateway).map(|instance| Gateway {
        process: process(instance),
        connections: number(instance, "im_gateway_connections_count"),
        sessions: number(instance, "im_gateway_sessions_count"),
        links_up: number(instance, "im_gateway_links_up_count"),
    });
    Status {
        cluster: cluster.to_owned(),
        generation,
        routers: routers.collect(),
        gateways: gateways.collect(),
        shards: shards(count, view),
        owners: details.shards.then(|| owners::all(view)),
        conversation: details.conversation.map(|id| owners::of(id, count, view)),
    }
}

fn shards(count: ShardCount, view: &View) -> Shards {
    let takers = owners::Takers::of(view);
    let (mut moving, mut without_owner) = (Vec::new(), Vec::new());
    for shard in count.shards() {
        match view.owner(shard) {
            None => without_owner.push(shard.0),
            Some(owner) if takers.next_owner(shard, owner).is_some() => moving.push(shard.0),
            Some(_) => {}
        }
    }
    let epochs = || view.claims.values().map(|claim| claim.epoch.0);
    Shards {
        total: count.get(),
        owned: view.claims.len(),
        moving,
        without_owner,
        epochs: epochs().min().zip(epochs().max()),
    }
}

fn address_of(instance: &Instance, transport: &str) -> Option<String> {
    let found = instance.endpoints.iter().find(|endpoint| endpoint.transport == transport);
    found.map(|endpoint| endpoint.address.clone())
}

/// Metrics without labels that are whole numbers, as all are that are asked for.
type Numbers = BTreeMap<String, u64>;

async fn metrics(address: Option<String>) -> Option<Numbers> {
    let text = timeout(ANSWER_PATIENCE, get(address?)).await.ok()?.ok()?;
    Some(parse(&text))
}

/// The body of `/metrics`, and its head, which looks like nothing that is asked for.
async fn get(address: String) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(&address).await?;
    stream.write_all(format!("GET /metrics HTTP/1.0\r\nhost: {address}\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer).await?;
    Ok(answer)
}

fn parse(text: &str) -> Numbers {
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        })
        .collect()
}

impl Status {
    pub fn to_json(&self) -> Result<String, Failure> {
        let mut text = serde_json::to_string_pretty(self).map_err(Failure::operation)?;
        text.push('\n');
        Ok(text)
    }

    pub fn to_text(&self) -> String {
        let mut text = format!("cluster {}", self.cluster);
        let _ = match self.generation {
            Some(generation) => writeln!(text, ", generation {generation}"),
            None => writeln!(text, ", not begun in this etcd (imd cluster recover, if it ran before)"),
        };
        let _ = writeln!(text, "\n{}", counted(self.routers.len(), "router"));
        for router in &self.routers {
            let numbers = [
                ("sessions", router.sessions),
                ("open conversations", router.conversations_open),
                ("entries", router.entries_committed),
            ];
            let _ = writeln!(
                text,
                "{}  {}{}",
                router.process.head("link"),
                counted(router.shards, "shard"),
                shown(&numbers)
            );
        }
        let _ = writeln!(text, "\n{}", counted(self.gateways.len(), "gateway"));
        for gateway in &self.gateways {
            let numbers =
                [("connections", gateway.connections), ("sessions", gateway.sessions), ("links", gateway.links_up)];
            let _ = writeln!(text, "{}{}", gateway.process.head("tcp"), shown(&numbers));
        }
        let shards = &self.shards;
        let _ = write!(text, "\nshards: {} of {} owned, {} moving", shards.owned, shards.total, shards.moving.len());
        if !shards.without_owner.is_empty() {
            let _ = write!(text, ", {} without owner", shards.without_owner.len());
        }
        let _ = match shards.epochs {
            Some((least, greatest)) => writeln!(text, ", epochs {least} to {greatest}"),
            None => writeln!(text),
        };
        for owner in self.owners.iter().flatten() {
            owner.write(&mut text);
        }
        if let Some(conversation) = &self.conversation {
            conversation.write(&mut text);
        }
        text
    }
}

impl Process {
    fn head(&self, transport: &str) -> String {
        let address = self.addresses.get(transport).or_else(|| self.addresses.values().next());
        let mut text = format!("  {:<26} {:<22}", self.id, address.map_or("", String::as_str));
        if !self.zone.is_empty() {
            let _ = write!(text, " zone {}", self.zone);
        }
        if self.draining {
            text.push_str(" draining");
        }
        if !self.answers {
            text.push_str(" no answer");
        }
        text
    }
}

fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn shown(numbers: &[(&str, Option<u64>)]) -> String {
    numbers.iter().filter_map(|(name, value)| value.map(|value| format!("  {value} {name}"))).collect()
}

#[cfg(test)]
mod tests {
    use im_proto::{BootId, Epoch, ShardId};
    use im_registry::{Claim, Endpoint};

    use super::*;

    fn id(name: &str) -> InstanceId {
        InstanceId::parse(name).unwrap()
    }

    fn instance(role: Role, name: &str, transport: &str, zone: &str, draining: bool) -> Instance {
        let endpoint = Endpoint { transport: transport.to_owned(), address: format!("10.0.0.7:7{}", name.len()) };
        let (zone, version) = (zone.to_owned(), "0.1.0".to_owned());
        Instance { id: id(name), boot: BootId(1), role, endpoints: vec![endpoint], zone, version, draining }
    }

    /// Two routers and one that leaves; nobody has the last shard.
    fn view() -> View {
        let mut view = View::default();
        for instance in [
            instance(Role::Router, "router-one", "link", "a", false),
            instance(Role::Router, "router-three", "link", "", false),
            instance(Role::Router, "router-leaving", "link", "", true),
            instance(Role::Gateway, "gateway-one", "tcp", "a", false),
            instance(Role::Gateway, "gateway-silent", "tcp", "", true),
        ] {
            view.instances.insert(instance.id.clone(), instance);
        }
        for (shard, owner, revision) in [
            (0, "router-one", 5),
            (1, "router-one", 5),
            (2, "router-one", 5),
            (3, "router-three", 9),
            (4, "router-leaving", 4),
            (5, "router-leaving", 4),
            (6, "router-one", 12),
        ] {
            let claim = Claim {
                shard: ShardId(shard),
                owner: id(owner),
                epoch: Epoch::new(1, revision),
                predecessors: Vec::new(),
            };
            view.claims.insert(claim.shard, claim);
        }
        view
    }

    fn shown(details: Details) -> Status {
        let numbers = |said: &[(&str, u64)]| said.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        let answers = BTreeMap::from([
            (id("router-one"), numbers(&[("im_router_sessions", 12), ("im_router_conversations_open", 3)])),
            (id("router-leaving"), numbers(&[("im_router_entries_committed_total", 70_000)])),
            (id("gateway-one"), numbers(&[("im_gateway_connections_count", 13), ("im_gateway_links_up_count", 3)])),
        ]);
        let cluster = ("main", ShardCount::new(8).unwrap());
        assemble(cluster, &view(), Some(1), &answers, details)
    }

    #[test]
    fn the_cluster_is_shown_with_loads_moves_and_epochs() {
        let conversation = Some(ConversationId::from_bytes([7; 16]));
        assert_eq!(shown(Details { shards: true, conversation }).to_text(), include_str!("status/golden.txt"));
    }

    #[test]
    fn nothing_more_is_said_than_what_was_asked_for() {
        let plain = shown(Details::default());
        let golden = include_str!("status/golden.txt");
        assert!(golden.starts_with(&plain.to_text()));
        let json: serde_json::Value = serde_json::from_str(&plain.to_json().unwrap()).unwrap();
        assert_eq!((&json["owners"], &json["conversation"]), (&serde_json::Value::Null, &serde_json::Value::Null));
    }

    #[test]
    fn each_shard_has_its_owner_and_its_epoch_as_json() {
        let status = shown(Details { shards: true, conversation: None });
        let json: serde_json::Value = serde_json::from_str(&status.to_json().unwrap()).unwrap();
        let mut found = BTreeMap::new();
        for owner in json["owners"].as_array().unwrap() {
            for claim in owner["claims"].as_array().unwrap() {
                let (shard, epoch) = (claim["shard"].as_u64().unwrap(), claim["epoch"].as_u64().unwrap());
                found.insert(shard, (owner["router"].as_str().unwrap().to_owned(), epoch));
            }
        }
        let view = view();
        let claims = view.claims.values();
        let expected: BTreeMap<_, _> =
            claims.map(|claim| (u64::from(claim.shard.0), (claim.owner.to_string(), claim.epoch.0))).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_cluster_that_has_not_begun_is_told_from_one_without_shards() {
        let nothing = assemble(
            ("main", ShardCount::new(8).unwrap()),
            &View::default(),
            None,
            &BTreeMap::new(),
            Details { shards: true, conversation: Some(ConversationId::from_bytes([7; 16])) },
        );
        let text = nothing.to_text();
        assert!(text.starts_with("cluster main, not begun in this etcd"), "{text}");
        assert!(text.contains("shards: 0 of 8 owned, 0 moving, 8 without owner\n"), "{text}");
        assert!(text.ends_with(", without owner\n"), "{text}");
    }

    #[test]
    fn numbers_are_read_out_of_metrics() {
        let text = "HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\n# TYPE im_router_sessions gauge\nim_router_sessions 12\n\
                    im_x_total{a=\"b\"} 4\n\nim_gateway_connections_count 3\nim_y_seconds 3.5\n";
        let numbers = parse(text);
        assert_eq!(numbers.get("im_router_sessions"), Some(&12));
        assert_eq!(numbers.get("im_gateway_connections_count"), Some(&3));
        assert_eq!(numbers.get("im_y_seconds"), None);
    }
}
