//! `imd schema apply` and `imd schema status`: the tables of the CQL store, and to which cluster it belongs.

use std::fmt::Write as _;

use im_registry::Role;
use im_storage::{
    ClusterRow, Scylla, ScyllaOptions, Store, StoreError,
    scylla::schema::{self, SchemaStatus},
};

use crate::{
    cluster::{
        files::Files,
        run_tool,
        store::{refused, scylla_options},
    },
    config::Config,
    failure::Failure,
    print,
};

/// Creates what is missing, founds the cluster if the store belongs to none, and says how things stand.
pub fn apply(config: &Config, replication: u32) -> Result<(), Failure> {
    let options = ScyllaOptions { replication_factor: replication, ..options(config)? };
    let row = Files::new(&config.cluster, Role::Router, None).identity()?.row();
    let text = run_tool(async |environment| {
        let report = schema::apply(&options, environment.clock.now()).await.map_err(|error| failed(config, error))?;
        let scylla = Scylla::connect(options, environment.clone()).await.map_err(|error| failed(config, error))?;
        row.found(&Store::from(scylla)).await.map_err(|error| refused(&config.cluster, &error))?;
        Ok(describe(&report.status, Some(&row), &report.applied_now))
    })?;
    print(&text)
}

/// Says how things stand.
pub fn status(config: &Config) -> Result<(), Failure> {
    let options = options(config)?;
    let text = run_tool(async |environment| {
        let status = schema::status(&options).await.map_err(|error| failed(config, error))?;
        let row = if status.missing.is_empty() {
            let scylla = Scylla::connect(options, environment.clone()).await.map_err(|error| failed(config, error))?;
            ClusterRow::read(&Store::from(scylla)).await.map_err(|error| failed(config, error))?
        } else {
            None
        };
        Ok(describe(&status, row.as_ref(), &[]))
    })?;
    print(&text)
}

fn options(config: &Config) -> Result<ScyllaOptions, Failure> {
    if config.cluster.cql_nodes().is_empty() {
        return Err(Failure::usage("--cql HOST:PORT is missing: the embedded store needs no schema"));
    }
    scylla_options(&config.cluster)
}

fn failed(config: &Config, error: StoreError) -> Failure {
    match error {
        StoreError::Open(reason) => Failure::Usage(format!("--cql {}: {reason}", config.cluster.cql)),
        other => Failure::operation(other),
    }
}

fn describe(status: &SchemaStatus, row: Option<&ClusterRow>, applied_now: &[u32]) -> String {
    let mut text = format!("keyspace {}: ", status.keyspace);
    let _ = match (&status.replication, status.missing.as_slice()) {
        (None, _) => writeln!(text, "not there; `imd schema apply` creates it"),
        (Some(_), []) => writeln!(text, "version {}, up to date", status.version()),
        (Some(_), missing) => {
            writeln!(text, "version {}, {} to apply with `imd schema apply`", status.version(), missing.len())
        }
    };
    for version in applied_now {
        let _ = writeln!(text, "applied version {version}");
    }
    for (key, value) in status.replication.iter().flatten() {
        let _ = writeln!(text, "  {key} = {value}");
    }
    let _ = match row {
        Some(row) => writeln!(text, "cluster {}, {} shards", row.cluster_id, row.shards),
        None => writeln!(text, "belongs to no cluster yet"),
    };
    for warning in &status.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    text
}
