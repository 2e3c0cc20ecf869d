//! Options of the commands that are servers: `imd up`, `imd router`, `imd gateway`.
//!
//! They only name settings. What a value must be, the configuration says.

use std::path::PathBuf;

use clap::Args;

use crate::config::Overrides;

/// What every server takes.
#[derive(Args, Clone, Debug, Default)]
pub struct ServerArguments {
    /// A configuration file; `imd config defaults` prints one.
    #[arg(long, value_name = "FILE", env = "IM_CONFIG")]
    pub config: Option<PathBuf>,
    /// Where keys, certificate and messages are kept; for a role of a cluster its ready.json [default: ./data]
    #[arg(long, value_name = "DIR")]
    pub data: Option<String>,
    /// Metrics and health [default: 127.0.0.1:7103]
    #[arg(long, value_name = "HOST:PORT")]
    pub http: Option<String>,
    /// Any other setting; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = super::parse_setting)]
    pub set: Vec<String>,
    /// A line a second on standard error: connections, sends, deliveries, commits, sync time, memory, as far as they are this process's.
    #[arg(long)]
    pub watch: bool,
}

/// Where clients connect.
#[derive(Args, Clone, Debug, Default)]
pub struct ClientListenArguments {
    /// Clients over TCP without TLS [default: 127.0.0.1:7100]
    #[arg(long, value_name = "HOST:PORT")]
    pub tcp: Option<String>,
    /// Clients over TLS [default: 127.0.0.1:7101]
    #[arg(long, value_name = "HOST:PORT")]
    pub tls: Option<String>,
    /// Clients over QUIC [default: 127.0.0.1:7101]
    #[arg(long, value_name = "HOST:PORT")]
    pub quic: Option<String>,
}

/// What the roles of a cluster take. Each can be a variable: `--cluster-secret` is `IM_CLUSTER_SECRET`.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Cluster")]
pub struct ClusterArguments {
    /// Where the processes of the cluster find each other
    #[arg(long, value_name = "URL,…")]
    pub etcd: Option<String>,
    /// ScyllaDB or Apache Cassandra, for routers [default: the embedded store in --data, which admits one router]
    #[arg(long, value_name = "HOST:PORT,…")]
    pub cql: Option<String>,
    /// The keyspace there [default: im]
    #[arg(long, value_name = "NAME")]
    pub keyspace: Option<String>,
    /// Hot state, for routers [default: in memory]
    #[arg(long, value_name = "URL")]
    pub redis: Option<String>,
    /// The CA of etcd's certificates, for https URLs
    #[arg(long, value_name = "FILE")]
    pub etcd_ca: Option<String>,
    /// This process's certificate towards etcd
    #[arg(long, value_name = "FILE")]
    pub etcd_cert: Option<String>,
    /// Its private key
    #[arg(long, value_name = "FILE")]
    pub etcd_key: Option<String>,
    /// The user at etcd
    #[arg(long, value_name = "NAME")]
    pub etcd_user: Option<String>,
    /// A file with that user's password
    #[arg(long, value_name = "FILE")]
    pub etcd_password_file: Option<String>,
    /// The user at the CQL store, for routers
    #[arg(long, value_name = "NAME")]
    pub cql_user: Option<String>,
    /// A file with that user's password, for routers
    #[arg(long, value_name = "FILE")]
    pub cql_password_file: Option<String>,
    /// A file with the password of Redis, for routers
    #[arg(long, value_name = "FILE")]
    pub redis_password_file: Option<String>,
    /// Where this process stands
    #[arg(long, value_name = "ZONE")]
    pub zone: Option<String>,
    /// The host name or address by which others reach this process [default: the address it listens on]
    #[arg(long, value_name = "HOST")]
    pub advertise: Option<String>,
    /// A directory of `imd secrets`, for each file below that is not named
    #[arg(long, value_name = "DIR")]
    pub secrets: Option<String>,
    /// Name, issuer and shards of the cluster [cluster.json]
    #[arg(long, value_name = "FILE")]
    pub cluster: Option<String>,
    /// The secret of conversation ids [cluster.secret]
    #[arg(long, value_name = "FILE")]
    pub cluster_secret: Option<String>,
    /// The routers' secret, for routers [router.secret]
    #[arg(long, value_name = "FILE")]
    pub router_secret: Option<String>,
    /// Public keys of tokens, for routers [keys/verify.json]
    #[arg(long, value_name = "FILE")]
    pub verify_keys: Option<String>,
    /// The CA of all processes of the cluster [services/ca.pem]
    #[arg(long, value_name = "FILE")]
    pub service_ca: Option<String>,
    /// This process's certificate [services/ROLE.pem]
    #[arg(long, value_name = "FILE")]
    pub service_cert: Option<String>,
    /// Its private key [services/ROLE.key.pem]
    #[arg(long, value_name = "FILE")]
    pub service_key: Option<String>,
    /// Without certificates also beyond this machine
    #[arg(long)]
    pub insecure_links: bool,
}

#[derive(Args, Clone, Debug, Default)]
pub struct UpArguments {
    #[command(flatten)]
    pub server: ServerArguments,
    #[command(flatten)]
    pub clients: ClientListenArguments,
    /// gRPC for other services [default: 127.0.0.1:7102]
    #[arg(long, value_name = "HOST:PORT")]
    pub api: Option<String>,
}

