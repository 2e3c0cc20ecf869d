//! What goes wrong in a run, and when. Each fault is a task that undoes itself; at the end everything is undone.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use im_proto::environment::Spawn as _;
use im_registry::{Reach, Role};
use im_storage::SimFaults;
use tokio::{sync::watch, time::sleep};

use super::{chance::Dice, people::People, world::World};

/// Lets things go wrong until it is told to stop, then undoes everything and starts what is down.
pub struct Faults {
    world: Arc<World>,
    people: Arc<People>,
    dice: Dice,
    is_recovering: Arc<AtomicBool>,
}

/// A fault and how often it is chosen among all.
const KINDS: [(&str, u64); 18] = [
    ("crash router", 6),
    ("crash gateway", 4),
    ("pause router", 8),
    ("pause gateway", 3),
    ("cut store", 5),
    ("slow store", 3),
    ("cut registry", 7),
    ("cut gateway-router", 4),
    ("cut routers", 4),
    ("reset links", 6),
    ("slow links", 4),
    ("rough store", 6),
    ("leave and join", 5),
    ("drain gateway", 2),
    ("cut client", 5),
    ("wrong clock", 2),
    ("new device", 2),
    ("lose registry", 1),
];

/// Where bursts begin and end all the time: what is written beside the log gets lost, and then its writer.
const QUIET_KINDS: [(&str, u64); 8] = [
    ("cut state and crash", 10),
    ("crash router", 4),
    ("pause router", 4),
    ("cut store", 3),
    ("rough store", 4),
    ("cut registry", 2),
    ("leave and join", 2),
    ("reset links", 2),
];

impl Faults {
    /// Faults for that run.
    pub fn new(world: Arc<World>, people: Arc<People>) -> Self {
        let dice = Dice::new(world.plan.seed, "faults");
        Self { world, people, dice, is_recovering: Arc::default() }
    }

