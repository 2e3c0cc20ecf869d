//! Work that is done when nobody else wants a core.
//!
//! The computing of a handshake takes a third of a millisecond, and in a thread that serves users those behind it wait that long. So it
//! is handed to threads which the kernel runs only when no other wants to (`SCHED_IDLE`). Where they get nowhere, on a machine
//! without a spare moment, who has waited for [`PATIENCE`] does the work itself: newcomers keep their share of the cores (`effort`).
//!
//! Nothing but computing is done there: no lock that users wait for, no input or output.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use metrics::Counter;
use parking_lot::Mutex;
use tokio::{sync::oneshot, time::timeout};

/// How long work waits for a core that nobody wants. A handshake has two pieces of it.
pub(crate) const PATIENCE: Duration = Duration::from_millis(50);
/// Pieces that wait. As many as the threads do in a second; who does not find a place does the work itself.
const WAITING_MAX: usize = 4096;

type Work = Box<dyn FnOnce() + Send>;
/// A piece of work until somebody takes it.
type Place = Arc<Mutex<Option<Work>>>;

/// The threads, which end with the last handle.
#[derive(Clone)]
pub(crate) struct Spare {
    /// `None`: all work is done where it is asked for.
    places: Option<SyncSender<Place>>,
    patience: Duration,
    /// Work that found no spare core.
    hurried: Counter,
}

/// Work whose asker has gone is not done.
struct Asked(Place);

impl Drop for Asked {
    fn drop(&mut self) {
        let work = self.0.lock().take();
        drop(work);
    }
}

impl Spare {
    /// Starts so many threads; without any all work is done where it is asked for.
    pub fn start(threads: usize, patience: Duration, hurried: Counter) -> Self {
        let (places, asked) = sync_channel(WAITING_MAX);
        let asked = Arc::new(Mutex::new(asked));
        let mut started = 0;
        for _ in 0..threads {
            let asked = asked.clone();
            match thread::Builder::new().name("im-spare".to_owned()).spawn(move || work(&asked)) {
                Ok(_) => started += 1,
                Err(error) => tracing::warn!(%error, "no thread for handshakes: they are done among the users"),
            }
        }
        Self { places: (started > 0).then_some(places), patience, hurried }
    }

    /// Has work done. An error if it panicked.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let (done, result) = oneshot::channel();
        let work: Work = Box::new(move || {
            // Whoever asked may have gone.
            let _ = done.send(work());
        });
        let place = Asked(Arc::new(Mutex::new(Some(work))));
        let panicked = |_| io::Error::other("the work panicked");
        let mut result = pin!(result);
        let is_asked = self.places.as_ref().is_some_and(|places| places.try_send(place.0.clone()).is_ok());
        if is_asked && let Ok(result) = timeout(self.patience, &mut result).await {
            return result.map_err(panicked);
        }
        let work = place.0.lock().take();
        if let Some(work) = work {
            self.hurried.increment(1);
            work();
        }
        result.await.map_err(panicked)
    }
}

/// The life of a thread.
fn work(asked: &Mutex<Receiver<Place>>) {
    if let Err(error) = rest() {
        tracing::warn!(%error, "handshakes are done at the priority of users: a flood of them is felt more");
    }
    loop {
        let place = asked.lock().recv();
        let Ok(place) = place else { return };
        let work = place.lock().take();
        if let Some(work) = work {
            // The asker is told by its channel.
            let _ = catch_unwind(AssertUnwindSafe(work));
        }
    }
}

/// From now on this thread runs only when no other wants to.
fn rest() -> Result<(), thread_priority::Error> {
    use thread_priority::{NormalThreadSchedulePolicy::Idle, ThreadPriority, ThreadSchedulePolicy::Normal};

    let outcome = thread_priority::set_thread_priority_and_policy(
        thread_priority::thread_native_id(),
        ThreadPriority::Min,
        Normal(Idle),
    );
    // A process that runs at less than the normal niceness may not go back to it, which the crate asks for after the policy.
    match thread_priority::thread_schedule_policy()? {
        Normal(Idle) => Ok(()),
        _ => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One thread that all work waits for, however busy the machine is.
    fn patient() -> Spare {
        Spare::start(1, Duration::from_secs(600), Counter::noop())
    }

    fn here() -> Option<String> {
        thread::current().name().map(str::to_owned)
    }

    #[tokio::test]
    async fn work_is_done_by_a_thread_that_runs_when_no_other_wants_to() {
        let spare = patient();
        let policy = spare.run(|| (here(), format!("{:?}", thread_priority::thread_schedule_policy()))).await;
        let expected = "Ok(Normal(Idle))".to_owned();
        assert_eq!(policy.expect("done"), (Some("im-spare".to_owned()), expected));
    }

    /// Keeps the only thread until the sender is dropped.
    async fn busy(spare: &Spare) -> SyncSender<()> {
        let (go_on, stop) = sync_channel::<()>(0);
        let (begun, begins) = oneshot::channel();
        let keep: Work = Box::new(move || {
            begun.send(()).expect("somebody waits");
            stop.recv().expect_err("nothing is sent");
        });
        let places = spare.places.as_ref().expect("a thread");
        places.try_send(Arc::new(Mutex::new(Some(keep)))).expect("room");
        begins.await.expect("begun");
        go_on
    }

    #[tokio::test]
    async fn who_has_waited_does_the_work_itself() {
        let spare = Spare::start(1, PATIENCE, Counter::noop());
        let _busy = busy(&spare).await;
        tokio::time::pause();
        assert_eq!(spare.run(here).await.expect("done"), here());
    }

    #[tokio::test]
    async fn without_threads_work_is_done_at_once() {
        let name = Spare::start(0, PATIENCE, Counter::noop()).run(here).await;
        assert_eq!(name.expect("done"), here());
    }

    #[tokio::test]
    async fn work_whose_asker_has_gone_is_not_done() {
        let spare = patient();
        let busy = busy(&spare).await;
        let done = Arc::new(Mutex::new(false));
        let asked = timeout(
            Duration::ZERO,
            spare.run({
                let done = done.clone();
                move || *done.lock() = true
            }),
        );
        asked.await.expect_err("nobody is free");
        drop(busy);
        spare.run(|| ()).await.expect("done");
        assert!(!*done.lock());
    }

    #[tokio::test]
    async fn a_panic_is_the_askers_error_and_the_thread_goes_on() {
        let spare = patient();
        spare.run(|| panic!("on purpose")).await.expect_err("panicked");
        assert_eq!(spare.run(here).await.expect("done"), Some("im-spare".to_owned()));
    }
}
