//! Numbers as CQL has them: signed.

use super::failure;
use crate::model::StoreError;

/// A number as a `bigint` or a write timestamp.
pub(super) fn signed(number: u64) -> Result<i64, StoreError> {
    i64::try_from(number).map_err(|_| StoreError::Invalid(format!("{number} is no signed 64-bit number")))
}

/// A number as it was written.
pub(super) fn unsigned(number: i64) -> Result<u64, StoreError> {
    u64::try_from(number).map_err(|_| failure::damaged(format!("{number} is below zero")))
}