    /// Until `stop` turns true.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let Some(pause_ms) = self.world.plan.fault_pause_ms else {
            let _ = stop.wait_for(|stop| *stop).await;
            return;
        };
        loop {
            let pause = self.dice.millis(pause_ms / 4, pause_ms);
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return,
                () = sleep(pause) => {}
            }
            let kinds: &[(&'static str, u64)] = if self.world.plan.quiet { &QUIET_KINDS } else { &KINDS };
            let all: u64 = kinds.iter().map(|(_, weight)| weight).sum();
            let mut at = self.dice.between(0, all - 1);
            for (kind, weight) in kinds {
                if at < *weight {
                    self.happen(kind);
                    break;
                }
                at -= *weight;
            }
        }
    }

    fn one(&mut self, role: Role) -> Option<String> {
        let up: Vec<String> = self.world.machines(role).into_iter().filter(|name| self.world.is_up(name)).collect();
        (!up.is_empty()).then(|| self.dice.pick(&up).clone())
    }

    fn happen(&mut self, kind: &'static str) {
        let lasts = self.dice.millis(200, 7_000);
        let done = match kind {
            "crash router" => self.crash(kind, Role::Router, lasts / 2),
            "crash gateway" => self.crash(kind, Role::Gateway, lasts / 2),
            "pause router" => self.pause(kind, Role::Router, lasts),
            "pause gateway" => self.pause(kind, Role::Gateway, lasts),
            "cut store" => self.cut_store(kind, lasts),
            "cut state and crash" => self.cut_state(kind, lasts),
            "slow store" => self.slow_store(kind, lasts),
            "cut registry" => self.cut_registry(kind, lasts),
            "cut gateway-router" => self.cut_way(kind, Role::Gateway, Role::Router, lasts),
            "cut routers" => self.cut_way(kind, Role::Router, Role::Router, lasts),
            "reset links" => self.reset_links(kind),
            "slow links" => self.slow_links(kind, lasts),
            "rough store" => self.rough_store(kind, lasts),
            "leave and join" => self.leave(kind, Role::Router, lasts),
            "drain gateway" => self.leave(kind, Role::Gateway, lasts),
            "cut client" => self.cut_client(kind, lasts),
            "wrong clock" => self.wrong_clock(kind),
            "lose registry" => self.lose_registry(kind),
            _ => self.new_device(),
        };
        if done.is_some() {
            self.world.trace.count(kind);
        }
    }

    fn note(&self, kind: &str, detail: String) {
        self.world.trace.event("fault", || format!("{kind}: {detail}"));
    }

    /// Undoes something later.
    fn later(&self, after: Duration, undo: impl Future<Output = ()> + Send + 'static) {
        self.world.tasks.spawn(Box::pin(async move {
            sleep(after).await;
            undo.await;
        }));
    }

    fn crash(&mut self, kind: &str, role: Role, down: Duration) -> Option<()> {
        let name = self.one(role)?;
        self.note(kind, format!("{name} for {down:?}"));
        self.world.crash(&name);
        let world = self.world.clone();
        self.later(down, async move {
            if !world.is_up(&name) {
                world.start(&name, role);
            }
        });
        Some(())
    }

    /// Stopped processes and sleeping machines. Some find the registry out of reach when they go on.
    fn pause(&mut self, kind: &str, role: Role, lasts: Duration) -> Option<()> {
        let name = self.one(role)?;
        let (hidden, deaf) = (self.dice.percent(50), self.dice.percent(50));
        let deaf_for = self.dice.millis(100, 3_000);
        self.note(kind, format!("{name} for {lasts:?}, clock stands: {hidden}, then deaf: {deaf}"));
        let world = self.world.clone();
        world.pause(&name, true, None);
        if deaf {
            world.set_reach(&name, Reach::Refused);
        }
        self.later(lasts, async move {
            world.pause(&name, false, hidden.then_some(lasts));
            if deaf {
                sleep(deaf_for).await;
                world.set_reach(&name, Reach::Up);
            }
        });
        Some(())
    }

    fn cut_store(&mut self, kind: &str, lasts: Duration) -> Option<()> {
        let name = self.one(Role::Router)?;
        let (requests, answers) = *self.dice.pick(&[(true, true), (true, false), (false, true)]);
        self.note(kind, format!("{name} for {lasts:?}, requests: {requests}, answers: {answers}"));
        let world = self.world.clone();
        world.store.cut(&name, requests, answers);
        self.later(lasts, async move { world.store.cut(&name, false, false) });
        Some(())
    }

    /// What a router writes beside the logs vanishes; then the router is gone, so that it does not write it again.
    fn cut_state(&mut self, kind: &str, lasts: Duration) -> Option<()> {
        let name = self.one(Role::Router)?;
        let down = self.dice.millis(100, 2_000);
        self.note(kind, format!("{name} after {lasts:?} for {down:?}"));
        let world = self.world.clone();
        world.store.cut_state(&name, true);
        self.later(lasts, async move {
            world.crash(&name);
            world.store.cut_state(&name, false);
            sleep(down).await;
            if !world.is_up(&name) {
                world.start(&name, Role::Router);
            }
        });
        Some(())
    }

    fn slow_store(&mut self, kind: &str, lasts: Duration) -> Option<()> {
        let name = self.one(Role::Router)?;
        let by = self.dice.millis(20, 900);
        self.note(kind, format!("{name} for {lasts:?} by {by:?}"));
        let world = self.world.clone();
        world.store.slow(&name, by);
        self.later(lasts, async move { world.store.slow(&name, Duration::ZERO) });
        Some(())
    }

    fn cut_registry(&mut self, kind: &str, lasts: Duration) -> Option<()> {
        let role = if self.dice.percent(75) { Role::Router } else { Role::Gateway };
        let name = self.one(role)?;
        let reach = *self.dice.pick(&[Reach::Refused, Reach::Silent, Reach::AnswersLost]);
        self.note(kind, format!("{name} for {lasts:?}: {reach:?}"));
        let world = self.world.clone();
        world.set_reach(&name, reach);
        self.later(lasts, async move { world.set_reach(&name, Reach::Up) });
        Some(())
    }

    fn way(&mut self, one: Role, other: Role) -> Option<(String, String)> {
        let one = self.one(one)?;
        let others: Vec<String> = self.world.machines(other).into_iter().filter(|name| *name != one).collect();
        (!others.is_empty()).then(|| (one, self.dice.pick(&others).clone()))
    }

    fn cut_way(&mut self, kind: &str, one: Role, other: Role, lasts: Duration) -> Option<()> {
        let (one, other) = self.way(one, other)?;
        self.note(kind, format!("{one} and {other} for {lasts:?}"));
        let world = self.world.clone();
        world.network.cut(&one, &other, true);
        self.later(lasts, async move { world.network.cut(&one, &other, false) });
        Some(())
    }

    fn reset_links(&mut self, kind: &str) -> Option<()> {
        let other = if self.dice.percent(50) { Role::Gateway } else { Role::Router };
        let (one, other) = self.way(Role::Router, other)?;
        self.note(kind, format!("{one} and {other}"));
        self.world.network.reset(&one, &other);
        Some(())
    }

    fn slow_links(&mut self, kind: &str, lasts: Duration) -> Option<()> {
        let other = if self.dice.percent(50) { Role::Gateway } else { Role::Router };
        let (one, other) = self.way(Role::Router, other)?;
        let by = self.dice.between(5, 800);
        self.note(kind, format!("{one} and {other} for {lasts:?} by {by} ms"));
        let world = self.world.clone();
        world.network.slow(&one, &other, by);
        self.later(lasts, async move { world.network.slow(&one, &other, 0) });
        Some(())
    }

    fn rough_store(&mut self, kind: &str, lasts: Duration) -> Option<()> {
        if !self.world.plan.rough_store {
            return None;
        }
        self.note(kind, format!("for {lasts:?}"));
        let world = self.world.clone();
        world.store.set_faults(SimFaults { timeout: Duration::from_millis(700), ..SimFaults::rough() });
        self.later(lasts, async move { world.store.set_faults(SimFaults::none()) });
        Some(())
    }

    /// A planned stop, and a start later; a spare router that was never started joins first.
    fn leave(&mut self, kind: &str, role: Role, away: Duration) -> Option<()> {
        let world = self.world.clone();
        if role == Role::Router && world.plan.spare_router && !world.is_up("router-9") {
            self.note(kind, "router-9 joins".to_owned());
            world.start("router-9", Role::Router);
            return Some(());
        }
        let name = self.one(role)?;
        self.note(kind, format!("{name} leaves for {away:?}"));
        self.later(Duration::ZERO, async move {
            world.leave(&name).await;
            sleep(away).await;
            if !world.is_up(&name) {
                world.start(&name, role);
            }
        });
        Some(())
    }

    fn cut_client(&mut self, kind: &str, lasts: Duration) -> Option<()> {
        let client = self.people.one(&mut self.dice)?;
        let gateway = self.one(Role::Gateway)?;
        let how = self.dice.between(0, 3);
        self.note(kind, format!("{client} and {gateway} for {lasts:?}, {how}"));
        let world = self.world.clone();
        match how {
            0 => world.network.reset(&client, &gateway),
            1 => world.network.cut(&client, &gateway, true),
            2 => world.network.slow(&client, &gateway, 700),
            _ => self.people.pause(&client, true),
        }
        let people = self.people.clone();
        self.later(lasts, async move {
            world.network.cut(&client, &gateway, false);
            world.network.slow(&client, &gateway, 0);
            people.pause(&client, false);
        });
        Some(())
    }

    fn wrong_clock(&mut self, kind: &str) -> Option<()> {
        let role = if self.dice.percent(75) { Role::Router } else { Role::Gateway };
        let name = self.one(role)?;
        // Up to five minutes.
        let skew_ms = (i64::try_from(self.dice.between(0, 40_000)).unwrap_or(0) - 20_000) * 15;
        self.note(kind, format!("{name} by {skew_ms} ms"));
        self.world.skew(&name, skew_ms);
        Some(())
    }

    /// etcd restored from an old snapshot, and `imd cluster recover`. One at a time.
    fn lose_registry(&mut self, kind: &str) -> Option<()> {
        let (percent, after) = (self.dice.between(0, 100), self.dice.millis(0, 4_000));
        if self.is_recovering.swap(true, Ordering::Relaxed) {
            return None;
        }
        self.note(kind, format!("back to {percent} % of its revision, recovered after {after:?}"));
        let (world, is_recovering) = (self.world.clone(), self.is_recovering.clone());
        self.later(Duration::ZERO, async move {
            world.lose_registry(percent, after).await;
            is_recovering.store(false, Ordering::Relaxed);
        });
        Some(())
    }

    /// A user comes with one more device, which has everything to catch up.
    fn new_device(&mut self) -> Option<()> {
        let user = self.people.some_user(&mut self.dice)?;
        if self.people.devices(&user) >= 4 {
            return None;
        }
        self.note("new device", user.clone());
        self.people.clone().add_device(&user).ok().map(drop)
    }
}

/// Undoes everything, and starts what is down.
pub async fn heal(world: &Arc<World>, people: &People) {
    world.trace.event("heal", String::new);
    world.network.heal();
    world.store.heal();
    world.store.set_faults(SimFaults::none());
    people.resume_all();
    for role in [Role::Router, Role::Gateway] {
        for name in world.machines(role) {
            world.pause(&name, false, None);
            world.set_reach(&name, Reach::Up);
            world.skew(&name, 0);
        }
    }
    // Those that are on their way down or up get their time first.
    sleep(Duration::from_secs(10)).await;
    for role in [Role::Router, Role::Gateway] {
        for name in world.machines(role) {
            world.pause(&name, false, None);
            world.set_reach(&name, Reach::Up);
            if !world.is_up(&name) {
                world.start(&name, role);
            }
        }
    }
    world.network.heal();
    world.store.heal();
    world.store.set_faults(SimFaults::none());
    people.resume_all();
}
