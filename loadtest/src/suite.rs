//! Everything, one after the other, as one report.

use std::{fmt::Write as _, io::IsTerminal as _};

use serde_json::Value;

use crate::{
    ceiling::Workload,
    measure::Machine,
    options::{Common, Scenario},
    peer::Peer,
    report::held,
    stream::Transport,
};

/// One step: what it is called and what is run.
pub struct Step {
    pub name: String,
    pub scenario: Scenario,
}

/// How much of everything.
struct Sizes {
    pairs: [usize; 2],
    members: [usize; 2],
    idle: usize,
    many: usize,
    conversations: usize,
    kills: u32,
}

const FULL: Sizes =
    Sizes { pairs: [100, 1000], members: [1000, 10_000], idle: 10_000, many: 100_000, conversations: 300, kills: 10 };
const QUICK: Sizes = Sizes { pairs: [10, 20], members: [50, 100], idle: 200, many: 0, conversations: 20, kills: 2 };
/// Heartbeats of the many: often enough that their CPU can be read.
const MANY_HEARTBEAT_SECONDS: f64 = 10.0;

/// What is run, with everything else as the options say.
pub fn steps(common: &Common, quick: bool) -> Vec<Step> {
    let sizes = if quick { QUICK } else { FULL };
    let mut steps = Vec::new();
    let mut add = |name: &str, scenario: Scenario| steps.push(Step { name: name.to_owned(), scenario });
    let with = |change: &dyn Fn(&mut Common)| {
        let mut changed = common.clone();
        change(&mut changed);
        changed
    };
    for durable in [false, true] {
        let name = if durable { "ceiling --durable" } else { "ceiling" };
        add(name, Scenario::Ceiling { common: common.clone(), durable, workload: None });
    }
    for peer in [Peer::RedisStream, Peer::Nats, Peer::Mosquitto] {
        let scenario = Scenario::Peer { name: peer, common: common.clone(), workload: Workload::Pairs };
        add(&format!("peer {}", peer.name()), scenario);
    }
    for pairs in sizes.pairs {
        let chat = with(&|c| (c.pairs, c.peer) = (Some(pairs), common.peer.or(Some(Peer::RedisStream))));
        add(&format!("chat --pairs {pairs}"), Scenario::Chat(chat));
    }
    for transport in [Transport::Tls, Transport::Quic] {
        let chat = with(&|c| {
            (c.pairs, c.transport, c.peer) = (Some(sizes.pairs[0]), transport, common.peer.or(Some(Peer::RedisStream)));
        });
        add(&format!("chat over {transport:?}"), Scenario::Chat(chat));
    }
    add("curve", Scenario::Curve(with(&|c| c.pairs = Some(sizes.pairs[0]))));
    for members in sizes.members {
        for window in [1, 16] {
            let fanout = with(&|c| (c.members, c.window) = (Some(members), window));
            add(&format!("fanout --members {members} --window {window}"), Scenario::Fanout(fanout));
        }
    }
    for transport in [Transport::Tcp, Transport::Tls, Transport::Quic] {
        let idle = with(&|c| (c.connections, c.transport) = (Some(sizes.idle), transport));
        add(&format!("idle over {transport:?}"), Scenario::Idle(idle));
        add(&format!("connect over {transport:?}"), Scenario::Connect(with(&|c| c.transport = transport)));
    }
    if sizes.many > 0 {
        let idle = with(&|c| (c.connections, c.heartbeat) = (Some(sizes.many), MANY_HEARTBEAT_SECONDS));
        add(&format!("idle --connections {}", sizes.many), Scenario::Idle(idle));
    }
    let stalling = with(&|c| c.members = Some(sizes.members[0]));
    let stalled = sizes.members[0] / 10;
    add("stall", Scenario::Stall { common: stalling, stalled, slow_disk: false });
    add("stall --slow-disk", Scenario::Stall { common: common.clone(), stalled, slow_disk: true });
    let chat = with(&|c| c.pairs = Some(sizes.pairs[0]));
    add("sync", Scenario::Sync { common: chat.clone(), conversations: sizes.conversations });
    add("flood", Scenario::Flood { common: chat, flood_rate: if quick { 200.0 } else { 2000.0 } });
    add("crash", Scenario::Crash { common: with(&|c| c.pairs = None), kills: sizes.kills });
    steps
}

/// A step that could not be run, in the place of its report.
pub fn failed(step: &Step, error: &anyhow::Error) -> Value {
    serde_json::json!({
        "scenario": step.name, "verdict": "it could not run", "could_not_run": true, "reasons": [format!("{error:#}")], "goals": [],
    })
}

/// All of them as one report.
pub fn report(common: &Common, reports: Vec<Value>, code: u8) -> Value {
    let goals: Vec<&Value> = reports.iter().filter_map(|report| report["goals"].as_array()).flatten().collect();
    let met = goals.iter().filter(|goal| goal["met"] == true).count();
    let verdict = match code {
        0 => format!("{}; {met} of {} goals met", held(!common.no_read_back), goals.len()),
        3 => "a promise did not hold, or the generator was the limit: see the reports".to_owned(),
        _ => "not all of it could run: see the reports".to_owned(),
    };
    serde_json::json!({
        "scenario": "suite", "verdict": verdict, "goals": goals, "machine": Machine::describe(&common.store_parent()),
        "version": env!("CARGO_PKG_VERSION"), "parameters": common.parameters(), "reports": reports,
    })
}

/// Says on a terminal which step begins.
pub fn announce(number: usize, count: usize, step: &Step) {
    if std::io::stderr().is_terminal() {
        let mut line = String::new();
        let _ = write!(line, "suite: {number} of {count}, {}", step.name);
        eprintln!("{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[test]
    fn the_suite_has_every_scenario_that_judges_a_goal() {
        let options = crate::Options::parse_from(["loadtest", "chat", "--seconds", "1"]);
        let Scenario::Chat(common) = options.scenario else { panic!("chat is chat") };
        let names: Vec<String> = steps(&common, false).into_iter().map(|step| step.name).collect();
        for wanted in [
            "ceiling",
            "peer redis-stream",
            "chat",
            "curve",
            "fanout",
            "idle",
            "connect",
            "stall",
            "sync",
            "flood",
            "crash",
        ] {
            assert!(names.iter().any(|name| name.starts_with(wanted)), "{wanted}: {names:?}");
        }
    }

    #[test]
    fn the_suite_says_that_nothing_was_read_back() {
        let verdict = |more: &[&str]| {
            let options = crate::Options::parse_from([&["loadtest", "chat"], more].concat());
            let Scenario::Chat(common) = options.scenario else { panic!("chat is chat") };
            report(&common, Vec::new(), 0)["verdict"].as_str().unwrap().to_owned()
        };
        assert_eq!(verdict(&[]), "every promise held; 0 of 0 goals met");
        assert!(verdict(&["--no-read-back"]).contains("no history was read back"));
    }
}
