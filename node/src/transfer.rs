//! `imd export` and `imd import`: all data of a cluster into one file, and from there into a store that was never used.
//!
//! Nobody writes to either store meanwhile: an embedded one is locked, of a CQL store etcd is asked for routers if it is named. Both
//! commands go on where they were cut off when they are run again.

use std::{
    io::{IsTerminal as _, Write as _},
    path::Path,
    time::Duration,
};

use anyhow::Context as _;
use im_proto::environment::Environment;
use im_registry::{AnyRegistry, Registry as _, Role};
use im_storage::{
    ClusterError, Embedded, EmbeddedOptions, Scylla, Store,
    transfer::{self, ClusterFacts, Progress, Step, Totals, TransferError},
};
use tokio::time::Instant;

use crate::{
    args::TransferArguments,
    cluster::{
        files::{Files, Identity},
        registry, run_tool,
        store::{refused, scylla_options},
    },
    config::Config,
    data_directory::{Cluster, DataLock, read_secret},
    failure::Failure,
    print,
    signals::Signals,
};

/// Between two lines of progress.
const SHOW_INTERVAL: Duration = Duration::from_millis(500);

/// Writes everything of a store into a file.
pub fn export(arguments: &TransferArguments, config: &Config, file: &Path) -> Result<(), Failure> {
    let totals = match &arguments.data {
        Some(data) => {
            let place = EmbeddedPlace::existing(data)?;
            run_tool(async |environment| {
                place.with_store(async |store| write(store, &place.facts, file, environment).await).await
            })?
        }
        None => {
            refuse_no_store(config)?;
            let facts = facts_of_cluster(config)?;
            run_tool(async |environment| {
                refuse_routers(config, environment).await?;
                let store = open_cql(config, environment).await?;
                write(&store, &facts, file, environment).await
            })?
        }
    };
    print(&format!("{} holds {}\n", file.display(), described(&totals)))
}

/// Writes everything of a file into a store that was never used.
pub fn import(arguments: &TransferArguments, config: &Config, file: &Path) -> Result<(), Failure> {
    if arguments.data.is_none() {
        refuse_no_store(config)?;
    }
    let facts = transfer::read_header(file)
        .map_err(|error| Failure::Usage(format!("--from {error}; expected a file that `imd export` wrote")))?;
    let (totals, then) = match &arguments.data {
        Some(data) => {
            let place = EmbeddedPlace::create(data, &facts)?;
            let totals = run_tool(async |_| place.with_store(async |store| read(store, file).await).await)?;
            let advice = format!(
                "Keys, certificate and CA in {} are new: tokens of the old server are accepted once the keys/ of its directory is \
                 copied here, and its clients' --ca once its ca.pem and tls/ are.\n",
                data.display()
            );
            (totals, advice)
        }
        None => {
            let totals = run_tool(async |environment| {
                refuse_routers(config, environment).await?;
                let store = open_cql(config, environment).await?;
                read(&store, file).await
            })?;
            (
                totals,
                "Routers need the cluster.json and the secrets of the source: its directory does for --secrets.\n"
                    .to_owned(),
            )
        }
    };
    print(&format!("imported {}\n{then}", described(&totals)))
}

async fn write(store: &Store, facts: &ClusterFacts, file: &Path, environment: &Environment) -> Result<Totals, Failure> {
    let row = facts.row().ok_or_else(|| Failure::usage("the number of shards is not 1 to 65536"))?;
    match row.check(store).await {
        // A store of the time before there was such a row.
        Ok(()) | Err(ClusterError::Missing) => {}
        Err(error) => return Err(failed(error.into())),
    }
    let mut shown = Shown::new();
    let exporting = transfer::export(store, facts, file, &*environment.random, |progress| shown.progress(&progress));
    uninterrupted(exporting, |error| match error {
        // The file that it says is the one that is not complete yet.
        TransferError::File { source, .. } => Failure::Usage(format!("--to {}: {source}", file.display())),
        error => failed(error),
    })
    .await
}

async fn read(store: &Store, file: &Path) -> Result<Totals, Failure> {
    let mut shown = Shown::new();
    let importing = transfer::import(store, file, |progress| shown.progress(&progress));
    let imported = uninterrupted(importing, |error| match error {
        TransferError::Format { .. } => Failure::Usage(format!("--from {error}; the file is damaged: copy it again")),
        error => failed(error),
    });
    imported.await.map(|imported| imported.totals)
}

async fn uninterrupted<T>(
    work: impl Future<Output = Result<T, TransferError>>,
    failed: impl FnOnce(TransferError) -> Failure,
) -> Result<T, Failure> {
    let mut signals = Signals::listen().map_err(Failure::usage)?;
    tokio::select! {
        biased;
        signal = signals.next() => {
            Err(Failure::Operation(format!("stopped by {signal}; the same command goes on where this one was")))
        }
        outcome = work => outcome.map_err(failed),
    }
}

