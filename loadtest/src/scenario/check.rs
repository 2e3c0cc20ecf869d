//! What can be said of the options before anything is started or measured.

use std::path::Path;

use im_proto::limits;

use super::{flood, idle, running};
use crate::{
    ceiling::Workload,
    options::{Common, Scenario},
    peer::Peer,
    server::SpawnOptions,
    usage::usage,
};

/// Whether the options of a scenario make sense together, and what they name is there.
pub fn options(scenario: &Scenario) -> anyhow::Result<()> {
    let Some(common) = scenario.common() else { return Ok(()) };
    takes_server(scenario, !common.server.is_empty())?;
    sizes(scenario, common)?;
    if let Scenario::Scale { tool, .. } = scenario {
        is_file("--tool", tool)?;
    }
    if let Scenario::Flood { .. } = scenario {
        flood::admitted(&common.set)?;
    }
    for (option, path) in [("--imd", &common.imd), ("--config", &common.config), ("--ca", &common.ca)] {
        path.as_deref().map_or(Ok(()), |path| is_file(option, path))?;
    }
    if let Some(data) = common.data.as_deref().filter(|data| data.exists() && !data.is_dir()) {
        return Err(usage(format!("--data {}: that is no directory", data.display())));
    }
    if common.server.is_empty() { Ok(()) } else { running(common).map(drop) }
}

/// Whether the programs that a scenario starts are there. The suite says so of each of its steps.
pub fn programs(scenario: &Scenario) -> anyhow::Result<()> {
    let Some(common) = scenario.common() else { return Ok(()) };
    match scenario {
        Scenario::Ceiling { .. } | Scenario::Scale { .. } => return Ok(()),
        Scenario::Peer { name, .. } => return name.check(),
        Scenario::Suite { .. } => {}
        _ => common.peer.map_or(Ok(()), Peer::check)?,
    }
    if common.server.is_empty() {
        SpawnOptions { binary: common.imd.clone(), ..SpawnOptions::default() }.find_binary()?;
    }
    Ok(())
}

fn takes_server(scenario: &Scenario, given: bool) -> anyhow::Result<()> {
    let line = match scenario {
        Scenario::Soak { .. } if !given => {
            "soak needs a running cluster: name its gateways with --server; `loadtest crash` starts and kills its own server"
        }
        Scenario::Crash { .. } if given => "crash kills the server, so it starts its own: leave out --server",
        Scenario::Flood { .. } if given => "flood starts its own server: leave out --server",
        Scenario::Scale { .. } if given => "scale starts its own cluster with --tool: leave out --server",
        Scenario::Stall { slow_disk: true, .. } if given => {
            "stall --slow-disk measures the memory of its own server: leave out --server"
        }
        Scenario::Peer { workload: Workload::Echo | Workload::Idle, .. } => "--workload of a peer is pairs or fanout",
        _ => return Ok(()),
    };
    Err(usage(line))
}

fn sizes(scenario: &Scenario, common: &Common) -> anyhow::Result<()> {
    let (connections, members) = (common.connections, common.members());
    let of_pairs = matches!(
        scenario,
        Scenario::Chat(_)
            | Scenario::Curve(_)
            | Scenario::Crash { .. }
            | Scenario::Soak { .. }
            | Scenario::Sync { .. }
            | Scenario::Flood { .. }
            | Scenario::Scale { .. }
            | Scenario::Peer { workload: Workload::Pairs, .. }
    );
    if of_pairs && common.pairs.is_none() && connections == Some(1) {
        return Err(usage("--connections 1: two make a pair, so there must be at least 2"));
    }
    let has_group = matches!(scenario, Scenario::Fanout(_) | Scenario::Stall { slow_disk: false, .. });
    if has_group && members >= limits::GROUP_MEMBERS_MAX {
        let most = limits::GROUP_MEMBERS_MAX;
        return Err(usage(format!("--members {members}: a group has at most {most}, the sender is one more")));
    }
    match scenario {
        Scenario::Fanout(_) => {
            if let Some(online) = common.online.filter(|online| *online > members) {
                return Err(usage(format!("--online {online} of --members {members}: no more can be connected")));
            }
        }
        Scenario::Stall { stalled, slow_disk: false, .. } if *stalled >= members => {
            return Err(usage(format!(
                "--stalled {stalled} of --members {members}: somebody has to read, so fewer must stall"
            )));
        }
        Scenario::Idle(_) => {
            let connections = connections.unwrap_or(idle::CONNECTIONS);
            if let Some(processes) = common.processes.filter(|processes| *processes > connections) {
                return Err(usage(format!(
                    "--processes {processes} of --connections {connections}: each has to hold at least one"
                )));
            }
        }
        _ => {}
    }
    Ok(())
}

fn is_file(option: &str, path: &Path) -> anyhow::Result<()> {
    let is_there = path.metadata().is_ok_and(|found| !found.is_dir());
    if is_there { Ok(()) } else { Err(usage(format!("{option} {}: there is no such file", path.display()))) }
}
