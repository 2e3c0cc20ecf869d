//! Places in the order of keys, for the backends that keep everything sorted: conversation and bucket, table and partition.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use im_proto::ConversationId;

use crate::model::{BucketId, Page, StoreError, Table};

fn unknown() -> StoreError {
    StoreError::Invalid("a place of another store".into())
}

/// A place in the log.
pub(crate) fn of_bucket((conversation, bucket): (ConversationId, BucketId)) -> Bytes {
    let mut place = BytesMut::with_capacity(ConversationId::BYTES + 8);
    place.put_slice(conversation.as_bytes());
    place.put_u64(bucket.0);
    place.freeze()
}

/// The bucket of a place.
pub(crate) fn bucket(place: Option<Bytes>) -> Result<Option<(ConversationId, BucketId)>, StoreError> {
    let Some(mut place) = place else { return Ok(None) };
    if place.len() != ConversationId::BYTES + 8 {
        return Err(unknown());
    }
    let conversation = ConversationId::from_slice(&place.split_to(ConversationId::BYTES)).map_err(|_| unknown())?;
    Ok(Some((conversation, BucketId(place.get_u64()))))
}

/// A place in the state tables.
pub(crate) fn of_partition((table, partition): &(Table, Bytes)) -> Bytes {
    [&[*table as u8], &partition[..]].concat().into()
}

/// The partition of a place.
pub(crate) fn partition(place: Option<Bytes>) -> Result<Option<(Table, Bytes)>, StoreError> {
    let Some(mut place) = place else { return Ok(None) };
    let table = place.first().copied().and_then(Table::from_number).ok_or_else(unknown)?;
    place.advance(1);
    Ok(Some((table, place)))
}

/// A page of what `next` finds behind each item, with the place of its last one.
pub(crate) fn page<T: Clone>(
    from: Option<T>,
    limit: usize,
    mut next: impl FnMut(Option<&T>) -> Result<Option<T>, StoreError>,
    place: impl Fn(&T) -> Bytes,
    done_permille: impl Fn(&T) -> u32,
) -> Result<Page<T>, StoreError> {
    let mut items = Vec::new();
    let mut last = from;
    while items.len() < limit {
        match next(last.as_ref())? {
            Some(item) => {
                last = Some(item.clone());
                items.push(item);
            }
            None => return Ok(Page { items, next: None, done_permille: 1_000 }),
        }
    }
    let (next, done_permille) = (last.as_ref().map(place), last.as_ref().map_or(0, done_permille));
    Ok(Page { items, next, done_permille })
}

/// Ids of conversations are hashes: how far one lies in their order is how many lie before it.
pub(crate) fn bucket_permille((conversation, _): &(ConversationId, BucketId)) -> u32 {
    let bytes = conversation.as_bytes();
    u32::from(u16::from_be_bytes([bytes[0], bytes[1]])) * 1_000 / 65_536
}

/// As [`bucket_permille`], for tables one after the other.
pub(crate) fn partition_permille((table, partition): &(Table, Bytes)) -> u32 {
    let first = partition.first().copied().map_or(0, u32::from);
    let tables = u32::try_from(Table::ALL.len()).unwrap_or(u32::MAX);
    ((u32::from(*table as u8) - 1) * 256 + first) * 1_000 / (tables * 256)
}
