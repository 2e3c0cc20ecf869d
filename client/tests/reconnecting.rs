//! Where and when a client comes back: what a server that sends it away, or does not let it in, says about that.

use std::time::Duration;

use im_client::{Client, Endpoint};
use im_proto::{
    StatusCode,
    v1::{self, server_frame},
};
use tokio::time::Instant;

use crate::server::{Connection, Server, welcome};

/// The client's own waiting time after a lost session, at most.
const PROMPT: Duration = Duration::from_millis(100);

fn go_away(reconnect_after_ms: u32, endpoints: &[&str]) -> server_frame::Frame {
    let endpoints = endpoints.iter().map(|endpoint| (*endpoint).to_owned()).collect();
    server_frame::Frame::GoAway(v1::GoAway {
        reason: Some(StatusCode::Draining.to_status()),
        reconnect_after_ms,
        endpoints,
    })
}

/// The next dial comes when it may, and soon after.
async fn expect_dial(server: &Server, address: &str, since: Instant, after: Duration) -> Connection {
    let (endpoint, connection) = server.accept_raw().await;
    let elapsed = since.elapsed();
    assert!(elapsed >= after && elapsed <= after + PROMPT, "{address} after {elapsed:?}, not {after:?}");
    assert_eq!(endpoint.address, address);
    connection
}

fn close(code: StatusCode, retry_after: Duration) -> server_frame::Frame {
    server_frame::Frame::Close(v1::Close { status: Some(code.retry_after(retry_after)) })
}

/// The next dial, refused before its `Welcome`.
async fn refuse_at_the_door(mut connection: Connection, retry_after: Duration) {
    connection.expect().await;
    connection.send(close(StatusCode::Overloaded, retry_after)).await;
}

#[tokio::test(start_paused = true)]
async fn a_close_behind_a_go_away_leads_where_and_when_that_said() {
    let server = Server::new();
    let _client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    let since = Instant::now();
    connection.send(go_away(4_000, &["tcp://third:3"])).await;
    connection.close(StatusCode::Draining).await;
    drop(connection);
    let mut connection = expect_dial(&server, "third:3", since, Duration::from_secs(4)).await;
    connection.welcome(welcome()).await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_breaks_behind_a_go_away_leads_where_and_when_that_said() {
    let server = Server::new();
    let _client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    let since = Instant::now();
    connection.send(go_away(4_000, &["tcp://third:3"])).await;
    drop(connection);
    expect_dial(&server, "third:3", since, Duration::from_secs(4)).await;
}

#[tokio::test(start_paused = true)]
async fn a_go_away_at_the_door_is_followed_in_time() {
    let server = Server::new();
    let _client = Client::start(server.config());
    let (_, mut connection) = server.accept_raw().await;
    connection.expect().await;
    let since = Instant::now();
    connection.send(go_away(4_000, &["tcp://third:3"])).await;
    connection.close(StatusCode::Overloaded).await;
    expect_dial(&server, "third:3", since, Duration::from_secs(4)).await;
}

#[tokio::test(start_paused = true)]
async fn a_draining_server_that_names_nobody_is_left_for_the_next_that_is_known() {
    let server = Server::new();
    let endpoints: Vec<Endpoint> = vec!["tcp://first:1".parse().unwrap(), "tcp://second:2".parse().unwrap()];
    let _client = Client::start(server.config_for(endpoints, 1));
    let mut connection = server.accept_ready().await;
    let since = Instant::now();
    connection.close(StatusCode::Draining).await;
    drop(connection);
    expect_dial(&server, "second:2", since, Duration::ZERO).await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_refuses_for_a_while_is_not_asked_before() {
    let server = Server::new();
    let _client = Client::start(server.config());
    let mut since = Instant::now();
    let mut after = Duration::ZERO;
    for seconds in [3, 1, 20] {
        let connection = expect_dial(&server, "first:1", since, after).await;
        (since, after) = (Instant::now(), Duration::from_secs(seconds));
        refuse_at_the_door(connection, after).await;
    }
    expect_dial(&server, "first:1", since, after).await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_ends_a_session_for_a_while_is_not_asked_before() {
    let server = Server::new();
    let _client = Client::start(server.config());
    let mut connection = server.accept_ready().await;
    let since = Instant::now();
    let after = Duration::from_secs(3);
    connection.send(close(StatusCode::Unavailable, after)).await;
    drop(connection);
    expect_dial(&server, "first:1", since, after).await;
}

#[tokio::test(start_paused = true)]
async fn the_refusal_of_one_server_does_not_keep_the_client_from_another() {
    let server = Server::new();
    let endpoints: Vec<Endpoint> = vec!["tcp://first:1".parse().unwrap(), "tcp://second:2".parse().unwrap()];
    let _client = Client::start(server.config_for(endpoints, 1));
    let since = Instant::now();
    let first = expect_dial(&server, "first:1", since, Duration::ZERO).await;
    refuse_at_the_door(first, Duration::from_secs(3)).await;
    let second = expect_dial(&server, "second:2", since, Duration::ZERO).await;
    refuse_at_the_door(second, Duration::from_secs(10)).await;
    // Both have refused: the one that may be asked first is asked.
    let first = expect_dial(&server, "first:1", since, Duration::from_secs(3)).await;
    refuse_at_the_door(first, Duration::from_secs(60)).await;
    expect_dial(&server, "second:2", since, Duration::from_secs(10)).await;
}