#[derive(Args, Clone, Debug, Default)]
pub struct RouterArguments {
    #[command(flatten)]
    pub server: ServerArguments,
    /// Gateways and other routers [default: 127.0.0.1:7104]
    #[arg(long, value_name = "HOST:PORT")]
    pub link: Option<String>,
    /// gRPC for other services [default: 127.0.0.1:7102]
    #[arg(long, value_name = "HOST:PORT")]
    pub api: Option<String>,
    #[command(flatten)]
    pub cluster: ClusterArguments,
}

#[derive(Args, Clone, Debug, Default)]
pub struct GatewayArguments {
    #[command(flatten)]
    pub server: ServerArguments,
    #[command(flatten)]
    pub clients: ClientListenArguments,
    /// The certificate that clients see [tls/cert.pem]
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<String>,
    /// Its private key [tls/key.pem]
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<String>,
    #[command(flatten)]
    pub cluster: ClusterArguments,
}

/// What commands take that look at a cluster or change it.
#[derive(Args, Clone, Debug, Default)]
pub struct ToolArguments {
    /// A configuration file, as of the roles.
    #[arg(long, value_name = "FILE", env = "IM_CONFIG")]
    pub config: Option<PathBuf>,
    /// Any other setting; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = super::parse_setting)]
    pub set: Vec<String>,
    #[command(flatten)]
    pub cluster: ClusterArguments,
}

/// Which store is read or written.
#[derive(Args, Clone, Debug, Default)]
pub struct TransferArguments {
    /// The embedded store of this data directory; without it that of --cql.
    #[arg(long, value_name = "DIR", conflicts_with = "cql")]
    pub data: Option<PathBuf>,
    #[command(flatten)]
    pub tool: ToolArguments,
}

/// Options of the command line with the keys of their settings.
type Named<'a> = Vec<(&'static str, &'a Option<String>)>;

impl ServerArguments {
    fn overrides(&self, named: Named<'_>) -> Overrides {
        let own = [("data", &self.data), ("http", &self.http)];
        let named = own.into_iter().chain(named).filter_map(|(key, value)| {
            value.clone().map(|value| (format!("--{}", key.replace('_', "-")), key.to_owned(), value))
        });
        let set = self.set.iter().map(|entry| {
            let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
            ("--set".to_owned(), key.to_owned(), value.to_owned())
        });
        Overrides { file: self.config.clone(), options: set.chain(named).collect() }
    }
}

impl ClientListenArguments {
    fn named(&self) -> Named<'_> {
        vec![("tcp", &self.tcp), ("tls", &self.tls), ("quic", &self.quic)]
    }
}

impl ClusterArguments {
    fn named(&self) -> Named<'_> {
        vec![
            ("etcd", &self.etcd),
            ("cql", &self.cql),
            ("keyspace", &self.keyspace),
            ("redis", &self.redis),
            ("etcd_ca", &self.etcd_ca),
            ("etcd_cert", &self.etcd_cert),
            ("etcd_key", &self.etcd_key),
            ("etcd_user", &self.etcd_user),
            ("etcd_password_file", &self.etcd_password_file),
            ("cql_user", &self.cql_user),
            ("cql_password_file", &self.cql_password_file),
            ("redis_password_file", &self.redis_password_file),
            ("zone", &self.zone),
            ("advertise", &self.advertise),
            ("secrets", &self.secrets),
            ("cluster", &self.cluster),
            ("cluster_secret", &self.cluster_secret),
            ("router_secret", &self.router_secret),
            ("verify_keys", &self.verify_keys),
            ("service_ca", &self.service_ca),
            ("service_cert", &self.service_cert),
            ("service_key", &self.service_key),
        ]
    }

    fn finish(&self, mut overrides: Overrides) -> Overrides {
        if self.insecure_links {
            let key = "insecure_links".to_owned();
            overrides.options.push(("--insecure-links".to_owned(), key, "true".to_owned()));
        }
        overrides
    }
}

impl ToolArguments {
    /// The settings that the command line names.
    pub fn overrides(&self) -> Overrides {
        let server =
            ServerArguments { config: self.config.clone(), set: self.set.clone(), ..ServerArguments::default() };
        self.cluster.finish(server.overrides(self.cluster.named()))
    }
}

impl UpArguments {
    /// The settings that the command line names.
    pub fn overrides(&self) -> Overrides {
        let mut named = self.clients.named();
        named.push(("api", &self.api));
        self.server.overrides(named)
    }
}

impl RouterArguments {
    /// The settings that the command line names.
    pub fn overrides(&self) -> Overrides {
        let mut named = self.cluster.named();
        named.extend([("link", &self.link), ("api", &self.api)]);
        self.cluster.finish(self.server.overrides(named))
    }
}

impl GatewayArguments {
    /// The settings that the command line names.
    pub fn overrides(&self) -> Overrides {
        let mut named = self.cluster.named();
        named.extend(self.clients.named());
        named.extend([("tls_cert", &self.tls_cert), ("tls_key", &self.tls_key)]);
        self.cluster.finish(self.server.overrides(named))
    }
}
