//! Every statement that is ever sent to the tables, in one list.
//!
//! Invariants, which tests over the list keep: a statement that writes binds its timestamp, because one row with the server's clock
//! would beat every epoch for ever; nothing is conditional (no table is written both with timestamps and by lightweight
//! transactions); a statement that reads tails reads all columns, so that read repair cannot copy half a row.

use scylla::{
    client::session::Session,
    errors::PrepareError,
    statement::{Consistency, batch::Batch, batch::BatchType, prepared::PreparedStatement},
};

/// Reads and writes alike.
///
/// QUORUM and not LOCAL_QUORUM: with the copies in one data centre they are the same, and should somebody ever spread a keyspace over
/// several, quorums of different data centres would not meet, a fence written in one would not be seen in the other, and two owners
/// would commit. QUORUM is then only slower.
pub(super) const CONSISTENCY: Consistency = Consistency::Quorum;

macro_rules! queries {
    ($($(#[doc = $doc:literal])* $name:ident = $text:expr;)*) => {
        /// A statement.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Query { $($(#[doc = $doc])* $name,)* }

        impl Query {
            /// All of them, by number.
            pub(super) const ALL: &[Self] = &[$(Self::$name,)*];

            /// The statement; `{keyspace}` stands for the keyspace.
            pub(super) const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

queries! {
    /// A row of the log, with all its columns.
    Append = "INSERT INTO {keyspace}.messages (conversation_id, bucket, seq, committed, counted, sender, client_message_id, \
              sent_at, kind, flags, body, meta) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) USING TIMESTAMP ?";
    /// The newest rows of a bucket.
    Tail = "SELECT seq, committed, counted, sender, client_message_id, sent_at, kind, flags, body, meta, WRITETIME(committed) \
            FROM {keyspace}.messages WHERE conversation_id = ? AND bucket = ? ORDER BY seq DESC LIMIT ?";
    /// Rows of a bucket, ascending.
    Range = "SELECT seq, committed, counted, sender, client_message_id, sent_at, kind, flags, body, meta, WRITETIME(committed) \
             FROM {keyspace}.messages WHERE conversation_id = ? AND bucket = ? AND seq >= ? AND seq <= ? LIMIT ?";
    /// Rows of a bucket without their bodies.
    Keys = "SELECT seq, sender, client_message_id \
            FROM {keyspace}.messages WHERE conversation_id = ? AND bucket = ? AND seq >= ? AND seq <= ?";
    /// A fence.
    Fence = "INSERT INTO {keyspace}.fences (slot, instance) VALUES (?, ?) USING TIMESTAMP ?";
    /// The generation of a slot, and the row without a name that makes it readable when no instance of the slot is fenced.
    Generation = "INSERT INTO {keyspace}.fences (slot, instance, generation) VALUES (?, '', ?) USING TIMESTAMP ?";
    /// Whether there is a fence, and the generation, in one look.
    FenceRead = "SELECT instance, generation FROM {keyspace}.fences WHERE slot = ? AND instance IN ('', ?)";
    /// A row of a state table; a null value deletes.
    StateWrite = "UPDATE {keyspace}.state USING TIMESTAMP ? SET value = ? \
                  WHERE table_number = ? AND partition_key = ? AND row_key = ?";
    /// A row of a state table.
    StateRead = "SELECT row_key, value, WRITETIME(value) FROM {keyspace}.state \
                 WHERE table_number = ? AND partition_key = ? AND row_key = ?";
    /// Rows of a partition of a state table.
    StateScan = "SELECT row_key, value, WRITETIME(value) FROM {keyspace}.state \
                 WHERE table_number = ? AND partition_key = ? AND row_key >= ? LIMIT ?";
    /// The same of the table of bursts.
    BusyWrite = "UPDATE {keyspace}.busy USING TIMESTAMP ? SET value = ? \
                 WHERE table_number = ? AND partition_key = ? AND row_key = ?";
    /// The same of the table of bursts.
    BusyRead = "SELECT row_key, value, WRITETIME(value) FROM {keyspace}.busy \
                WHERE table_number = ? AND partition_key = ? AND row_key = ?";
    /// The same of the table of bursts.
    BusyScan = "SELECT row_key, value, WRITETIME(value) FROM {keyspace}.busy \
                WHERE table_number = ? AND partition_key = ? AND row_key >= ? LIMIT ?";
    /// Partitions of the log, in the order of their tokens.
    ListLog = "SELECT DISTINCT conversation_id, bucket, token(conversation_id, bucket) FROM {keyspace}.messages \
               WHERE token(conversation_id, bucket) > ? LIMIT ?";
    /// Partitions of the state tables, in the order of their tokens.
    ListState = "SELECT DISTINCT table_number, partition_key, token(table_number, partition_key) FROM {keyspace}.state \
                 WHERE token(table_number, partition_key) > ? LIMIT ?";
    /// The same of the table of bursts.
    ListBusy = "SELECT DISTINCT table_number, partition_key, token(table_number, partition_key) FROM {keyspace}.busy \
                WHERE token(table_number, partition_key) > ? LIMIT ?";
}

/// All statements, prepared.
pub(super) struct Prepared {
    statements: Vec<PreparedStatement>,
    /// Batches of 2, 3, … rows of the log: put together once, since a batch is only the list of its statements.
    appends: Vec<Batch>,
}

impl Prepared {
    /// Prepares them.
    pub(super) async fn new(session: &Session, keyspace: &str) -> Result<Self, PrepareError> {
        let mut statements = Vec::with_capacity(Query::ALL.len());
        for query in Query::ALL {
            let mut statement = session.prepare(query.text().replace("{keyspace}", keyspace)).await?;
            statement.set_consistency(CONSISTENCY);
            // Values and timestamps come from the caller: any of them may run twice, in any order.
            statement.set_is_idempotent(true);
            statements.push(statement);
        }
        let row = statements[Query::Append as usize].clone();
        let appends = (2..=im_proto::limits::BATCH_ROWS_MAX).map(|rows| batch_of(&row, rows)).collect();
        Ok(Self { statements, appends })
    }

    /// One statement.
    pub(super) fn get(&self, query: Query) -> &PreparedStatement {
        &self.statements[query as usize]
    }

    /// The batch of so many rows of the log, if it is two or more.
    pub(super) fn append(&self, rows: usize) -> Option<&Batch> {
        rows.checked_sub(2).and_then(|index| self.appends.get(index))
    }
}

/// So many times the same statement as one write of one partition, which a replica applies whole or not at all. Unlogged, because
/// the log of batches is for batches over several partitions.
pub(super) fn batch_of(statement: &PreparedStatement, times: usize) -> Batch {
    let statements = std::iter::repeat_with(|| statement.clone().into()).take(times).collect();
    let mut batch = Batch::new_with_statements(BatchType::Unlogged, statements);
    batch.set_consistency(CONSISTENCY);
    batch.set_is_idempotent(true);
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(query: Query) -> Vec<String> {
        query.text().split_whitespace().map(str::to_owned).collect()
    }

    fn writes(query: Query) -> bool {
        matches!(words(query)[0].as_str(), "INSERT" | "UPDATE" | "DELETE" | "TRUNCATE" | "BEGIN")
    }

    #[test]
    fn every_write_binds_its_timestamp() {
        let count = Query::ALL.iter().filter(|query| writes(**query)).count();
        assert!(count >= 4, "the walk sees the writes");
        for query in Query::ALL.iter().filter(|query| writes(**query)) {
            let bound = query.text().matches("USING TIMESTAMP ?").count();
            assert_eq!(bound, 1, "{query:?} does not bind its timestamp");
        }
    }

    #[test]
    fn nothing_is_conditional_and_nothing_expires() {
        for query in Query::ALL {
            let words = words(*query);
            assert!(!words.iter().any(|word| word == "IF" || word == "TTL"), "{query:?}");
            assert!(matches!(words[0].as_str(), "SELECT" | "INSERT" | "UPDATE"), "{query:?}");
        }
    }

    #[test]
    fn rows_of_the_log_are_written_and_read_whole() {
        let columns = crate::scylla::schema::columns_of("messages");
        assert_eq!(columns.len(), 12, "{columns:?}");
        let inserted: Vec<_> = Query::Append.text().split(['(', ')']).nth(1).expect("columns").split(',').collect();
        assert_eq!(inserted.iter().map(|column| column.trim()).collect::<Vec<_>>(), columns);
        for query in [Query::Tail, Query::Range] {
            let selected = query.text().split("FROM").next().expect("columns");
            for column in columns.iter().filter(|column| !["conversation_id", "bucket"].contains(&&***column)) {
                assert!(selected.contains(&**column), "{query:?} leaves {column} out");
            }
        }
    }
}
