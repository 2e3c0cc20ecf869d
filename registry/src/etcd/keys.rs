//! What stands in etcd: the layout of keys and the JSON of their values. registry/README.md describes both for other programs;
//! a change that an old reader would misunderstand needs a new version in the prefix.
//!
//! ```text
//! /im/<cluster id>/v1/cluster                     the cluster record
//! /im/<cluster id>/v1/instances/<role>/<id>       a registered process, bound to its lease
//! /im/<cluster id>/v1/claims/<shard>              a claim, bound to the claimer's lease; its mod revision is in the epoch
//! /im/<cluster id>/v1/predecessors/<shard>        who may still believe it owns the shard; bound to no lease
//! ```
//!
//! Pure: no I/O.

use im_proto::{BootId, InstanceId, ShardId};
use serde::{Deserialize, Serialize};

use crate::{Endpoint, Instance, Role};

/// Roles that can be registered.
pub(super) const ROLES: [Role; 2] = [Role::Gateway, Role::Router];

/// The keys of one cluster.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    prefix: String,
}

/// A key, taken apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Cluster,
    Instance(Role, InstanceId),
    Claim(ShardId),
    Predecessors(ShardId),
}

impl Keys {
    /// `None` if the cluster id cannot be part of a key.
    pub(super) fn new(cluster_id: &str) -> Option<Self> {
        let plain = InstanceId::parse(cluster_id).is_ok() && !cluster_id.contains('/');
        plain.then(|| Self { prefix: format!("/im/{cluster_id}/v1/") })
    }

    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    pub(super) fn claims(&self) -> String {
        format!("{}claims/", self.prefix)
    }

    pub(super) fn predecessors(&self) -> String {
        format!("{}predecessors/", self.prefix)
    }

    pub(super) fn cluster(&self) -> String {
        self.of(&Key::Cluster)
    }

    pub(super) fn claim(&self, shard: ShardId) -> String {
        self.of(&Key::Claim(shard))
    }

    pub(super) fn list(&self, shard: ShardId) -> String {
        self.of(&Key::Predecessors(shard))
    }

    pub(super) fn instance(&self, role: Role, id: &InstanceId) -> String {
        self.of(&Key::Instance(role, id.clone()))
    }

    pub(super) fn of(&self, key: &Key) -> String {
        let prefix = &self.prefix;
        match key {
            Key::Cluster => format!("{prefix}cluster"),
            Key::Instance(role, id) => format!("{prefix}instances/{}/{id}", role_name(*role)),
            // Padded, so that keys sort by number.
            Key::Claim(shard) => format!("{prefix}claims/{:05}", shard.0),
            Key::Predecessors(shard) => format!("{prefix}predecessors/{:05}", shard.0),
        }
    }

    /// `None` for a key that this version does not know.
    pub(super) fn parse(&self, key: &[u8]) -> Option<Key> {
        let key = std::str::from_utf8(key).ok()?.strip_prefix(&self.prefix)?;
        if key == "cluster" {
            return Some(Key::Cluster);
        }
        let (kind, rest) = key.split_once('/')?;
        match kind {
            "instances" => {
                let (role, id) = rest.split_once('/')?;
                let role = ROLES.into_iter().find(|known| role_name(*known) == role)?;
                Some(Key::Instance(role, InstanceId::parse(id).ok()?))
            }
            "claims" => Some(Key::Claim(ShardId(rest.parse().ok()?))),
            "predecessors" => Some(Key::Predecessors(ShardId(rest.parse().ok()?))),
            _ => None,
        }
    }
}

/// A role as it stands in keys and values.
fn role_name(role: Role) -> &'static str {
    match role {
        Role::Gateway => "gateway",
        Role::Router => "router",
    }
}

/// Which history of etcd the claims belong to. Written by [`recover`](super::EtcdRegistry::recover) alone; every claim requires it
/// as the claimer knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// The generation of all claims made under this record.
    pub generation: u64,
    /// The cluster id that etcd gives in every answer, in hexadecimal digits: a registry restored under another token has another.
    #[serde(with = "hexadecimal")]
    pub etcd_cluster: u64,
}

/// The value of a claim. It names one start of one process under one lease, which no other claim repeats.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ClaimValue {
    #[serde(with = "text")]
    pub(super) instance: InstanceId,
    #[serde(with = "boot")]
    pub(super) boot: BootId,
    #[serde(with = "hexadecimal")]
    pub(super) lease: u64,
    pub(super) generation: u64,
}

