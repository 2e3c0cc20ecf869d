//! Keeping gateways balanced: who is above its bound gets no newcomers and sheds, a little each second, what it has too much.
//!
//! Every router sees the load of every gateway each second and computes the same plan from it ([`Balance::step`], a pure step). So that
//! several routers do not do the same thing several times over, each does a part that no other does: the bound of a gateway is told by
//! the one router that rendezvous hashing gives it, and sessions are moved only by the owner of their user, each owner's part being
//! as large as its part of the gateway's sessions ([`crate::worker`]).
//!
//! The arithmetic. A gateway's *share* is its part of all connections, by capacity. It is over its **threshold** with more than the
//! greater of 1.10 × share and share + 1 % of its capacity: below a tenth of its capacity nobody is bothered for a difference
//! that does not matter. Loads are up to two seconds old (one of the report, one of the step), and a wave of connects that comes evenly
//! looks uneven for that long; so it is told the threshold as its bound after two steps over it, and sheds after three. It sheds until
//! it is half way between share and threshold (1.05 × share) and is left alone until it is over the threshold again: then it must
//! have grown by 5 %, which is what keeps it from flapping. Sessions go only to gateways below their share, and to each of these not
//! faster than 1 % of its capacity a second, at least 8: with 100,000 that is 1,000 connects a second, a few percent of what a core
//! can greet, and one that joins nine others of 50,000 connections has its 45,000 after 45 s. Since all that is above the shares is as
//! much as all that is below, and who was told to go but has not gone yet is counted against what is still to go, nobody is sent
//! back.
//!
//! One that joins ten others or more puts none of them over its threshold. So a gateway that has less than half of its share for three
//! steps, and misses more than 1 % of its capacity, is *filled*: until it has 0.9 of its share, all others shed down to theirs. If it
//! does not get a twentieth of what it misses in 30 steps, clients cannot reach it, whatever it says of itself: it is left out of
//! everything for ten minutes, then tried again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use im_proto::{
    InstanceId,
    v1::{self, router_message::Message as ToGateway},
};
use im_registry::{Instance, Role, View};
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    cluster::Cluster,
    placement::{Load, Shares},
    worker::input::Input,
};

/// Between two steps: as often as gateways report.
const STEP: Duration = Duration::from_secs(1);
/// Steps over the threshold until newcomers are sent elsewhere.
const STEPS_TO_BOUND: u32 = 2;
/// Steps over the threshold until sessions are moved.
const STEPS_TO_SHED: u32 = 3;
/// Steps in which a gateway that is filled must get something: three times what a session that is told to go may take to arrive and
/// be counted, and ten more.
const STEPS_TO_FILL: u32 = 30;
/// The part of what it misses that it must get in these.
const FILLED_PART: u64 = 20;
/// Steps for which a gateway that nobody reached is left out.
const STEPS_LEFT_OUT: u32 = 600;
/// Sessions that may be sent to a gateway in one step, however small it is.
const MOVES_MIN: u64 = 8;

/// What a step decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The most connections with which a gateway takes newcomers; 0: no bound.
    pub bounds: BTreeMap<InstanceId, u64>,
    pub sheds: BTreeMap<InstanceId, Shed>,
    /// Gateways below their share.
    pub room: BTreeSet<InstanceId>,
}

/// What a gateway has too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shed {
    pub connections: u64,
    /// Connections until it is left alone, those included that were told to go.
    pub excess: u64,
    /// Of these, the most to be told in this step.
    pub now: u64,
}

/// What is remembered between steps.
#[derive(Debug, Default)]
pub struct Balance {
    /// Steps over the threshold in a row.
    over: BTreeMap<InstanceId, u32>,
    shedding: BTreeSet<InstanceId>,
    bounded: BTreeSet<InstanceId>,
    /// Steps far below the share in a row.
    starving: BTreeMap<InstanceId, u32>,
    filling: BTreeMap<InstanceId, Filling>,
    /// Gateways that nobody reached, with the steps until they are tried again.
    left_out: BTreeMap<InstanceId, u32>,
}

/// A gateway that gets sessions of all others.
#[derive(Debug)]
struct Filling {
    steps: u32,
    /// Connections when these steps began.
    from: u64,
}

/// With more than this it is over.
fn threshold(shares: &Shares, capacity: u64) -> u64 {
    shares.bound(capacity).max(shares.share(capacity) + slack(capacity))
}

/// One percent.
fn slack(capacity: u64) -> u64 {
    (capacity / 100).max(1)
}

