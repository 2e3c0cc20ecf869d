//! The schema, as numbered migrations, and the commands `imd schema apply` and `imd schema status`.
//!
//! A migration is a list of statements, each of which may be run again; it is recorded when all of them were run and every node agreed.
//! Whoever dies half-way leaves a schema that the next run completes. Only what ScyllaDB and Cassandra both understand is used; what
//! they do not share (compaction, tablets) is an option. No other compaction than one that ignores write timestamps: they are epochs
//! and seqs here.
//!
//! Runs from one place at a time: two servers' worth of `CREATE TABLE` racing each other is a known way to damage a Cassandra. Never
//! drops or alters what holds data.

mod health;

use std::collections::BTreeMap;

use im_proto::Timestamp;
use scylla::{client::session::Session, response::query_result::QueryRowsResult, value::CqlTimestamp};

pub use self::health::Warning;
use super::{ScyllaOptions, query::CONSISTENCY, session};
use crate::model::StoreError;

/// The newest version, which this program needs.
pub const VERSION: u32 = 1;

/// A step of the schema. Versions are 1, 2, 3, …; one that was ever released never changes.
struct Migration {
    version: u32,
    name: &'static str,
    statements: &'static [&'static str],
}

/// `{keyspace}` and `{compaction}` are replaced.
///
/// A statement must do no harm when it is run again. Adding a column later needs a look at `system_schema.columns` first: only
/// Cassandra has `ADD IF NOT EXISTS`.
///
/// Deleted rows are remembered for `gc_grace_seconds`; within that time every replica must be repaired (`nodetool repair`), as for any
/// table of these servers. Bursts come and go all the time and their ghosts cost an open of a conversation and nothing else, so that
/// their table forgets after three hours, the time for which hints are kept: a scan never wades through days of deletions.
const MIGRATIONS: &[Migration] = &[Migration {
    version: 1,
    name: "messages, fences, state",
    statements: &[
        "CREATE TABLE IF NOT EXISTS {keyspace}.messages (
            conversation_id blob, bucket bigint, seq bigint, committed bigint, counted bigint, sender text,
            client_message_id blob, sent_at timestamp, kind int, flags int, body blob, meta blob,
            PRIMARY KEY ((conversation_id, bucket), seq)
        ) WITH CLUSTERING ORDER BY (seq ASC) AND compaction = {compaction} AND default_time_to_live = 0",
        "CREATE TABLE IF NOT EXISTS {keyspace}.fences (
            slot int, instance text, generation bigint static,
            PRIMARY KEY (slot, instance)
        ) WITH compaction = {compaction} AND default_time_to_live = 0",
        "CREATE TABLE IF NOT EXISTS {keyspace}.state (
            table_number int, partition_key blob, row_key blob, value blob,
            PRIMARY KEY ((table_number, partition_key), row_key)
        ) WITH CLUSTERING ORDER BY (row_key ASC) AND compaction = {compaction} AND default_time_to_live = 0",
        "CREATE TABLE IF NOT EXISTS {keyspace}.busy (
            table_number int, partition_key blob, row_key blob, value blob,
            PRIMARY KEY ((table_number, partition_key), row_key)
        ) WITH CLUSTERING ORDER BY (row_key ASC) AND compaction = {compaction} AND default_time_to_live = 0
            AND gc_grace_seconds = 10800",
    ],
}];

/// What holds the record of migrations; made before any of them.
const RECORD: &str = "CREATE TABLE IF NOT EXISTS {keyspace}.schema_version (
    id int, version int, name text, applied_at timestamp, PRIMARY KEY (id, version)
)";

/// A migration that was completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppliedMigration {
    pub version: u32,
    pub name: String,
    pub applied_at: Timestamp,
}

/// The schema as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaStatus {
    pub keyspace: String,
    /// Completed migrations, ascending; empty also if there is no keyspace.
    pub applied: Vec<AppliedMigration>,
    /// What this program would still have to apply.
    pub missing: Vec<u32>,
    /// How the keyspace is copied, as the server says it (`class`, then copies by data centre); `None` without a keyspace.
    pub replication: Option<BTreeMap<String, String>>,
    pub warnings: Vec<Warning>,
}

