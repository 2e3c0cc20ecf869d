//! What the driver's errors mean here.

use scylla::errors::{DbError, ExecutionError, RequestAttemptError};

use super::metrics::ErrorKind;
use crate::model::StoreError;

/// An error of a request that was handed to the driver. Never anything but `Unconfirmed`: the driver may have tried more than once,
/// and reports the last attempt only.
pub(super) fn of(error: &ExecutionError) -> (ErrorKind, StoreError) {
    (kind(error), StoreError::Unconfirmed(error.to_string()))
}

fn kind(error: &ExecutionError) -> ErrorKind {
    match error {
        ExecutionError::EmptyPlan | ExecutionError::ConnectionPoolError(_) => ErrorKind::Connection,
        ExecutionError::RequestTimeout(_) => ErrorKind::Timeout,
        ExecutionError::BadQuery(_) => ErrorKind::Refused,
        ExecutionError::LastAttemptError(attempt) => attempt_kind(attempt),
        _ => ErrorKind::Other,
    }
}

fn attempt_kind(error: &RequestAttemptError) -> ErrorKind {
    match error {
        RequestAttemptError::BrokenConnectionError(_) => ErrorKind::Connection,
        RequestAttemptError::UnableToAllocStreamId => ErrorKind::Overloaded,
        RequestAttemptError::DbError(error, _) => match error {
            DbError::Unavailable { .. } | DbError::IsBootstrapping => ErrorKind::Unavailable,
            DbError::Overloaded | DbError::RateLimitReached { .. } => ErrorKind::Overloaded,
            DbError::ReadTimeout { .. } | DbError::ReadFailure { .. } => ErrorKind::ReadFailure,
            DbError::WriteTimeout { .. } | DbError::WriteFailure { .. } => ErrorKind::WriteFailure,
            DbError::SyntaxError | DbError::Invalid | DbError::Unauthorized | DbError::ConfigError => {
                ErrorKind::Refused
            }
            _ => ErrorKind::Other,
        },
        _ => ErrorKind::Other,
    }
}

/// What was read is not what was written.
pub(super) fn damaged(what: impl std::fmt::Display) -> StoreError {
    StoreError::Damaged(format!("{what}; look at the row with cqlsh before anything else"))
}