impl Balance {
    /// The next step. Gateways that drain take no part: their sessions go anyway.
    pub fn step(&mut self, loads: &BTreeMap<InstanceId, Load>) -> Plan {
        self.left_out.retain(|_, steps| {
            *steps -= 1;
            *steps > 0
        });
        let takes_part =
            |(gateway, load): &(&InstanceId, &Load)| !load.draining && !self.left_out.contains_key(*gateway);
        let loads: BTreeMap<&InstanceId, Load> =
            loads.iter().filter(takes_part).map(|(gateway, load)| (gateway, *load)).collect();
        self.over.retain(|gateway, _| loads.contains_key(gateway));
        self.shedding.retain(|gateway| loads.contains_key(gateway));
        self.bounded.retain(|gateway| loads.contains_key(gateway));
        self.starving.retain(|gateway, _| loads.contains_key(gateway));
        self.filling.retain(|gateway, _| loads.contains_key(gateway));
        let shares = Shares::of(loads.values().copied());
        let mut plan = Plan::default();
        for (gateway, load) in &loads {
            self.look_for_room(gateway, load, shares.share(load.capacity));
        }
        let mut budget = 0;
        for (gateway, load) in &loads {
            let (gateway, threshold) = ((*gateway).clone(), threshold(&shares, load.capacity));
            let share = shares.share(load.capacity);
            if load.connections < share {
                budget += (share - load.connections).min(slack(load.capacity).max(MOVES_MIN));
                plan.room.insert(gateway.clone());
            }
            self.judge(&gateway, load, share, threshold, &mut plan);
        }
        let total: u64 = plan.sheds.values().map(|shed| shed.excess).sum();
        for shed in plan.sheds.values_mut() {
            let part = u128::from(budget) * u128::from(shed.excess) / u128::from(total.max(1));
            shed.now = u64::try_from(part).unwrap_or(u64::MAX).clamp(1, shed.excess);
        }
        if plan.room.is_empty() {
            plan.sheds.clear();
        }
        plan
    }

    fn look_for_room(&mut self, gateway: &InstanceId, load: &Load, share: u64) {
        let misses = share.saturating_sub(load.connections);
        if load.connections < share / 2 && misses > slack(load.capacity) {
            let steps = self.starving.entry(gateway.clone()).or_insert(0);
            *steps = steps.saturating_add(1);
            if *steps >= STEPS_TO_SHED {
                let from = load.connections;
                self.filling.entry(gateway.clone()).or_insert(Filling { steps: 0, from });
            }
        } else {
            self.starving.remove(gateway);
        }
        if misses <= share / 10 {
            self.filling.remove(gateway);
        }
        if let Some(filling) = self.filling.get_mut(gateway) {
            filling.steps += 1;
            if filling.steps > STEPS_TO_FILL {
                let wanted = (share.saturating_sub(filling.from) / FILLED_PART).max(1);
                let is_reached = load.connections >= filling.from.saturating_add(wanted);
                *filling = Filling { steps: 0, from: load.connections };
                if !is_reached {
                    self.filling.remove(gateway);
                    self.starving.remove(gateway);
                    self.left_out.insert(gateway.clone(), STEPS_LEFT_OUT);
                }
            }
        }
    }

    fn judge(&mut self, gateway: &InstanceId, load: &Load, share: u64, threshold: u64, plan: &mut Plan) {
        let target = share + threshold.saturating_sub(share) / 2;
        if load.connections > threshold {
            let steps = self.over.entry(gateway.clone()).or_insert(0);
            *steps = steps.saturating_add(1);
            if *steps >= STEPS_TO_SHED {
                self.shedding.insert(gateway.clone());
            }
            if *steps >= STEPS_TO_BOUND {
                self.bounded.insert(gateway.clone());
            }
        } else {
            self.over.remove(gateway);
        }
        if load.connections <= target {
            self.shedding.remove(gateway);
            if self.bounded.remove(gateway) {
                plan.bounds.insert(gateway.clone(), 0);
            }
        }
        if self.bounded.contains(gateway) {
            plan.bounds.insert(gateway.clone(), threshold);
        }
        let keeps = if self.filling.is_empty() { target } else { share };
        let excess = load.connections.saturating_sub(keeps);
        if excess > 0 && (self.shedding.contains(gateway) || !self.filling.is_empty()) {
            plan.sheds.insert(gateway.clone(), Shed { connections: load.connections, excess, now: 0 });
        }
    }
}

/// The router that tells a gateway its bound: XXH3-64 of the gateway's id, a zero byte and the router's id, the greatest.
fn director<'a>(gateway: &InstanceId, view: &'a View) -> Option<&'a InstanceId> {
    let weight =
        |router: &InstanceId| xxh3_64(&[gateway.as_str().as_bytes(), &[0], router.as_str().as_bytes()].concat());
    let routers = view.of_role(Role::Router).filter(|router| !router.draining).map(|router| &router.id);
    routers.max_by_key(|router| (weight(router), *router))
}

