//! Going through all partitions, in the order of their tokens. A place is the last token, behind the number of its table.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use im_proto::ConversationId;

use super::{Inner, failure, metrics::Operation, query::Query, value::unsigned};
use crate::model::{BucketId, Page, StoreError, Table};

/// Tables of partitions of the state, one after the other.
const STATE: [Query; 2] = [Query::ListState, Query::ListBusy];

/// Where a page begins: a table, and the token before.
#[derive(Clone, Copy)]
struct Place {
    table: u8,
    token: i64,
}

impl Place {
    /// Before all of a table: no partition has the least token.
    const fn start(table: u8) -> Self {
        Self { table, token: i64::MIN }
    }

    fn decode(place: Option<Bytes>) -> Result<Self, StoreError> {
        let Some(mut place) = place else { return Ok(Self::start(0)) };
        if place.len() != 9 {
            return Err(StoreError::Invalid("a place of another store".into()));
        }
        Ok(Self { table: place.get_u8(), token: place.get_i64() })
    }

    fn encode(self) -> Bytes {
        let mut place = BytesMut::with_capacity(9);
        place.put_u8(self.table);
        place.put_i64(self.token);
        place.freeze()
    }

    /// Tokens are hashes: how far one lies in their order is how many lie before it.
    fn permille(self, tables: u32) -> u32 {
        let part = u32::try_from(((i128::from(self.token) - i128::from(i64::MIN)) * 1_000) >> 64).unwrap_or(1_000);
        (u32::from(self.table) * 1_000 + part) / tables
    }
}

/// Partitions with their tokens, and the last token that is complete if there are more.
struct Listed<T> {
    items: Vec<T>,
    next: Option<i64>,
}

/// Cuts a full list before its last token, which may have further partitions.
fn complete<T>(mut rows: Vec<(T, i64)>, limit: usize) -> Result<Listed<T>, StoreError> {
    let mut next = None;
    if let Some(&(_, last)) = rows.last().filter(|_| rows.len() == limit) {
        rows.retain(|(_, token)| *token != last);
        let before = rows.last().map(|(_, token)| *token);
        next = Some(before.ok_or_else(|| failure::damaged(format!("{limit} partitions have the same token")))?);
    }
    Ok(Listed { items: rows.into_iter().map(|(item, _)| item).collect(), next })
}

impl Inner {
    pub(super) async fn list_buckets(
        &self,
        from: Option<Bytes>,
        limit: usize,
    ) -> Result<Page<(ConversationId, BucketId)>, StoreError> {
        let place = Place::decode(from)?;
        let result = self.list(Query::ListLog, place, limit).await?;
        let mut rows = Vec::with_capacity(result.rows_num());
        for columns in result.rows::<(&[u8], i64, i64)>().map_err(failure::damaged)? {
            let (conversation, bucket, token) = columns.map_err(failure::damaged)?;
            let conversation = ConversationId::from_slice(conversation).map_err(failure::damaged)?;
            rows.push(((conversation, BucketId(unsigned(bucket)?)), token));
        }
        let Listed { items, next } = complete(rows, limit)?;
        let next = next.map(|token| Place { token, ..place });
        let done_permille = next.map_or(1_000, |next| next.permille(1));
        Ok(Page { items, next: next.map(Place::encode), done_permille })
    }

    pub(super) async fn list_partitions(
        &self,
        from: Option<Bytes>,
        limit: usize,
    ) -> Result<Page<(Table, Bytes)>, StoreError> {
        let place = Place::decode(from)?;
        let query = STATE.get(usize::from(place.table));
        let query = *query.ok_or_else(|| StoreError::Invalid("a place of another store".into()))?;
        let result = self.list(query, place, limit).await?;
        let mut rows = Vec::with_capacity(result.rows_num());
        for columns in result.rows::<(i32, &[u8], i64)>().map_err(failure::damaged)? {
            let (number, partition, token) = columns.map_err(failure::damaged)?;
            let table = u8::try_from(number).ok().and_then(Table::from_number);
            let table = table.ok_or_else(|| failure::damaged(format!("there is no state table {number}")))?;
            rows.push(((table, Bytes::copy_from_slice(partition)), token));
        }
        let Listed { items, next } = complete(rows, limit)?;
        let next_table = Some(Place::start(place.table + 1)).filter(|next| usize::from(next.table) < STATE.len());
        let next = next.map(|token| Place { token, ..place }).or(next_table);
        let done_permille = next.map_or(1_000, |next| next.permille(2));
        Ok(Page { items, next: next.map(Place::encode), done_permille })
    }

    async fn list(
        &self,
        query: Query,
        place: Place,
        limit: usize,
    ) -> Result<scylla::response::query_result::QueryRowsResult, StoreError> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let request = self.session.execute_unpaged(self.prepared.get(query), (place.token, limit));
        self.reads.run(Operation::List, request).await?.into_rows_result().map_err(failure::damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_of_one_token_stay_together() {
        let rows = vec![('a', 1), ('b', 2), ('c', 2), ('d', 3)];
        let all = complete(rows.clone(), 5).expect("a page");
        assert_eq!((all.items.len(), all.next), (4, None));
        let cut = complete(rows[..3].to_vec(), 3).expect("a page");
        assert_eq!((&cut.items[..], cut.next), (&['a'][..], Some(1)));
        let cut = complete(rows[..2].to_vec(), 2).expect("a page");
        assert_eq!((&cut.items[..], cut.next), (&['a'][..], Some(1)));
        assert!(complete(rows[1..3].to_vec(), 2).is_err());
    }

    #[test]
    fn places_read_back_and_progress_grows() {
        let place = Place { table: 1, token: -5 };
        let read = Place::decode(Some(place.encode())).expect("a place");
        assert_eq!((read.table, read.token), (1, -5));
        assert_eq!((Place::start(0).permille(2), Place::start(1).permille(2)), (0, 500));
        assert_eq!(Place { table: 1, token: i64::MAX }.permille(2), 999);
        assert!(Place::decode(Some(Bytes::from_static(b"x"))).is_err());
    }
}
