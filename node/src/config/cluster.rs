//! What a process of a cluster needs beside the settings of its role: the services it uses, the files that say who it is.

use std::{path::PathBuf, time::Duration};

use super::{
    setting::{Setting, Slot},
    tree::{MINUTE, Process, SECOND, setting},
};

/// Services, files and addresses of one process of a cluster. Empty: not used.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    pub etcd: String,
    pub etcd_ca: Option<PathBuf>,
    pub etcd_cert: Option<PathBuf>,
    pub etcd_key: Option<PathBuf>,
    pub etcd_user: String,
    pub etcd_password_file: Option<PathBuf>,
    pub cql: String,
    pub cql_user: String,
    pub cql_password_file: Option<PathBuf>,
    pub keyspace: String,
    pub redis: String,
    pub redis_password_file: Option<PathBuf>,
    pub zone: String,
    pub secrets: Option<PathBuf>,
    pub cluster: Option<PathBuf>,
    pub cluster_secret: Option<PathBuf>,
    pub router_secret: Option<PathBuf>,
    pub verify_keys: Option<PathBuf>,
    pub service_ca: Option<PathBuf>,
    pub service_cert: Option<PathBuf>,
    pub service_key: Option<PathBuf>,
    pub tls_cert: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    pub insecure_links: bool,
    pub lease_ttl: Duration,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            etcd: String::new(),
            etcd_ca: None,
            etcd_cert: None,
            etcd_key: None,
            etcd_user: String::new(),
            etcd_password_file: None,
            cql: String::new(),
            cql_user: String::new(),
            cql_password_file: None,
            keyspace: "im".to_owned(),
            redis: String::new(),
            redis_password_file: None,
            zone: String::new(),
            secrets: None,
            cluster: None,
            cluster_secret: None,
            router_secret: None,
            verify_keys: None,
            service_ca: None,
            service_cert: None,
            service_key: None,
            tls_cert: None,
            tls_key: None,
            insecure_links: false,
            lease_ttl: Duration::from_secs(10),
        }
    }
}

impl ClusterConfig {
    /// The URLs of etcd.
    pub fn etcd_urls(&self) -> Vec<String> {
        list(&self.etcd).map(str::to_owned).collect()
    }

    /// The first nodes of the CQL cluster that are asked.
    pub fn cql_nodes(&self) -> Vec<String> {
        list(&self.cql).map(str::to_owned).collect()
    }
}

impl ClusterConfig {
    pub(super) fn contradictions(&self, process: Process, found: &mut Vec<(&'static str, String)>) {
        match process {
            Process::Up => {
                for (key, value) in [("etcd", &self.etcd), ("cql", &self.cql), ("redis", &self.redis)] {
                    if !value.is_empty() {
                        found.push((key, format!("{key} = {value:?}: imd up is one process that needs no other service; imd router and imd gateway make a cluster")));
                    }
                }
            }
            Process::Router | Process::Gateway if self.etcd_urls().is_empty() => {
                found.push(("etcd", "etcd is not set: processes of a cluster find each other there (--etcd URL,…); imd up is everything in one process".to_owned()));
            }
            Process::Router | Process::Gateway | Process::Tool => {}
        }
        self.credentials(found);
    }

    /// What only makes sense together.
    fn credentials(&self, found: &mut Vec<(&'static str, String)>) {
        let mut wrong = |key, text: &str| found.push((key, text.to_owned()));
        let secure = self.etcd_urls().iter().filter(|url| url.starts_with("https://")).count();
        if secure > 0 && secure < self.etcd_urls().len() {
            wrong("etcd", "etcd has https and http URLs: all members are reached in one way");
        }
        match (secure > 0, self.etcd_ca.is_some()) {
            (true, false) => {
                wrong("etcd_ca", "etcd_ca is not set: for https URLs it names the CA of etcd's certificates")
            }
            (false, true) => wrong("etcd_ca", "etcd_ca is set, and the URLs of etcd are not https"),
            _ => {}
        }
        if self.etcd_cert.is_some() != self.etcd_key.is_some() {
            wrong("etcd_cert", "etcd_cert and etcd_key are only of use together");
        }
        if self.etcd_cert.is_some() && self.etcd_ca.is_none() {
            wrong("etcd_cert", "etcd_cert is for https URLs of etcd, with etcd_ca");
        }
        if self.etcd_user.is_empty() != self.etcd_password_file.is_none() {
            wrong("etcd_user", "etcd_user and etcd_password_file are only of use together");
        }
        if self.cql_user.is_empty() != self.cql_password_file.is_none() {
            wrong("cql_user", "cql_user and cql_password_file are only of use together");
        }
        if self.redis_password_file.is_some() && self.redis.is_empty() {
            wrong("redis_password_file", "redis_password_file is set and redis is not");
        }
    }
}

fn is_user(text: &str) -> bool {
    text.len() <= 128 && !text.chars().any(|c| c.is_control() || c == ':')
}

fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|entry| !entry.is_empty())
}

fn is_list_of(text: &str, check: impl Fn(&str) -> bool) -> bool {
    list(text).all(check)
}

fn is_url(text: &str) -> bool {
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    rest.is_some_and(|rest| is_host_and_port(rest.trim_end_matches('/')))
}

fn is_host_and_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0))
}