#[derive(Serialize, Deserialize)]
struct InstanceValue {
    #[serde(with = "text")]
    id: InstanceId,
    #[serde(with = "boot")]
    boot: BootId,
    role: Role,
    endpoints: Vec<Endpoint>,
    #[serde(default)]
    zone: String,
    #[serde(default)]
    version: String,
    #[serde(default)]
    draining: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct ListedInstance(#[serde(with = "text")] InstanceId);

/// A value that this version cannot read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unreadable(String);

fn encode(value: &impl Serialize) -> Vec<u8> {
    // Plain structs of texts and numbers: nothing in them can fail to be written.
    serde_json::to_vec(value).unwrap_or_default()
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Unreadable> {
    serde_json::from_slice(bytes).map_err(|error| Unreadable(error.to_string()))
}

impl ClusterRecord {
    pub(super) fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Unreadable> {
        decode(bytes)
    }
}

impl ClaimValue {
    pub(super) fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Unreadable> {
        decode(bytes)
    }
}

pub(super) fn encode_instance(instance: &Instance) -> Vec<u8> {
    let Instance { id, boot, role, endpoints, zone, version, draining } = instance.clone();
    encode(&InstanceValue { id, boot, role, endpoints, zone, version, draining })
}

/// An instance must stand under its own key.
pub(super) fn decode_instance(bytes: &[u8], under: (Role, &InstanceId)) -> Result<Instance, Unreadable> {
    let InstanceValue { id, boot, role, endpoints, zone, version, draining } = decode(bytes)?;
    if (role, &id) != under {
        return Err(Unreadable(format!("the value names {} {id}", role_name(role))));
    }
    Ok(Instance { id, boot, role, endpoints, zone, version, draining })
}

pub(super) fn encode_list(list: &[InstanceId]) -> Vec<u8> {
    encode(&list.iter().cloned().map(ListedInstance).collect::<Vec<_>>())
}

pub(super) fn decode_list(bytes: &[u8]) -> Result<Vec<InstanceId>, Unreadable> {
    let list: Vec<ListedInstance> = decode(bytes)?;
    Ok(list.into_iter().map(|listed| listed.0).collect())
}

mod text {
    use im_proto::InstanceId;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(id: &InstanceId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(id.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<InstanceId, D::Error> {
        InstanceId::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// 64-bit numbers as 16 hexadecimal digits: many readers of JSON keep 53 bits of a number.
mod hexadecimal {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(number: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{number:016x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        u64::from_str_radix(&String::deserialize(deserializer)?, 16).map_err(D::Error::custom)
    }
}

mod boot {
    use im_proto::BootId;
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(boot: &BootId, serializer: S) -> Result<S::Ok, S::Error> {
        super::hexadecimal::serialize(&boot.0, serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BootId, D::Error> {
        super::hexadecimal::deserialize(deserializer).map(BootId)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> InstanceId {
        InstanceId::parse(name).expect("an instance id")
    }

    #[test]
    fn keys_round_trip_and_sort_by_shard() {
        let keys = Keys::new("main").expect("a cluster id");
        let some = [
            Key::Cluster,
            Key::Instance(Role::Gateway, id("g-1")),
            Key::Instance(Role::Router, id("a/b:c")),
            Key::Claim(ShardId(0)),
            Key::Claim(ShardId(1023)),
            Key::Predecessors(ShardId(70_000)),
        ];
        for key in some {
            let text = keys.of(&key);
            assert!(text.starts_with("/im/main/v1/"));
            assert_eq!(keys.parse(text.as_bytes()), Some(key), "{text}");
        }
        assert_eq!(keys.of(&Key::Claim(ShardId(7))), "/im/main/v1/claims/00007");
        assert!(keys.claim(ShardId(9)) < keys.claim(ShardId(10)));
        for foreign in
            ["/im/main/v2/cluster", "/im/main/v1/claims/x", "/im/main/v1/instances/robot/a", "/im/main/v1/new"]
        {
            assert_eq!(keys.parse(foreign.as_bytes()), None, "{foreign}");
        }
    }

    #[test]
    fn a_cluster_id_is_one_segment_of_a_key() {
        for bad in ["", "a/b", "a b"] {
            assert!(Keys::new(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn values_have_the_documented_form() {
        let instance = Instance {
            id: id("gateway-1"),
            boot: BootId(0xab),
            role: Role::Gateway,
            endpoints: vec![Endpoint { transport: "tcp".into(), address: "10.0.0.1:7100".into() }],
            zone: "a".into(),
            version: "0.1.0".into(),
            draining: false,
        };
        let text = r#"{"id":"gateway-1","boot":"00000000000000ab","role":"gateway","endpoints":[{"transport":"tcp","address":"10.0.0.1:7100"}],"zone":"a","version":"0.1.0","draining":false}"#;
        assert_eq!(String::from_utf8(encode_instance(&instance)).expect("text"), text);
        assert_eq!(decode_instance(text.as_bytes(), (Role::Gateway, &id("gateway-1"))), Ok(instance));

        let claim = ClaimValue { instance: id("router-1"), boot: BootId(1), lease: u64::MAX >> 1, generation: 3 };
        let text =
            r#"{"instance":"router-1","boot":"0000000000000001","lease":"7fffffffffffffff","generation":3}"#.to_owned();
        assert_eq!(String::from_utf8(claim.encode()).expect("text"), text);
        assert_eq!(ClaimValue::decode(text.as_bytes()), Ok(claim));

        let record = ClusterRecord { generation: 2, etcd_cluster: 0xcdf8_1819_4e3a_8c32 };
        let text = r#"{"generation":2,"etcd_cluster":"cdf818194e3a8c32"}"#;
        assert_eq!(String::from_utf8(record.encode()).expect("text"), text);
        assert_eq!(ClusterRecord::decode(text.as_bytes()), Ok(record));

        let list = [id("router-1"), id("router-2")];
        assert_eq!(encode_list(&list), br#"["router-1","router-2"]"#);
        assert_eq!(decode_list(&encode_list(&list)), Ok(list.to_vec()));
    }

    #[test]
    fn fields_of_later_versions_are_passed_over_and_damage_is_an_error() {
        let later = br#"{"generation":2,"etcd_cluster":"0a","colour":"blue"}"#;
        assert_eq!(ClusterRecord::decode(later), Ok(ClusterRecord { generation: 2, etcd_cluster: 10 }));
        assert!(decode_list(br#"["a b"]"#).is_err());
        assert!(decode_list(b"").is_err());
        let elsewhere = br#"{"id":"a","boot":"01","role":"router","endpoints":[]}"#;
        assert!(decode_instance(elsewhere, (Role::Router, &id("b"))).is_err());
        assert!(decode_instance(elsewhere, (Role::Gateway, &id("a"))).is_err());
        assert!(decode_instance(elsewhere, (Role::Router, &id("a"))).is_ok());
    }
}
