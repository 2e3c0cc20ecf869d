//! A load: generator threads with their participants, started, switched and ended by the scenario.

use std::{
    collections::BTreeMap,
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, bail};
use im_proto::ConversationId;
use tokio::{sync::Semaphore, task::LocalSet, time::Instant};

use crate::{
    checker::History,
    crowd::{Flow, Participants, Plan, Progress, Statistics, Switches},
    driver::{Ended, Stage},
    measure,
    server::Endpoints,
    stream::{Connector, Transport},
};

/// Connections being opened at once by one thread: below a listener's usual backlog.
const OPENING_MAX: usize = 64;
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// Time between two looks at timers and switches.
const TICK: Duration = Duration::from_millis(5);
/// The same with a schedule of sends; finer than the runtime's timer, so a thread of its own keeps it.
const TICK_OPEN_LOOP: Duration = Duration::from_micros(200);
/// Pauses before a connection is opened again: doubled from the first to the last.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(320));

/// What a load is.
pub struct LoadPlan {
    pub transport: Transport,
    /// The participants of each thread.
    pub threads: Vec<Vec<Plan>>,
    pub flows: Vec<Flow>,
    pub open_loop: bool,
    /// Lost connections are opened again.
    pub reconnect: bool,
    /// Pin the generator's threads to the first cores.
    pub pin: bool,
}

/// A running load.
pub struct Load {
    threads: Vec<JoinHandle<anyhow::Result<Outcome>>>,
    pub switches: Arc<Switches>,
    pub progress: Arc<Progress>,
    /// What the moments of sends are counted from.
    pub origin: Instant,
    endpoints: Arc<Mutex<Endpoints>>,
    participants: u64,
    /// Those of them who are to be there at the end.
    stay: u64,
}

/// How a load came to rest after the last send.
#[derive(Clone, Copy, Debug)]
pub struct Ending {
    /// Nothing is on its way any more.
    pub settled: bool,
    /// What still is: sends, gaps, calls, sessions.
    pub open: u64,
    /// Clients with a session, and how many there should be.
    pub live: u64,
    pub expected: u64,
    pub within: Duration,
}

/// What a load left.
#[derive(Default)]
pub struct Outcome {
    pub history: History,
    pub statistics: Statistics,
    /// Every conversation with a user who may read it.
    pub readers: BTreeMap<ConversationId, String>,
}

/// What the tasks of one thread share.
struct Thread {
    connector: Connector,
    endpoints: Arc<Mutex<Endpoints>>,
    opening: Semaphore,
    reconnect: bool,
}

impl Load {
    /// Starts the threads; they connect at once.
    pub fn start(plan: LoadPlan, endpoints: Endpoints) -> anyhow::Result<Self> {
        let flows = Arc::new(plan.flows);
        let switches = Arc::<Switches>::default();
        let progress = Arc::<Progress>::default();
        let origin = Instant::now();
        let endpoints = Arc::new(Mutex::new(endpoints));
        let participants = plan.threads.iter().map(Vec::len).sum::<usize>() as u64;
        let stay = plan.threads.iter().flatten().filter(|plan| !plan.stalls).count() as u64;
        let mut threads = Vec::new();
        for (number, plans) in plan.threads.into_iter().enumerate() {
            let members = Participants::new(plans, Arc::clone(&flows), Arc::clone(&switches), Arc::clone(&progress));
            let endpoints = Arc::clone(&endpoints);
            let (transport, open_loop, reconnect, pin) = (plan.transport, plan.open_loop, plan.reconnect, plan.pin);
            let run = move || {
                if pin {
                    measure::pin_to_core(number % measure::cores());
                }
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                let local = LocalSet::new();
                local.block_on(&runtime, async move {
                    let ca = lock(&endpoints).ca.clone();
                    let connector = Connector::new(transport, ca.as_deref())?;
                    let thread = Thread { connector, endpoints, opening: Semaphore::new(OPENING_MAX), reconnect };
                    run_thread(members, thread, origin, open_loop).await
                })
            };
            let thread = std::thread::Builder::new().name(format!("generator-{number}")).spawn(run)?;
            threads.push(thread);
        }
        Ok(Self { threads, switches, progress, origin, endpoints, participants, stay })
    }

