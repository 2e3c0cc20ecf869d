//! What must not happen, told to whom it befell and to the log under one id.

use im_proto::{StatusCode, status::CorrelationId, v1};

use crate::cluster::Cluster;

impl Cluster {
    /// A new name for an event of the log that somebody is told of.
    pub fn correlation_id(&self) -> CorrelationId {
        CorrelationId::draw(&*self.environment.random)
    }

    /// The status of a mistake of this program, which a person must look at.
    pub fn mistake(&self, what: &str) -> v1::Status {
        let correlation_id = self.correlation_id();
        tracing::error!(%correlation_id, what, "a mistake of the server");
        correlation_id.of(StatusCode::Internal.to_status())
    }
}