impl SchemaStatus {
    /// The greatest completed version, 0 if there is none.
    pub fn version(&self) -> u32 {
        self.applied.last().map_or(0, |migration| migration.version)
    }
}

/// What a run did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaReport {
    /// What this run completed.
    pub applied_now: Vec<u32>,
    /// How things stand afterwards.
    pub status: SchemaStatus,
}

/// How the schema stands. Changes nothing.
pub async fn status(options: &ScyllaOptions) -> Result<SchemaStatus, StoreError> {
    options.check()?;
    let session = session::for_schema(options).await?;
    read_status(&session, options).await
}

/// Brings the schema to [`VERSION`]: the keyspace if there is none, then each missing migration, statement by statement, each awaited
/// until all nodes agree. `now` is recorded with what was done. May be run again at any time.
pub async fn apply(options: &ScyllaOptions, now: Timestamp) -> Result<SchemaReport, StoreError> {
    options.check()?;
    let session = session::for_schema(options).await?;
    let applied_now = migrate(&session, options, MIGRATIONS, now).await?;
    let status = read_status(&session, options).await?;
    Ok(SchemaReport { applied_now, status })
}

/// The version that was completed last; an error that says what to do if it is older than this program.
pub(super) async fn check(session: &Session, keyspace: &str) -> Result<u32, StoreError> {
    let advice = |what: String| StoreError::Open(format!("{what}; run `imd schema apply`"));
    let applied = match replication(session, keyspace).await? {
        None => return Err(advice(format!("there is no keyspace `{keyspace}`"))),
        Some(_) => applied(session, keyspace).await?,
    };
    let version = applied.last().map_or(0, |migration| migration.version);
    if version < VERSION {
        return Err(advice(format!("the schema of keyspace `{keyspace}` has version {version}, {VERSION} is needed")));
    }
    Ok(version)
}

async fn migrate(
    session: &Session,
    options: &ScyllaOptions,
    migrations: &[Migration],
    now: Timestamp,
) -> Result<Vec<u32>, StoreError> {
    let keyspace = &options.keyspace;
    if replication(session, keyspace).await?.is_none() {
        let datacenter = match &options.datacenter {
            Some(datacenter) => datacenter.clone(),
            None => health::local_datacenter(session).await?,
        };
        let copies = options.replication_factor;
        let create = format!(
            "CREATE KEYSPACE IF NOT EXISTS {keyspace} WITH replication = \
             {{'class':'NetworkTopologyStrategy','{datacenter}':{copies}}} AND durable_writes = true {}",
            options.keyspace_suffix
        );
        session::run(session, &create).await?;
    }
    session::run(session, &RECORD.replace("{keyspace}", keyspace)).await?;
    let before = applied(session, keyspace).await?;
    let mut applied_now = Vec::new();
    for migration in migrations {
        if before.iter().any(|applied| applied.version == migration.version) {
            continue;
        }
        for statement in migration.statements {
            let statement = statement.replace("{keyspace}", keyspace).replace("{compaction}", &options.compaction);
            session::run(session, &statement).await?;
        }
        record(session, keyspace, migration, now).await?;
        applied_now.push(migration.version);
    }
    Ok(applied_now)
}

async fn record(session: &Session, keyspace: &str, migration: &Migration, now: Timestamp) -> Result<(), StoreError> {
    let text = format!(
        "INSERT INTO {keyspace}.schema_version (id, version, name, applied_at) VALUES (0, ?, ?, ?) USING TIMESTAMP ?"
    );
    let mut statement = session.prepare(text).await.map_err(session::cannot)?;
    statement.set_consistency(CONSISTENCY);
    statement.set_is_idempotent(true);
    let version = i32::try_from(migration.version).unwrap_or(i32::MAX);
    // As everywhere: no timestamp of a clock.
    let values = (version, migration.name, CqlTimestamp(now.as_millis()), 1_i64);
    session.execute_unpaged(&statement, values).await.map_err(session::cannot)?;
    Ok(())
}

async fn read_status(session: &Session, options: &ScyllaOptions) -> Result<SchemaStatus, StoreError> {
    let replication = replication(session, &options.keyspace).await?;
    let applied = match &replication {
        None => Vec::new(),
        Some(_) => applied(session, &options.keyspace).await?,
    };
    let is_missing = |version: &u32| !applied.iter().any(|migration| migration.version == *version);
    let missing = MIGRATIONS.iter().map(|migration| migration.version).filter(is_missing).collect();
    let warnings = health::warnings(session, replication.as_ref()).await?;
    Ok(SchemaStatus { keyspace: options.keyspace.clone(), applied, missing, replication, warnings })
}

