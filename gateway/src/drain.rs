//! Leaving without losing anything: `GoAway` spread over a window, then a `Close` for each connection as soon as it is quiet.

use std::{sync::Arc, time::Duration};

use im_proto::{StatusCode, v1};
use tokio::time::{Instant, sleep, sleep_until};
use v1::server_frame::Frame;

use crate::{connection::outbox::Wakers, gateway::Shared, session::Session};

/// How often connections are looked at that are not quiet yet.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

pub(crate) async fn run(shared: &Arc<Shared>, window: Duration) {
    shared.admission.start_draining();
    let started = Instant::now();
    let mut leaving: Vec<(Duration, Arc<Session>)> =
        shared.sessions.all().into_iter().map(|session| (shared.environment.jitter(window), session)).collect();
    leaving.sort_by_key(|(offset, session)| (*offset, session.id()));
    tracing::info!(connections = leaving.len(), "draining");
    let mut told = Vec::with_capacity(leaving.len());
    let mut next_look = started + LOOK_INTERVAL;
    for (offset, session) in leaving {
        sleep_until(started + offset).await;
        tell(shared, &session);
        told.push(session);
        if Instant::now() >= next_look {
            close_quiet(shared, &mut told, false);
            next_look = Instant::now() + LOOK_INTERVAL;
        }
    }
    let deadline = Instant::now() + shared.config.drain_grace;
    loop {
        let is_late = Instant::now() >= deadline;
        // Whoever came in between the flag and the list is closed here too.
        if is_late {
            told = shared.sessions.all();
        }
        close_quiet(shared, &mut told, is_late);
        let is_over = Instant::now() >= deadline + shared.config.close_linger + 5 * LOOK_INTERVAL;
        if shared.sessions.count() == 0 || is_over {
            break;
        }
        sleep(LOOK_INTERVAL).await;
        if told.is_empty() {
            told = shared.sessions.all();
        }
    }
    let left = shared.sessions.count();
    if left > 0 {
        tracing::warn!(connections = left, "connections did not end in time");
    }
}

fn tell(shared: &Shared, session: &Session) {
    let mut wakers = Wakers::default();
    let reconnect_after = shared.environment.jitter(Duration::from_secs(1));
    let go_away = v1::GoAway {
        reason: Some(StatusCode::Draining.to_status()),
        reconnect_after_ms: u32::try_from(reconnect_after.as_millis()).unwrap_or(u32::MAX),
        endpoints: shared.neighbours.offer_others(&shared.environment, &shared.instance, session.transport()),
    };
    session.push(shared, Frame::GoAway(go_away), &mut wakers);
}

/// Closes and takes off the list what is quiet, or everything.
fn close_quiet(shared: &Shared, told: &mut Vec<Arc<Session>>, all: bool) {
    let mut wakers = Wakers::default();
    told.retain(|session| {
        let is_leaving = all || session.is_quiet();
        if is_leaving {
            session.close(shared, StatusCode::Draining.to_status(), &mut wakers);
        }
        !is_leaving
    });
}