fn failed(error: TransferError) -> Failure {
    match error {
        TransferError::Store(_) | TransferError::Differs => Failure::operation(error),
        _ => Failure::usage(error),
    }
}

/// A data directory that nobody else uses, with what it says of its cluster.
struct EmbeddedPlace {
    lock: DataLock,
    facts: ClusterFacts,
}

impl EmbeddedPlace {
    fn existing(data: &Path) -> Result<Self, Failure> {
        if !data.join("cluster.json").exists() {
            return Err(Failure::Usage(format!(
                "--data {}: there is no data directory; name one that `imd up` has used",
                data.display()
            )));
        }
        let lock = DataLock::take(data).map_err(Failure::usage)?;
        let cluster = Cluster::read(&data.join("cluster.json")).map_err(Failure::usage)?;
        let cluster_secret = read_secret(&data.join("cluster.secret")).map_err(Failure::usage)?;
        Ok(Self { lock, facts: facts(&cluster, cluster_secret) })
    }

    /// A new directory for that cluster, or one in which an import of it was cut off.
    fn create(data: &Path, facts: &ClusterFacts) -> Result<Self, Failure> {
        let lock = DataLock::take(data).map_err(Failure::usage)?;
        let cluster =
            Cluster { cluster_id: facts.cluster_id.clone(), issuer: facts.issuer.clone(), shards: facts.shards };
        let lock = lock.found(&cluster, facts.cluster_secret).map_err(Failure::usage)?;
        Ok(Self { lock, facts: facts.clone() })
    }

    async fn with_store<T>(&self, work: impl AsyncFnOnce(&Store) -> Result<T, Failure>) -> Result<T, Failure> {
        let folder = self.lock.root().join("store");
        let embedded = Embedded::open(&folder, EmbeddedOptions::default()).map_err(Failure::usage)?;
        let outcome = work(&Store::from(embedded.clone())).await;
        let closed = tokio::task::spawn_blocking(move || embedded.close()).await;
        closed.context("close the store").map_err(Failure::operation)?;
        outcome
    }
}

fn facts(cluster: &Cluster, cluster_secret: [u8; 32]) -> ClusterFacts {
    let Cluster { cluster_id, issuer, shards } = cluster.clone();
    ClusterFacts { cluster_id, issuer, shards, cluster_secret }
}

fn facts_of_cluster(config: &Config) -> Result<ClusterFacts, Failure> {
    let files = Files::new(&config.cluster, Role::Router, None);
    let Identity { cluster, .. } = files.identity()?;
    Ok(facts(&cluster, files.cluster_secret()?))
}

/// Before anything else is asked or said, for without a store nothing else is of use.
fn refuse_no_store(config: &Config) -> Result<(), Failure> {
    if config.cluster.cql_nodes().is_empty() {
        return Err(Failure::usage(
            "name a store: --data DIR for an embedded one, --cql HOST:PORT for one of a cluster",
        ));
    }
    Ok(())
}

async fn open_cql(config: &Config, environment: &Environment) -> Result<Store, Failure> {
    let scylla = Scylla::connect(scylla_options(&config.cluster)?, environment.clone()).await;
    Ok(Store::from(scylla.map_err(|error| refused(&config.cluster, &ClusterError::Store(error)))?))
}

/// Routers that are registered would write meanwhile.
async fn refuse_routers(config: &Config, environment: &Environment) -> Result<(), Failure> {
    if config.cluster.etcd_urls().is_empty() {
        tracing::warn!("without --etcd nobody looks whether a router uses the store; none may");
        return Ok(());
    }
    let identity = Files::new(&config.cluster, Role::Router, None).identity()?;
    let registry = registry::connect(&config.cluster, &identity.cluster.cluster_id, environment).await?;
    let view = AnyRegistry::from(registry).view().borrow().clone();
    match view.of_role(Role::Router).next() {
        Some(router) => Err(Failure::Usage(format!("the router {} is registered; stop all routers first", router.id))),
        None => Ok(()),
    }
}

fn described(totals: &Totals) -> String {
    format!("{} conversations, {} entries, {} rows of state", totals.conversations, totals.entries, totals.state_rows)
}

/// One line that is written over, on a terminal.
struct Shown {
    last: Option<Instant>,
    on_terminal: bool,
}

impl Shown {
    fn new() -> Self {
        Self { last: None, on_terminal: std::io::stderr().is_terminal() }
    }

    fn progress(&mut self, progress: &Progress<'_>) {
        if !self.on_terminal || self.last.is_some_and(|last| last.elapsed() < SHOW_INTERVAL) {
            return;
        }
        self.last = Some(Instant::now());
        let step = match progress.step {
            Step::Checking => "checking",
            Step::Messages => "messages",
            Step::State => "state",
        };
        let (percent, tenth) = (progress.permille / 10, progress.permille % 10);
        let _ = write!(std::io::stderr(), "\r{step} {percent:>3}.{tenth} %, {}\x1b[K", described(progress.totals));
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if self.last.is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
