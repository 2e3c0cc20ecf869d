use std::collections::BTreeMap;

use im_proto::BootId;
use proptest::prelude::*;

use super::*;

fn gateway(name: &str, zone: &str) -> Instance {
    Instance {
        id: InstanceId::parse(name).unwrap(),
        boot: BootId(1),
        role: Role::Gateway,
        endpoints: Vec::new(),
        zone: zone.to_owned(),
        version: String::new(),
        draining: false,
    }
}

/// So many gateways with an id each that nothing else has.
fn gateways(count: usize) -> Vec<Instance> {
    (0..count).map(|number| gateway(&format!("gateway-{number:x}"), "")).collect()
}

fn user(number: usize) -> UserId {
    UserId::parse(&format!("user{number}")).unwrap()
}

/// Gateways with loads that grow with each assignment.
struct Assigning<'a> {
    candidates: Vec<Candidate<'a>>,
    places: BTreeMap<&'a InstanceId, usize>,
}

impl<'a> Assigning<'a> {
    fn new(gateways: &'a [Instance], capacities: impl Fn(usize) -> u64) -> Self {
        let load = |place| Load { connections: 0, capacity: capacities(place), draining: false };
        let candidate = |(place, instance)| Candidate { instance, load: Some(load(place)) };
        Self {
            candidates: gateways.iter().enumerate().map(candidate).collect(),
            places: gateways.iter().enumerate().map(|(place, instance)| (&instance.id, place)).collect(),
        }
    }

    fn assign(&mut self, user: &UserId, zone: &str) -> Option<&'a InstanceId> {
        let asker = Asker { who: Who::User(user), zone, current: None };
        let chosen = &place(&asker, &self.candidates).first()?.id;
        self.candidates[self.places[chosen]].load.as_mut().unwrap().connections += 1;
        Some(chosen)
    }

    fn loads(&self) -> Vec<Load> {
        self.candidates.iter().filter_map(|candidate| candidate.load).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whoever comes one after the other, from whatever zones, leaves no gateway above 1.10 times its share; with equal capacities that
    /// is the mean.
    #[test]
    fn nobody_gets_more_than_the_bound(
        users in 0..2_000_usize,
        zones in prop::collection::vec(0..3_u8, 1..10),
        callers in prop::collection::vec(0..3_u8, 1..5),
        capacities in prop::option::of(prop::collection::vec(1_000..20_000_u64, 10)),
    ) {
        let gateways: Vec<Instance> =
            zones.iter().enumerate().map(|(number, zone)| gateway(&format!("g{number}"), &format!("z{zone}"))).collect();
        let mut assigning = Assigning::new(&gateways, |place| capacities.as_ref().map_or(50_000, |all| all[place]));
        for number in 0..users {
            let zone = format!("z{}", callers[number % callers.len()]);
            prop_assert!(assigning.assign(&user(number), &zone).is_some() || capacities.is_some());
        }
        let loads = assigning.loads();
        let shares = Shares::of(loads.iter().copied());
        for load in &loads {
            let (share, bound) = (shares.share(load.capacity), shares.bound(load.capacity));
            prop_assert!(load.connections <= bound, "{load:?} of {loads:?}");
            prop_assert!(share < 10 || bound as f64 <= 1.1 * share as f64);
        }
    }

    /// A gateway that joins changes the answers of at most 1/N + 2 % of the users, and nearly all that change name the new one.
    #[test]
    fn a_join_changes_few_answers(count in 2..10_usize, first in 0..1_000_000_usize) {
        let all = gateways(count + 1);
        let users = 800 * count;
        let (mut before, mut after) = (Assigning::new(&all[..count], |_| 50_000), Assigning::new(&all, |_| 50_000));
        let mut changed = 0;
        for number in first..first + users {
            changed += usize::from(before.assign(&user(number), "") != after.assign(&user(number), ""));
        }
        let limit = 1.0 / count as f64 + 0.02;
        prop_assert!(changed as f64 <= limit * users as f64, "{changed} of {users} with {count} gateways");
    }

    /// One that drains, says that it drains, or is full is never named, whatever the rest looks like.
    #[test]
    fn draining_and_full_gateways_get_nobody(
        states in prop::collection::vec((0..5_u8, 0..100_u64), 1..12),
        number in any::<usize>(),
        lot in any::<u64>(),
    ) {
        let mut all = gateways(states.len());
        for (instance, (state, _)) in all.iter_mut().zip(&states) {
            instance.draining = *state == 0;
        }
        let load = |(state, connections): (u8, u64)| match state {
            1 => Some(Load { connections, capacity: 100, draining: true }),
            2 => Some(Load { connections: 100, capacity: 100, draining: false }),
            3 => None,
            _ => Some(Load { connections, capacity: 100, draining: false }),
        };
        let candidates: Vec<_> =
            all.iter().zip(&states).map(|(instance, state)| Candidate { instance, load: load(*state) }).collect();
        let user = user(number);
        for who in [Who::User(&user), Who::Anybody(lot)] {
            let chosen = place(&Asker { who, zone: "", current: Some(&all[0].id) }, &candidates);
            let open = candidates.iter().zip(&states).filter(|(_, (state, _))| *state > 2).count();
            prop_assert_eq!(chosen.len(), open.min(GATEWAYS_OFFERED));
            for instance in chosen {
                let place = all.iter().position(|other| other.id == instance.id).unwrap();
                prop_assert!(states[place].0 > 2, "{:?}", states[place]);
            }
        }
    }

    /// The answer depends on nothing but what is asked: not on the order in which gateways are known either.
    #[test]
    fn the_same_question_has_the_same_answer(
        loads in prop::collection::vec(0..100_u64, 1..12),
        number in any::<usize>(),
        turn in any::<usize>(),
    ) {
        let all = gateways(loads.len());
        let load = |connections| Some(Load { connections, capacity: 100, draining: false });
        let mut candidates: Vec<_> =
            all.iter().zip(&loads).map(|(instance, load_)| Candidate { instance, load: load(*load_) }).collect();
        let user = user(number);
        let asker = Asker { who: Who::User(&user), zone: "", current: None };
        let answer = place(&asker, &candidates);
        let turn = turn % candidates.len();
        candidates.rotate_left(turn);
        prop_assert_eq!(answer, place(&asker, &candidates));
    }

    /// As long as a gateway has room, no change of loads sends its users elsewhere.
    #[test]
    fn the_answer_stays_while_there_is_room(number in any::<usize>(), loads in prop::collection::vec(900..1_000_u64, 2..12)) {
        let all = gateways(loads.len());
        let even: Vec<_> = all
            .iter()
            .map(|instance| Candidate { instance, load: Some(Load { connections: 950, capacity: 50_000, draining: false }) })
            .collect();
        let uneven: Vec<_> = all
            .iter()
            .zip(&loads)
            .map(|(instance, load)| Candidate { instance, load: Some(Load { connections: *load, capacity: 50_000, draining: false }) })
            .collect();
        let user = user(number);
        let asker = Asker { who: Who::User(&user), zone: "", current: None };
        let shares = Shares::of(uneven.iter().filter_map(|candidate| candidate.load)).with(1);
        let first = place(&asker, &even)[0];
        let at = all.iter().position(|instance| instance.id == first.id).unwrap();
        prop_assume!(loads[at] < shares.bound(50_000));
        prop_assert_eq!(first, place(&asker, &uneven)[0]);
    }
}

