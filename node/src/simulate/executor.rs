//! The scheduler of a simulation: tasks of many processes on one thread, in an order that the seed decides.
//!
//! A turn polls every task that was woken, in shuffled order; what is woken meanwhile belongs to the next turn. So the order never
//! depends on who woke whom first (some wake-ups of tokio come in random order), and each seed is another interleaving. A process can
//! be crashed (its tasks are dropped where they stand) and paused (its tasks are not polled).
//!
//! It runs as the only task of a tokio runtime with paused time: when nothing is ready, time jumps to the next timer.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
};

use im_proto::environment::{Spawn, Task};
use parking_lot::Mutex;
use tokio::{sync::oneshot, task::unconstrained};

use super::chance::{Dice, TraceHash};

/// One run's scheduler. Clones are the same one.
#[derive(Clone)]
pub struct Executor {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
}

struct State {
    tasks: BTreeMap<u64, Slot>,
    last_task: u64,
    ready: BTreeSet<u64>,
    processes: BTreeMap<u64, Process>,
    last_process: u64,
    root: Option<Waker>,
    dice: Dice,
    order: TraceHash,
}

struct Slot {
    process: u64,
    /// Absent while it is polled.
    task: Option<Task>,
    waker: Waker,
}

#[derive(Default)]
struct Process {
    paused: bool,
    /// Woken while paused.
    held: BTreeSet<u64>,
}

/// A place for tasks that ends with its process.
#[derive(Clone)]
pub struct ProcessTasks {
    shared: Arc<Shared>,
    process: u64,
}

struct TaskWaker {
    shared: Arc<Shared>,
    task: u64,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.shared.wake(self.task);
    }
}

impl fmt::Debug for ProcessTasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ProcessTasks").field(&self.process).finish()
    }
}

impl Executor {
    /// Nothing runs yet.
    pub fn new(dice: Dice) -> Self {
        let state = State {
            tasks: BTreeMap::new(),
            last_task: 0,
            ready: BTreeSet::new(),
            processes: BTreeMap::new(),
            last_process: 0,
            root: None,
            dice,
            order: TraceHash::default(),
        };
        Self { shared: Arc::new(Shared { state: Mutex::new(state) }) }
    }

    /// A new process without tasks.
    pub fn process(&self) -> ProcessTasks {
        let mut state = self.shared.state.lock();
        state.last_process += 1;
        let process = state.last_process;
        state.processes.insert(process, Process::default());
        ProcessTasks { shared: self.shared.clone(), process }
    }

    /// Runs everything until `main` is done, then drops all tasks.
    pub async fn run<T: Send + 'static>(&self, main: impl Future<Output = T> + Send + 'static) -> T {
        let (done, mut outcome) = oneshot::channel();
        self.process().spawn(Box::pin(async move {
            let _ = done.send(main.await);
        }));
        let outcome = poll_fn(|cx| {
            self.turn(cx);
            match outcome.try_recv() {
                Ok(outcome) => Poll::Ready(outcome),
                Err(_) => Poll::Pending,
            }
        })
        .await;
        self.end();
        outcome
    }

    /// A hash of the order in which tasks were polled.
    pub fn order(&self) -> u64 {
        self.shared.state.lock().order.value()
    }

    fn turn(&self, cx: &mut Context<'_>) {
        let batch = {
            let mut state = self.shared.state.lock();
            state.root = Some(cx.waker().clone());
            let ready = std::mem::take(&mut state.ready);
            let mut batch: Vec<u64> = ready.into_iter().collect();
            state.dice.shuffle(&mut batch);
            batch
        };
        for task in &batch {
            self.poll(*task);
        }
        if !batch.is_empty() {
            // The runtime gets its turn between ours: its timers and its yields.
            cx.waker().wake_by_ref();
        }
    }

    fn poll(&self, id: u64) {
        let (mut task, waker) = {
            let mut state = self.shared.state.lock();
            let state = &mut *state;
            let Some(slot) = state.tasks.get_mut(&id) else { return };
            if let Some(process) = state.processes.get_mut(&slot.process)
                && process.paused
            {
                process.held.insert(id);
                return;
            }
            let Some(task) = slot.task.take() else { return };
            state.order.add_number(id);
            (task, slot.waker.clone())
        };
        let polled = task.as_mut().poll(&mut Context::from_waker(&waker));
        let mut state = self.shared.state.lock();
        if polled.is_ready() {
            let slot = state.tasks.remove(&id);
            drop(state);
            drop(slot);
        } else if let Some(slot) = state.tasks.get_mut(&id) {
            slot.task = Some(task);
            return;
        } else {
            drop(state);
        }
        // Outside the lock: what a task holds may wake others when it is dropped.
        drop(task);
    }

    fn end(&self) {
        let (tasks, processes) = {
            let mut state = self.shared.state.lock();
            (std::mem::take(&mut state.tasks), std::mem::take(&mut state.processes))
        };
        drop((tasks, processes));
    }
}

impl Shared {
    fn wake(&self, id: u64) {
        let root = {
            let mut state = self.state.lock();
            let state = &mut *state;
            let Some(slot) = state.tasks.get(&id) else { return };
            match state.processes.get_mut(&slot.process) {
                Some(process) if process.paused => {
                    process.held.insert(id);
                    return;
                }
                _ => state.ready.insert(id),
            };
            state.root.take()
        };
        if let Some(root) = root {
            root.wake();
        }
    }
}

impl ProcessTasks {
    /// Drops all tasks. Nothing can be started here any more.
    pub fn crash(&self) {
        let dropped: Vec<Slot> = {
            let mut state = self.shared.state.lock();
            state.processes.remove(&self.process);
            let ids: Vec<u64> =
                state.tasks.iter().filter(|(_, slot)| slot.process == self.process).map(|(id, _)| *id).collect();
            ids.iter().filter_map(|id| state.tasks.remove(id)).collect()
        };
        drop(dropped);
    }

    /// Stops polling the tasks.
    pub fn pause(&self) {
        if let Some(process) = self.shared.state.lock().processes.get_mut(&self.process) {
            process.paused = true;
        }
    }

    /// Goes on where it was paused.
    pub fn resume(&self) {
        let held = match self.shared.state.lock().processes.get_mut(&self.process) {
            Some(process) => {
                process.paused = false;
                std::mem::take(&mut process.held)
            }
            None => return,
        };
        for task in held {
            self.shared.wake(task);
        }
    }
}

impl Spawn for ProcessTasks {
    fn spawn(&self, task: Task) {
        let id = {
            let mut state = self.shared.state.lock();
            if !state.processes.contains_key(&self.process) {
                // The process is no more; the task is dropped outside the lock.
                drop(state);
                return;
            }
            state.last_task += 1;
            let id = state.last_task;
            let waker = Waker::from(Arc::new(TaskWaker { shared: self.shared.clone(), task: id }));
            let task: Task = Box::pin(unconstrained(task));
            state.tasks.insert(id, Slot { process: self.process, task: Some(task), waker });
            id
        };
        self.shared.wake(id);
    }
}
