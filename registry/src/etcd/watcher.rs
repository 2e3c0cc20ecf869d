//! Keeps the mirror equal to etcd: a watch that goes on after the last revision seen, whatever happens to its connection, and full
//! readings where the watch cannot go on (compaction), at the start, and from time to time in any case.

use std::{sync::Arc, time::Duration};

use etcd_client::{Event, WatchOptions, WatchResponse, WatchStream};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    lineage::Admitted,
    mirror::Entry,
    shared::{Shared, entry},
    transport::{CallError, Connected},
};

/// Pauses between attempts to watch.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// How often a silent watch is asked for a sign of life.
const PING: Duration = Duration::from_secs(3);
/// After so long without any message the watch is given up.
const SILENCE: Duration = Duration::from_secs(8);
/// A catch-up after a long break is one message of up to 1,000 revisions.
const MESSAGE_BYTES_MAX: usize = 256 << 20;

/// Shows every change of the mirror, and the ends of holds, until the registry is dropped.
pub(super) async fn publish(shared: Arc<Shared>, mut stop: watch::Receiver<()>) {
    loop {
        let until = shared.publish();
        shared.end_if_outdated();
        let hold = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = stop.changed() => return,
            () = shared.changed.notified() => {}
            () = hold => {}
        }
    }
}

/// Watches until the registry is dropped. The mirror has been read once.
pub(super) async fn watch(shared: Arc<Shared>, mut stop: watch::Receiver<()>) {
    let mut pause = PAUSE_MIN;
    let mut read_first = false;
    loop {
        let mut reached = Reached::Nothing;
        let ended = tokio::select! {
            biased;
            _ = stop.changed() => return,
            ended = follow(&shared, read_first, &mut reached) => ended,
        };
        shared.metrics.watching.set(0.0);
        shared.metrics.watch_restarts.increment(1);
        read_first = match reached {
            // After a recovery only a reading shows that the registry can be trusted again.
            _ if matches!(ended, CallError::Compacted | CallError::Refused(_)) => true,
            // What was known stays known, however long the way is broken.
            Reached::Nothing => read_first,
            // The same watch would most likely end the same way again.
            Reached::Begun => true,
            Reached::News => false,
        };
        pause = if reached == Reached::News { PAUSE_MIN } else { (pause * 2).min(PAUSE_MAX) };
        tracing::warn!(error = %ended, read_first, "the watch of the registry ended; trying again");
        tokio::select! {
            biased;
            _ = stop.changed() => return,
            () = sleep(pause / 2 + shared.environment.jitter(pause / 2)) => {}
        }
    }
}

/// How far a watch came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reached {
    Nothing,
    Begun,
    /// It told a change, or stood for a while.
    News,
}

/// Follows etcd until something fails.
async fn follow(shared: &Shared, read_first: bool, reached: &mut Reached) -> CallError {
    if read_first && let Err(error) = shared.reconcile().await {
        return error;
    }
    let connected = match shared.transport.connected().await {
        Ok(connected) => connected,
        Err(error) => {
            shared.transport.next_member().await;
            return error;
        }
    };
    let ended = match open(shared, &connected).await {
        Ok(stream) => listen(shared, &connected, stream, reached).await,
        Err(error) => error,
    };
    if matches!(ended, CallError::Unavailable(_)) {
        shared.transport.failed(&connected).await;
    }
    ended
}

async fn open(shared: &Shared, connected: &Connected) -> Result<WatchStream, CallError> {
    let from = i64::try_from(shared.mirror.lock().revision() + 1).unwrap_or(i64::MAX);
    let options = WatchOptions::new().with_prefix().with_start_revision(from).with_progress_notify();
    let mut client = connected.client.watch_client().max_decoding_message_size(MESSAGE_BYTES_MAX);
    match timeout(shared.transport.timeout, client.watch(shared.keys.prefix(), Some(options))).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(shared.transport.explain_at(connected, &error)),
        Err(_) => Err(CallError::Unavailable("a watch did not begin in time".to_owned())),
    }
}

async fn listen(shared: &Shared, connected: &Connected, mut stream: WatchStream, reached: &mut Reached) -> CallError {
    let begun = Instant::now();
    let mut silent_at = begun + SILENCE;
    let mut ping_at = Instant::now() + PING;
    let mut read_at = Instant::now() + reading_pause(shared);
    loop {
        tokio::select! {
            biased;
            message = stream.message() => {
                let message = match message {
                    Ok(Some(message)) => message,
                    Ok(None) => return CallError::Unavailable("the watch ended".to_owned()),
                    Err(error) => return shared.transport.explain_at(connected, &error),
                };
                match take(shared, &message).await {
                    Ok(changed) if changed || begun.elapsed() > SILENCE => *reached = Reached::News,
                    // The next message may be the one that cannot be read.
                    Ok(_) => *reached = (*reached).max(Reached::Begun),
                    Err(error) => return error,
                }
                silent_at = Instant::now() + SILENCE;
            }
            () = sleep_until(silent_at) => return CallError::Unavailable("the watch was silent".to_owned()),
            () = sleep_until(ping_at) => {
                ping_at = Instant::now() + PING;
                if !matches!(timeout(PING, stream.request_progress()).await, Ok(Ok(()))) {
                    return CallError::Unavailable("the watch takes no requests".to_owned());
                }
            }
            () = shared.reconcile_soon.notified() => read_at = Instant::now(),
            () = sleep_until(read_at) => {
                match shared.reconcile().await {
                    Ok(Admitted::Continued) => {}
                    Ok(Admitted::NewEra) => return CallError::Rejected("the registry was recovered".to_owned()),
                    Err(error) => return error,
                }
                read_at = Instant::now() + reading_pause(shared);
                // The watch was not read meanwhile.
                silent_at = Instant::now() + SILENCE;
            }
        }
    }
}

/// Spread, so that the processes of a cluster do not all read at the same moment.
fn reading_pause(shared: &Shared) -> Duration {
    shared.reconcile_interval * 3 / 4 + shared.environment.jitter(shared.reconcile_interval / 2)
}

/// Takes over one message of the watch; `true` if it changed anything.
async fn take(shared: &Shared, message: &WatchResponse) -> Result<bool, CallError> {
    if message.canceled() {
        let reason = message.cancel_reason();
        return Err(match message.compact_revision() {
            0 => CallError::Unavailable(format!("etcd ended the watch: {reason}")),
            _ => CallError::Compacted,
        });
    }
    let origin = shared.check_cluster(message.header()).await?;
    if message.created() {
        shared.metrics.watching.set(1.0);
        // A member that lags, or a registry that was restored: a reading tells.
        if origin.revision < shared.mirror.lock().revision() {
            shared.reconcile_soon.notify_one();
        }
    }
    // The revision to go on from moves with events only: signs of life of some versions of etcd overtake events.
    let events: Vec<Entry> = message.events().iter().filter_map(event).collect();
    let Some(newest) = events.last() else { return Ok(false) };
    shared.lineage.lock().saw(newest.mod_revision);
    let changed = shared.mirror.lock().apply(&shared.keys, &events);
    if changed {
        shared.changed.notify_one();
    }
    Ok(changed)
}

fn event(event: &Event) -> Option<Entry> {
    let found = event.kv()?;
    let mut taken = entry(found);
    // A key that was deleted has no version.
    if found.version() == 0 {
        taken.value = None;
    }
    Some(taken)
}