/// All settings of a cluster, without a table.
#[expect(clippy::too_many_lines, reason = "a list, not a procedure")]
pub fn settings(config: &mut ClusterConfig) -> [Setting<'_>; 25] {
    [
        setting(
            "etcd",
            "Where processes of a cluster find each other: the URLs of etcd, divided by commas.\n\
             Empty: this process is the whole cluster, which is what imd up is.",
            Slot::Text(&mut config.etcd, "URLs such as http://127.0.0.1:2379, divided by commas", |text| {
                is_list_of(text, is_url)
            }),
        ),
        setting(
            "etcd_ca",
            "For https URLs of etcd: the CA that signed etcd's certificates (PEM). No other is trusted.",
            Slot::File(&mut config.etcd_ca),
        ),
        setting(
            "etcd_cert",
            "This process's certificate towards etcd (PEM), where etcd asks for one (--client-cert-auth).",
            Slot::File(&mut config.etcd_cert),
        ),
        setting("etcd_key", "The private key of etcd_cert (PEM).", Slot::File(&mut config.etcd_key)),
        setting(
            "etcd_user",
            "Where etcd has authentication switched on. The user needs to read and write the keys under /im/CLUSTER/.",
            Slot::Text(&mut config.etcd_user, "a user name of at most 128 bytes, without a colon", is_user),
        ),
        setting(
            "etcd_password_file",
            "A file with the password of etcd_user and nothing else, so that no process list and no configuration shows it.",
            Slot::File(&mut config.etcd_password_file),
        ),
        setting(
            "cql",
            "The store of a cluster: nodes of ScyllaDB or Apache Cassandra, divided by commas.\n\
             Empty: the embedded store in the data directory, which admits one router.",
            Slot::Text(&mut config.cql, "addresses HOST:PORT, divided by commas", |text| {
                is_list_of(text, is_host_and_port)
            }),
        ),
        setting(
            "cql_user",
            "Where the CQL store asks who one is (PasswordAuthenticator).",
            Slot::Text(&mut config.cql_user, "a user name of at most 128 bytes, without a colon", is_user),
        ),
        setting(
            "cql_password_file",
            "A file with the password of cql_user and nothing else.",
            Slot::File(&mut config.cql_password_file),
        ),
        setting(
            "keyspace",
            "The keyspace in the CQL store. im: one cluster a database; name another for a second.",
            Slot::Text(&mut config.keyspace, "1 to 48 lower case letters, digits and _, a letter first", |text| {
                let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
                text.len() <= 48 && text.starts_with(|c: char| c.is_ascii_lowercase()) && text.chars().all(allowed)
            }),
        ),
        setting(
            "redis",
            "Hot state of a cluster, which may vanish at any time. Empty: each router keeps its own in memory.",
            Slot::Text(&mut config.redis, "a URL such as redis://127.0.0.1:6379", |text| {
                text.is_empty() || text.starts_with("redis://") || text.starts_with("rediss://")
            }),
        ),
        setting(
            "redis_password_file",
            "A file with the password of Redis and nothing else, in place of one in the URL. The user of the URL, if any, stays.",
            Slot::File(&mut config.redis_password_file),
        ),
        setting(
            "zone",
            "Where this process stands. Clients are sent to a gateway of their own zone if there is one.",
            Slot::Text(&mut config.zone, "at most 64 letters, digits, - _ or .", |text| {
                text.len() <= 64 && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            }),
        ),
        setting(
            "secrets",
            "A directory as imd secrets makes it. Each file below that is not named is taken from there.",
            Slot::File(&mut config.secrets),
        ),
        setting(
            "cluster",
            "Name, issuer and number of shards of the cluster. From secrets: cluster.json.",
            Slot::File(&mut config.cluster),
        ),
        setting(
            "cluster_secret",
            "Protects conversation ids from being guessed; all roles have it. From secrets: cluster.secret.",
            Slot::File(&mut config.cluster_secret),
        ),
        setting(
            "router_secret",
            "Signs what gateways prove their sessions with; routers alone have it. From secrets: router.secret.",
            Slot::File(&mut config.router_secret),
        ),
        setting(
            "verify_keys",
            "Public keys whose tokens are accepted. From secrets: keys/verify.json.",
            Slot::File(&mut config.verify_keys),
        ),
        setting(
            "service_ca",
            "Processes of the cluster, and callers of the api, prove themselves by certificates of this CA.\n\
             From secrets: services/ca.pem. None there and none named: plain text, on this machine alone.",
            Slot::File(&mut config.service_ca),
        ),
        setting(
            "service_cert",
            "This process's certificate towards others, with the DNS name im-router or im-gateway.\n\
             From secrets: services/router.pem or services/gateway.pem.",
            Slot::File(&mut config.service_cert),
        ),
        setting(
            "service_key",
            "The private key of service_cert. From secrets: services/router.key.pem or services/gateway.key.pem.",
            Slot::File(&mut config.service_key),
        ),
        setting(
            "tls_cert",
            "The certificate chain that clients see over TLS and QUIC. From secrets: tls/cert.pem.",
            Slot::File(&mut config.tls_cert),
        ),
        setting("tls_key", "The private key of tls_cert. From secrets: tls/key.pem.", Slot::File(&mut config.tls_key)),
        setting(
            "insecure_links",
            "Links and api without certificates also beyond this machine. For a network that is protected otherwise:\n\
             whoever reaches a link can act for every user.",
            Slot::Flag(&mut config.insecure_links),
        ),
        setting(
            "lease_ttl",
            "A process that etcd has not heard of for this long is dead: others take its shards.\n\
             10 s: three renewals may be lost, and a failover takes no longer than a person waits.",
            Slot::Duration(&mut config.lease_ttl, 2 * SECOND..=5 * MINUTE),
        ),
    ]
}
