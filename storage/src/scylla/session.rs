//! Connecting: what the driver is told.
//!
//! A node that is frozen, not dead, is the dangerous one: connections stay open and a share of all requests goes to it. Keep-alives
//! of a second and a second attempt elsewhere keep that share alive; the driver's own values would wait for a minute.

use std::{fmt, sync::Arc, time::Duration};

use scylla::{
    client::{execution_profile::ExecutionProfile, session::Session, session_builder::SessionBuilder},
    policies::{
        load_balancing::DefaultPolicy, retry::DefaultRetryPolicy,
        speculative_execution::SimpleSpeculativeExecutionPolicy,
    },
    statement::Statement,
};

use super::{ScyllaOptions, query::CONSISTENCY};
use crate::model::StoreError;

/// How often an idle connection is asked whether it lives, and how long it may take to say so.
const KEEPALIVE: Duration = Duration::from_secs(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Statements that change the schema wait for all nodes to agree.
const SCHEMA_TIMEOUT: Duration = Duration::from_secs(60);

/// The session of a store. Deadlines are those of the lanes.
pub(super) async fn for_store(options: &ScyllaOptions) -> Result<Session, StoreError> {
    let mut policy = DefaultPolicy::builder().token_aware(true);
    if let Some(datacenter) = &options.datacenter {
        policy = policy.prefer_datacenter(datacenter.clone()).permit_dc_failover(true);
    }
    let speculation = options.speculate_after.map(|retry_interval| {
        let policy = SimpleSpeculativeExecutionPolicy { max_retry_count: 1, retry_interval };
        Arc::new(policy) as Arc<dyn scylla::policies::speculative_execution::SpeculativeExecutionPolicy>
    });
    let profile = ExecutionProfile::builder()
        .consistency(CONSISTENCY)
        .serial_consistency(None)
        .request_timeout(None)
        .retry_policy(Arc::new(DefaultRetryPolicy::new()))
        .load_balancing_policy(policy.build())
        .speculative_execution_policy(speculation)
        .build();
    connect(options, profile, |builder| builder.keyspaces_to_fetch([options.keyspace.as_str()])).await
}

/// A session for statements about the schema.
pub(super) async fn for_schema(options: &ScyllaOptions) -> Result<Session, StoreError> {
    let profile = ExecutionProfile::builder()
        .consistency(CONSISTENCY)
        .serial_consistency(None)
        .request_timeout(Some(SCHEMA_TIMEOUT))
        .build();
    connect(options, profile, |builder| builder.schema_agreement_timeout(SCHEMA_TIMEOUT)).await
}

async fn connect(
    options: &ScyllaOptions,
    profile: ExecutionProfile,
    set: impl FnOnce(SessionBuilder) -> SessionBuilder,
) -> Result<Session, StoreError> {
    let mut builder = SessionBuilder::new()
        .known_nodes(&options.nodes)
        .connection_timeout(options.connect_timeout)
        .tcp_nodelay(true)
        .keepalive_interval(KEEPALIVE)
        .keepalive_timeout(KEEPALIVE_TIMEOUT)
        .default_execution_profile_handle(profile.into_handle());
    if let Some(credentials) = &options.credentials {
        builder = builder.user(&credentials.user, &credentials.password);
    }
    let nodes = options.nodes.join(", ");
    set(builder).build().await.map_err(|error| StoreError::Open(format!("none of {nodes} can be used: {error}")))
}

/// Runs a statement about the schema; the driver waits until all nodes agree.
pub(super) async fn run(session: &Session, text: &str) -> Result<(), StoreError> {
    tracing::debug!(statement = text, "changing the schema");
    session.query_unpaged(Statement::new(text), ()).await.map_err(cannot)?;
    Ok(())
}

/// Whatever goes wrong before the store is in use.
pub(super) fn cannot(error: impl fmt::Display) -> StoreError {
    StoreError::Open(error.to_string())
}