    /// Waits until every participant is connected and synced.
    pub async fn all_live(&self, within: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + within;
        while self.progress.live.load(Ordering::Relaxed) < self.participants {
            if self.threads.iter().any(JoinHandle::is_finished) {
                bail!("a generator thread ended early");
            }
            if Instant::now() > deadline {
                let live = self.progress.live.load(Ordering::Relaxed);
                bail!("only {live} of {} clients got a session within {within:?}", self.participants);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Waits until nothing is on its way any more; whether that was so in time.
    pub async fn settled(&self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        let mut delivered = u64::MAX;
        // Twice the same count with nothing open: also what no flow counts (events) has arrived.
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let now = self.progress.delivered.load(Ordering::Relaxed);
            if self.progress.unsettled.load(Ordering::Relaxed) == 0 && now == delivered {
                return true;
            }
            delivered = now;
            if Instant::now() > deadline {
                return false;
            }
        }
    }

    /// The same, and what is there then.
    pub async fn ending(&self, within: Duration) -> Ending {
        let settled = self.settled(within).await;
        let (live, open) = (total(&self.progress.live), total(&self.progress.unsettled));
        // Without a session a client is not settled: whoever loses it after that moment is nobody's fault.
        let live = if settled { self.stay } else { live };
        Ending { settled, open, live, expected: self.stay, within }
    }

    /// Connections opened from now on go there.
    pub fn move_to(&self, endpoints: Endpoints) {
        *lock(&self.endpoints) = endpoints;
    }

    /// Closes all connections and ends the threads.
    pub fn finish(self) -> anyhow::Result<Outcome> {
        self.switches.sending.store(false, Ordering::Relaxed);
        self.switches.closing.store(true, Ordering::Relaxed);
        let mut whole = Outcome::default();
        for thread in self.threads {
            let part = thread.join().map_err(|_| anyhow::anyhow!("a generator thread panicked"))??;
            whole.history.absorb(part.history);
            whole.statistics.absorb(part.statistics);
            whole.readers.extend(part.readers);
        }
        Ok(whole)
    }
}

fn lock(endpoints: &Mutex<Endpoints>) -> std::sync::MutexGuard<'_, Endpoints> {
    endpoints.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn run_thread(
    members: Participants,
    thread: Thread,
    origin: Instant,
    open_loop: bool,
) -> anyhow::Result<Outcome> {
    let count = members.count();
    let stage = Stage::new(members, count, origin);
    let thread = Rc::new(thread);
    let mut tasks = tokio::task::JoinSet::new();
    for member in 0..count {
        tasks.spawn_local(keep_connected(Rc::clone(&stage), Rc::clone(&thread), member));
    }
    let metronome = open_loop.then(Metronome::start);
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            ended = tasks.join_next() => match ended {
                None => break,
                Some(ended) => ended.context("a connection's task failed")?,
            },
            () = async { match &metronome { Some(metronome) => metronome.beat.notified().await, None => std::future::pending().await } } => stage.tick(),
            _ = ticks.tick() => stage.tick(),
        }
    }
    drop(tasks);
    let stage = Rc::into_inner(stage).context("a connection's task is still there")?;
    let members = stage.crowd.into_inner();
    let readers = members.readers();
    Ok(Outcome { history: members.history, statistics: members.statistics, readers })
}

/// One participant's connection, opened again when it is lost.
async fn keep_connected(stage: Rc<Stage<Participants>>, thread: Rc<Thread>, member: usize) {
    let mut pause = RECONNECT.0;
    // Another server after each end: the one before may be gone.
    let mut server = member;
    while !stage.crowd.borrow().is_closing() {
        let address = {
            let endpoints = lock(&thread.endpoints);
            endpoints.addresses[server % endpoints.addresses.len()].clone()
        };
        let narrow = stage.crowd.borrow().will_stall(member);
        let opened = {
            let Ok(_permit) = thread.opening.acquire().await else { return };
            tokio::time::timeout(CONNECT_WITHIN, thread.connector.connect_reading(&address, narrow)).await
        };
        let cause = match opened {
            Ok(Ok(mut stream)) => {
                stage.crowd.borrow_mut().opened(member, stage.now());
                let ended = stage.drive(member, &mut stream).await;
                pause = RECONNECT.0;
                match ended {
                    Ended::Closed | Ended::EndOfStream => "connection closed by the server".to_owned(),
                    Ended::Broken(error) => format!("connection broken: {}", error.kind()),
                    Ended::BadLength(length) => format!("the server announced a frame of {length} bytes"),
                }
            }
            Ok(Err(error)) => format!("cannot connect: {}", error.root_cause()),
            Err(_) => "cannot connect: timed out".to_owned(),
        };
        stage.crowd.borrow_mut().closed(member, &cause);
        server += 1;
        if !thread.reconnect || stage.crowd.borrow().is_stalled(member) {
            return;
        }
        // A fixed share of the pause by the participant's place, so that not all come at once.
        tokio::time::sleep(pause / 2 + pause * u32::try_from(member % 32).unwrap_or(0) / 64).await;
        pause = (pause * 2).min(RECONNECT.1);
    }
}

/// A thread that beats more often than the runtime's timer can.
struct Metronome {
    beat: Arc<tokio::sync::Notify>,
    running: Arc<std::sync::atomic::AtomicBool>,
}

impl Metronome {
    fn start() -> Self {
        let beat = Arc::new(tokio::sync::Notify::new());
        let running = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let (notify, go_on) = (Arc::clone(&beat), Arc::clone(&running));
        std::thread::spawn(move || {
            while go_on.load(Ordering::Relaxed) {
                std::thread::sleep(TICK_OPEN_LOOP);
                notify.notify_one();
            }
        });
        Self { beat, running }
    }
}

impl Drop for Metronome {
    fn drop(&mut self) {
        self.running.store(false, Ordering::Relaxed);
    }
}

/// A number that grows, for the progress line.
pub fn total(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