/// What a step means for the sessions of a worker.
#[derive(Clone, Debug)]
pub struct Moves {
    pub sheds: BTreeMap<InstanceId, Shed>,
    /// Gateways that take clients, with their capacity, and whether they are below their share.
    pub gateways: Vec<(Instance, u64, bool)>,
}

/// Takes a step each second until the router stops or has ended.
pub async fn run(cluster: Arc<Cluster>, mut stop: watch::Receiver<bool>) {
    let mut balance = Balance::default();
    let mut ticks = interval(STEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ended = cluster.ended();
    loop {
        tokio::select! {
            biased;
            _ = ended.wait_for(Option::is_some) => return,
            // Nobody may be left who could stop it: that is no stop.
            Ok(_) = stop.wait_for(|stop| *stop) => return,
            _ = ticks.tick() => {}
        }
        let view = cluster.view();
        let mut loads = cluster.gateway_loads();
        for (gateway, load) in &mut loads {
            load.draining |= view.instances.get(gateway).is_none_or(|instance| instance.draining);
        }
        let plan = balance.step(&loads);
        cluster.metrics.gateways_shedding.set(plan.sheds.len() as f64);
        tell_bounds(&cluster, &view, &plan);
        if !plan.sheds.is_empty() {
            let moves = Arc::new(moves(&view, &loads, plan));
            cluster.to_all_workers(|| {
                let moves = moves.clone();
                Input::Run(Box::new(move |worker| worker.context.shed(&moves)))
            });
        }
    }
}

fn tell_bounds(cluster: &Cluster, view: &View, plan: &Plan) {
    let links = cluster.links.read();
    for (gateway, connections) in &plan.bounds {
        if director(gateway, view) == Some(&cluster.config.instance)
            && let Some(link) = links.get(gateway)
        {
            let bound = v1::LoadBound { connections: *connections };
            link.send(vec![v1::RouterMessage { message: Some(ToGateway::Bound(bound)) }]);
        }
    }
}

fn moves(view: &View, loads: &BTreeMap<InstanceId, Load>, plan: Plan) -> Moves {
    let open = loads.iter().filter(|(_, load)| !load.draining && load.connections < load.capacity);
    let gateways = open.filter_map(|(gateway, load)| {
        let instance = view.instances.get(gateway)?.clone();
        Some((instance, load.capacity, plan.room.contains(gateway)))
    });
    Moves { gateways: gateways.collect(), sheds: plan.sheds }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(number: usize) -> InstanceId {
        InstanceId::parse(&format!("g{number}")).unwrap()
    }

    /// Gateways whose sessions do as they are told, two seconds later, and are moved by several routers at once.
    struct Gateways {
        loads: BTreeMap<InstanceId, Load>,
        /// Told in each of the last steps, by gateway that they leave.
        leaving: Vec<BTreeMap<InstanceId, u64>>,
        balance: Balance,
        moved: u64,
    }

    impl Gateways {
        fn new(loads: &[u64], capacity: u64) -> Self {
            let load = |connections: &u64| Load { connections: *connections, capacity, draining: false };
            let loads = loads.iter().enumerate().map(|(number, connections)| (name(number), load(connections)));
            Self { loads: loads.collect(), leaving: Vec::new(), balance: Balance::default(), moved: 0 }
        }

        fn second(&mut self) -> Plan {
            let plan = self.balance.step(&self.loads);
            let mut told = BTreeMap::new();
            for (gateway, shed) in &plan.sheds {
                let on_their_way: u64 = self.leaving.iter().filter_map(|told| told.get(gateway)).sum();
                told.insert(gateway.clone(), shed.now.min(shed.excess.saturating_sub(on_their_way)));
            }
            self.leaving.push(told);
            if self.leaving.len() > 2 {
                for (gateway, count) in self.leaving.remove(0) {
                    self.loads.get_mut(&gateway).unwrap().connections -= count;
                    self.moved += count;
                    for _ in 0..count {
                        self.loads.values_mut().min_by_key(|load| load.connections).unwrap().connections += 1;
                    }
                }
            }
            plan
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever the loads are, after a while nobody is over its threshold, nothing is moved any more, and no more was moved than was
        /// above the shares.
        #[test]
        fn any_loads_become_balanced_once_and_for_all(loads in prop::collection::vec(0..5_000_u64, 1..8), capacity in 5_000..200_000_u64) {
            let mut gateways = Gateways::new(&loads, capacity);
            let shares = Shares::of(gateways.loads.values().copied());
            let above: u64 = loads.iter().map(|load| load.saturating_sub(shares.share(capacity))).sum();
            for _ in 0..1_500 {
                gateways.second();
            }
            prop_assert!(gateways.moved <= above, "{} moved, {above} are above", gateways.moved);
            let moved = gateways.moved;
            for load in gateways.loads.values() {
                prop_assert!(load.connections <= threshold(&shares, capacity), "{:?}", gateways.loads);
            }
            for _ in 0..20 {
                prop_assert_eq!(gateways.second().sheds, BTreeMap::new());
            }
            prop_assert_eq!(gateways.moved, moved);
        }

        /// To a gateway that joins nobody is sent faster than 1 % of its capacity a second.
        #[test]
        fn a_newcomer_gets_its_share_and_no_storm(count in 1..10_usize, load in 20_000..80_000_u64) {
            let mut loads = vec![load; count];
            loads.push(0);
            let mut gateways = Gateways::new(&loads, 100_000);
            let mut before = 0;
            for _ in 0..300 {
                gateways.second();
                let now = gateways.loads[&name(count)].connections;
                prop_assert!(now - before <= 1_000, "{} in a second", now - before);
                before = now;
            }
            let share = load * count as u64 / (count as u64 + 1);
            prop_assert!(before * 10 >= share * 9 - 10, "{before} of {share}");
        }
    }

    /// Clients cannot reach one of the gateways and come back to where they were: that must end.
    #[test]
    fn a_gateway_that_nobody_reaches_is_given_up_and_tried_again_later() {
        let mut gateways = Gateways::new(&[10_000, 10_000, 10_000, 0], 100_000);
        let mut told_in = Vec::new();
        for step in 0..2_000_u32 {
            let plan = gateways.balance.step(&gateways.loads);
            if plan.sheds.values().any(|shed| shed.now > 0) {
                told_in.push(step);
            }
        }
        let tried = STEPS_TO_SHED + STEPS_TO_FILL - 1;
        let cycle = STEPS_LEFT_OUT + tried;
        assert!(told_in.contains(&3) && told_in.contains(&(cycle + 3)), "{told_in:?}");
        let is_trying = |step: &u32| step % cycle <= tried;
        assert!(told_in.iter().all(is_trying), "{told_in:?}");
        // Once clients reach it, it gets its share.
        for _ in 0..1_000 {
            gateways.second();
        }
        assert!(gateways.loads[&name(3)].connections >= 6_750, "{:?}", gateways.loads);
    }

    #[test]
    fn a_difference_that_does_not_matter_is_left_alone() {
        let mut gateways = Gateways::new(&[1_000, 0, 0], 100_000);
        for _ in 0..10 {
            assert_eq!(gateways.second().sheds, BTreeMap::new());
        }
        let mut alone = Gateways::new(&[90_000], 100_000);
        for _ in 0..10 {
            assert_eq!(alone.second(), Plan::default());
        }
    }

    #[test]
    fn a_short_wave_bothers_nobody_and_the_bound_is_lifted_in_the_end() {
        let mut balance = Balance::default();
        let loads = |first| {
            let load = |connections| Load { connections, capacity: 1_000, draining: false };
            BTreeMap::from([(name(0), load(first)), (name(1), load(100))])
        };
        assert_eq!(balance.step(&loads(200)).bounds, BTreeMap::new());
        assert_eq!(balance.step(&loads(100)).bounds, BTreeMap::new());
        assert_eq!(balance.step(&loads(200)).bounds, BTreeMap::new());
        assert_eq!(balance.step(&loads(200)).bounds, BTreeMap::from([(name(0), 165)]));
        assert!(balance.step(&loads(200)).sheds[&name(0)].excess == 200 - 157);
        assert_eq!(balance.step(&loads(158)).bounds.len(), 1, "still above the middle");
        assert_eq!(balance.step(&loads(100)), Plan { bounds: BTreeMap::from([(name(0), 0)]), ..Plan::default() });
        assert_eq!(balance.step(&loads(100)), Plan::default(), "said once");
    }

    #[test]
    fn every_gateway_has_one_director() {
        let mut view = View::default();
        for router in ["r1", "r2", "r3"] {
            let id = InstanceId::parse(router).unwrap();
            let instance = Instance {
                id: id.clone(),
                boot: im_proto::BootId(1),
                role: Role::Router,
                endpoints: Vec::new(),
                zone: String::new(),
                version: String::new(),
                draining: router == "r3",
            };
            view.instances.insert(id, instance);
        }
        let directors: BTreeSet<_> = (0..50).filter_map(|number| director(&name(number), &view)).collect();
        assert_eq!(directors.into_iter().map(InstanceId::as_str).collect::<Vec<_>>(), ["r1", "r2"]);
    }
}
