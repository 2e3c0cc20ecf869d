//! The whole system in one deterministic process: clients of the SDK, gateways, routers, links, the replicated store and the
//! registry. Only drivers, sockets and clocks are replaced; a seed decides the schedule and what goes wrong.
//!
//! The same seed gives the same run: one thread, paused time, an own scheduler, no ambient clock or randomness. What the clients did
//! and saw goes to the history checker of the load harness.

mod chance;
mod dialer;
mod executor;
mod faults;
mod judge;
mod network;
mod people;
mod plan;
mod report;
#[cfg(test)]
mod scenarios;
mod trace;
mod world;

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use im_proto::environment::Spawn as _;
use im_registry::Role;
use tokio::{
    sync::{oneshot, watch},
    time::{Instant, sleep, timeout},
};

pub use report::command;

use faults::Faults;
use people::People;
use plan::Plan;
use trace::Trace;
use world::World;

/// The longest simulated time that the devices may take for their part.
const LIFE_MAX: Duration = Duration::from_secs(240);
/// After everything is healed: until every send has its outcome, and until every device has seen everything.
const OUTCOMES_MAX: Duration = Duration::from_secs(120);
const SETTLE_MAX: Duration = Duration::from_secs(90);

/// What a run showed.
#[derive(Debug)]
pub struct Report {
    pub seed: u64,
    /// Promises that did not hold; empty: all held.
    pub broken: Vec<String>,
    /// The same for the same seed and program.
    pub trace: u64,
    pub sent: u64,
    pub acknowledged: u64,
    pub shown: u64,
    /// Entries whose sends were refused, and stored by an earlier connection's try.
    pub stored_late: u64,
    /// Simulated.
    pub lasted: Duration,
    /// Faults by their kind.
    pub faults: BTreeMap<&'static str, u64>,
}

/// Runs one seed. `print`: the trace goes to standard output.
pub fn run(seed: u64, print: bool) -> Report {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.map(|runtime| runtime.block_on(simulate(seed, print)))
    }));
    let failed = |why: String| Report {
        seed,
        broken: vec![why],
        trace: 0,
        sent: 0,
        acknowledged: 0,
        shown: 0,
        stored_late: 0,
        lasted: Duration::ZERO,
        faults: BTreeMap::new(),
    };
    match outcome {
        Ok(Ok(report)) => report,
        Ok(Err(error)) => failed(format!("there is no runtime: {error}")),
        Err(_) => failed("a task panicked; the message is above".to_owned()),
    }
}

async fn simulate(seed: u64, print: bool) -> Report {
    let started = Instant::now();
    let trace = Trace::new(print);
    let mut report = Report {
        seed,
        broken: Vec::new(),
        trace: 0,
        sent: 0,
        acknowledged: 0,
        shown: 0,
        stored_late: 0,
        lasted: Duration::ZERO,
        faults: BTreeMap::new(),
    };
    let world = match World::new(Plan::new(seed), trace.clone()) {
        Ok(world) => world,
        Err(error) => {
            report.broken.push(error);
            return report;
        }
    };
    trace.event("plan", || format!("{:?}", world.plan));
    let people = People::new(world.clone());
    let executor = world.executor.clone();
    report.broken = executor.run(whole(world.clone(), people.clone())).await;
    let record = std::mem::take(&mut *people.record.lock());
    (report.sent, report.acknowledged, report.shown) = (record.sent, record.acks, record.shown_entries);
    report.stored_late = record.stored_late;
    report.broken.extend(record.broken);
    let verdict = record.history.judge();
    if !verdict.is_clean() {
        report.broken.extend(verdict.findings.iter().map(ToString::to_string));
    }
    people.devices.lock().clear();
    world.clear();
    report.lasted = started.elapsed();
    report.faults = trace.counts();
    report.trace = trace.hash() ^ executor.order();
    report
}

/// From the first start to the last look.
async fn whole(world: Arc<World>, people: Arc<People>) -> Vec<String> {
    for number in 1..=world.plan.routers {
        world.start(&format!("router-{number}"), Role::Router);
    }
    for number in 1..=world.plan.gateways {
        world.start(&format!("gateway-{number}"), Role::Gateway);
    }
    let mut lives = Vec::new();
    let mut dice = chance::Dice::new(world.plan.seed, "devices");
    for (number, user) in people.users.clone().iter().enumerate() {
        for place in 0..dice.between(1, world.plan.devices_max) {
            let device = match people.clone().add_device(user) {
                Ok(device) => device,
                Err(error) => return vec![error],
            };
            if place == 0 {
                let makes_group = (number as u64) < world.plan.groups;
                lives.push(life(&world, people.clone().organise(device.clone(), makes_group)));
            }
            if place == 0 && number == 0 && world.plan.burst > 0 {
                lives.push(life(&world, people.clone().burst(device.clone(), world.plan.burst)));
            }
            if place == 0 && number == 0 && world.plan.channel {
                lives.push(life(&world, people.clone().broadcast(device.clone())));
            }
            lives.push(life(&world, people.clone().live(device)));
        }
    }
    let (stop, stopped) = watch::channel(false);
    let faults = life(&world, Faults::new(world.clone(), people.clone()).run(stopped));
    let all = async {
        for life in lives {
            let _ = life.await;
        }
    };
    let mut broken = Vec::new();
    // What is still to be sent then is sent after everything is healed.
    tokio::pin!(all);
    let in_time = timeout(LIFE_MAX, &mut all).await.is_ok();
    sleep(world.plan.storm).await;
    stop.send_replace(true);
    let _ = faults.await;
    faults::heal(&world, &people).await;
    if !in_time && timeout(LIFE_MAX, &mut all).await.is_err() {
        broken.push("does not come back: devices still wait to send".to_owned());
    }
    let open = judge::wait_for_outcomes(&people, OUTCOMES_MAX).await;
    if open > 0 {
        broken.push(format!("does not come back: {open} sends have no outcome"));
    }
    broken.extend(judge::shown_unasked(&people, SETTLE_MAX).await);
    broken.extend(judge::settle(&people, SETTLE_MAX).await);
    if !broken.is_empty() {
        describe(&world).await;
    }
    broken
}

/// For whoever looks for the cause: what the routers hold at the end.
async fn describe(world: &World) {
    for name in world.machines(Role::Router) {
        let Some(router) = world.router(&name) else { continue };
        // One that does not answer is what was looked for.
        let lines = timeout(Duration::from_secs(1), router.describe()).await;
        for line in lines.unwrap_or_else(|_| vec!["does not answer".to_owned()]) {
            world.trace.event("holds", || format!("{name}: {line}"));
        }
    }
}

/// Starts a part of the run; the receiver ends with it.
fn life(world: &World, part: impl Future<Output = ()> + Send + 'static) -> oneshot::Receiver<()> {
    let (done, over) = oneshot::channel();
    world.tasks.spawn(Box::pin(async move {
        part.await;
        let _ = done.send(());
    }));
    over
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_run_and_others_give_others() {
        let first = run(3, false);
        assert_eq!(first.broken, Vec::<String>::new());
        let second = run(3, false);
        assert_eq!((first.trace, first.shown, first.lasted), (second.trace, second.shown, second.lasted));
        assert_ne!(run(4, false).trace, first.trace);
    }
}