/// The record of migrations, ascending; empty if nothing was ever recorded.
async fn applied(session: &Session, keyspace: &str) -> Result<Vec<AppliedMigration>, StoreError> {
    let known = "SELECT table_name FROM system_schema.tables WHERE keyspace_name = ? AND table_name = 'schema_version'";
    if select(session, known, (keyspace,)).await?.rows_num() == 0 {
        return Ok(Vec::new());
    }
    let text = format!("SELECT version, name, applied_at FROM {keyspace}.schema_version WHERE id = 0");
    let rows = select(session, &text, ()).await?;
    let rows = rows.rows::<(i32, &str, CqlTimestamp)>().map_err(session::cannot)?;
    rows.map(|row| {
        let (version, name, at) = row.map_err(session::cannot)?;
        let version = u32::try_from(version).map_err(session::cannot)?;
        Ok(AppliedMigration { version, name: name.to_owned(), applied_at: Timestamp::from_millis(at.0) })
    })
    .collect()
}

/// How a keyspace is copied, if it exists.
async fn replication(session: &Session, keyspace: &str) -> Result<Option<BTreeMap<String, String>>, StoreError> {
    let text = "SELECT replication FROM system_schema.keyspaces WHERE keyspace_name = ?";
    let rows = select(session, text, (keyspace,)).await?;
    let row = rows.maybe_first_row::<(BTreeMap<String, String>,)>().map_err(session::cannot)?;
    Ok(row.map(|(replication,)| replication))
}

async fn select(
    session: &Session,
    text: &str,
    values: impl scylla::serialize::row::SerializeRow,
) -> Result<QueryRowsResult, StoreError> {
    let mut statement = session.prepare(text).await.map_err(session::cannot)?;
    statement.set_is_idempotent(true);
    // Tables of the system are local to a node; those of ours are read like everything else.
    if !text.contains("system") {
        statement.set_consistency(CONSISTENCY);
    }
    let result = session.execute_unpaged(&statement, values).await.map_err(session::cannot)?;
    result.into_rows_result().map_err(session::cannot)
}

/// The columns of a table as its migration declares them.
#[cfg(test)]
pub(super) fn columns_of(table: &str) -> Vec<String> {
    let mut statements = MIGRATIONS.iter().flat_map(|migration| migration.statements);
    let create = statements.find(|statement| statement.contains(&format!(".{table} ("))).expect("a table");
    let (_, columns) = create.split_once('(').expect("columns");
    let (columns, _) = columns.split_once("PRIMARY KEY").expect("a key");
    let names = columns.split(',').filter_map(|column| column.split_whitespace().next());
    names.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_consecutive_and_end_with_the_one_that_is_needed() {
        let versions: Vec<_> = MIGRATIONS.iter().map(|migration| migration.version).collect();
        assert_eq!(versions, (1..=VERSION).collect::<Vec<_>>());
    }

    #[test]
    fn every_statement_may_be_run_again_and_uses_what_both_servers_have() {
        let statements = MIGRATIONS.iter().flat_map(|migration| migration.statements).chain([&RECORD]);
        for statement in statements {
            assert!(statement.starts_with("CREATE TABLE IF NOT EXISTS {keyspace}."), "{statement}");
            let only_one_has = ["tablets", "compression", "TimeWindow", "MATERIALIZED", "USING TIMEOUT", "CUSTOM"];
            assert!(!only_one_has.iter().any(|word| statement.contains(word)), "{statement}");
        }
        assert!(!super::super::options::COMPACTION.contains("TimeWindow"));
    }

    #[test]
    fn every_statement_of_the_store_is_about_a_table_of_the_schema() {
        for query in super::super::query::Query::ALL {
            let text = query.text();
            let (_, table) = text.split_once("{keyspace}.").expect("a table");
            let table = table.split([' ', '(']).next().expect("a name");
            assert!(!columns_of(table).is_empty(), "{query:?}");
        }
    }
}