fn at(instance: &Instance, connections: u64) -> Candidate<'_> {
    Candidate { instance, load: Some(Load { connections, capacity: 1_000, draining: false }) }
}

#[test]
fn the_own_zone_comes_first_until_it_is_crowded() {
    let all = [gateway("near", "a"), gateway("far1", "b"), gateway("far2", "b")];
    let first = |near: u64, zone: &str, number: usize| {
        let candidates = [at(&all[0], near), at(&all[1], 100), at(&all[2], 100)];
        let user = user(number);
        place(&Asker { who: Who::User(&user), zone, current: None }, &candidates)[0].id.to_string()
    };
    for number in 0..50 {
        assert_eq!(first(100, "a", number), "near");
        assert_ne!(first(130, "a", number), "near", "above 1.10 times the mean");
        assert_ne!(first(100, "b", number), "near");
    }
    assert!((0..50).any(|number| first(100, "", number) == "near"), "without zones all are the same");
    assert!((0..50).any(|number| first(100, "", number) != "near"));
}

#[test]
fn who_is_connected_stays_unless_it_is_crowded_there() {
    let all = gateways(4);
    for number in 0..50 {
        let user = user(number);
        for current in &all {
            let asker = Asker { who: Who::User(&user), zone: "", current: Some(&current.id) };
            let even: Vec<_> = all.iter().map(|instance| at(instance, 100)).collect();
            assert_eq!(place(&asker, &even)[0], current);
            let crowded = |instance| at(instance, if instance == current { 200 } else { 100 });
            assert_ne!(place(&asker, &all.iter().map(crowded).collect::<Vec<_>>())[0], current);
        }
    }
}

#[test]
fn anybody_is_spread_and_a_gateway_of_twice_the_capacity_gets_twice_as_many() {
    let all = gateways(3);
    let load = |capacity| Some(Load { connections: 0, capacity, draining: false });
    let candidates: Vec<_> =
        all.iter().zip([1_000, 1_000, 2_000]).map(|(instance, c)| Candidate { instance, load: load(c) }).collect();
    let mut counts: BTreeMap<&InstanceId, u32> = BTreeMap::new();
    for lot in 0..4_000 {
        let asker = Asker { who: Who::Anybody(lot), zone: "", current: None };
        *counts.entry(&place(&asker, &candidates)[0].id).or_default() += 1;
    }
    let counts: Vec<u32> = counts.into_values().collect();
    assert!((850..1150).contains(&counts[0]) && (850..1150).contains(&counts[1]), "{counts:?}");
    assert!((1850..2150).contains(&counts[2]), "{counts:?}");
}

#[test]
fn one_that_has_said_nothing_yet_is_the_last_resort() {
    let all = gateways(2);
    let candidates = [Candidate { instance: &all[0], load: None }, at(&all[1], 999)];
    let who = Who::Anybody(1);
    let chosen = place(&Asker { who, zone: "", current: None }, &candidates);
    assert_eq!(chosen, [&all[1], &all[0]]);
}
