//! Turns a path through the model into sentences.

use std::fmt::Write as _;

use crate::model::{Action, Claimant};
use crate::owner::Phase;
use crate::rules::LeaveOut;
use crate::search::Counterexample;
use crate::state::{EPOCHS_IN_A_GENERATION, State, Violation};
use crate::storage::{REPLICAS, Replicas, Rows};

/// One numbered line a step, and a last line that says which invariant is broken and how.
pub fn render(counterexample: &Counterexample) -> String {
    let Counterexample { states, actions, model } = counterexample;
    let mut text = String::new();
    for (number, (action, pair)) in actions.iter().zip(states.windows(2)).enumerate() {
        let _ = writeln!(text, "{:>3}. {}", number + 1, step(&pair[0], *action, &pair[1]));
    }
    if model.rules.lack(LeaveOut::Fence) || model.rules.lack(LeaveOut::CheckOrder) {
        text = text.replace("its fence read is clean, it commits", "it commits");
    }
    if let Some(last) = states.last() {
        let _ = writeln!(text, "  => {}", verdict(last, model.rules.lack(LeaveOut::Timestamp)));
    }
    text
}

fn step(before: &State, action: Action, after: &State) -> String {
    match action {
        Action::Claim(claimant) => claim(before, claimant, after),
        Action::FenceAndCut { owner } => {
            let cut = cut(before, owner, after);
            match before.owners[owner].fences {
                0 => format!("{}: {cut}", router(before, owner)),
                fences => {
                    format!("{}: a quorum holds the fence rows of {}; {cut}", router(before, owner), routers(fences))
                }
            }
        }
        Action::FenceConfirmed { owner } => format!("{}: a quorum holds its fence rows", router(before, owner)),
        Action::Cut { owner } => format!("{}: {}", router(before, owner), cut(before, owner, after)),
        Action::ReadFirst { owner, replica, arriving } => {
            let answer = answer(before, replica, arriving, after);
            format!("{} reads the tail: {answer}", router(before, owner))
        }
        Action::ReadSecond { owner, replica, arriving } => {
            let answer = answer(before, replica, arriving, after);
            format!("{} reads the tail, second half: {answer}; {}", router(before, owner), opening(after, owner))
        }
        Action::RestartOpen { owner } => format!("{} begins its open again", router(before, owner)),
        Action::Commit { owner, arriving_at } => {
            let confirmed = confirmed(before, owner, arriving_at);
            format!("{}: {confirmed}; its fence read is clean, it commits {}", router(before, owner), log(after, owner))
        }
        Action::Append { owner, .. } => append(before, owner, after),
        Action::Release { owner } => format!("{} releases the shard as planned", router(before, owner)),
        Action::Raise { owner } => {
            let epoch = epoch(after.owners[owner].epoch);
            format!("{} gives the write up: it raises its epoch to {epoch} and opens again", router(before, owner))
        }
        Action::Recover if after.fences.generation == before.fences.generation => {
            "the registry is restored empty; nothing raises the generation".to_owned()
        }
        Action::Recover => "the registry is restored empty; `imd cluster recover` raises the generation".to_owned(),
        Action::CheckEarly { owner } => format!("{}: its fence read is clean", router(before, owner)),
        Action::Refuse { owner } => {
            format!("{} is told that its batch was refused, and drops it", router(before, owner))
        }
        Action::Reopen { owner } => {
            format!("{} does not wait for its rewrite and opens again under the same epoch", router(before, owner))
        }
        Action::RepairTop { owner, first, second } => {
            let [first, second] = [name(before, first), name(before, second)];
            format!(
                "{} reads with LIMIT 1 from {first} and {second}; read repair copies the top row",
                router(before, owner)
            )
        }
        _ => single_arrival(before, action, after),
    }
}

/// The steps of the fine grain.
fn single_arrival(before: &State, action: Action, after: &State) -> String {
    match action {
        Action::Deliver { write, replica } => {
            format!("{} arrives at {}", rows(&before.storage.writes[write].rows), name(before, replica))
        }
        Action::DeliverFence { instance, replica } => {
            format!("the fence row of router {instance} arrives at {}", name(before, replica))
        }
        Action::DeliverGeneration { replica } => format!("the new generation arrives at {}", name(before, replica)),
        Action::Confirmed { owner } => {
            format!("{}: a quorum holds {}", router(before, owner), rows(&before.owners[owner].rows))
        }
        Action::CheckFirst { owner, replica } => {
            let fenced = if after.owners[owner].phase == Phase::Stopped { "finds a fence and stops" } else { "clean" };
            format!("{} reads its fence row at {}: {fenced}", router(before, owner), name(before, replica))
        }
        Action::CheckSecond { owner, replica } => {
            let stopped = after.owners[owner].phase == Phase::Stopped;
            let outcome = if stopped {
                "finds a fence and stops".to_owned()
            } else {
                format!("clean, it commits {}", log(after, owner))
            };
            format!("{} reads its fence row at {}: {outcome}", router(before, owner), name(before, replica))
        }
        _ => format!("{action:?}"),
    }
}

fn claim(before: &State, claimant: Claimant, after: &State) -> String {
    let number = after.owners.iter().rposition(|owner| owner.phase != Phase::Unclaimed).unwrap_or(0);
    let owner = &after.owners[number];
    let manner = match claimant {
        Claimant::Again { .. } => "claims the shard again",
        Claimant::Old => "(started before the restore) claims the shard",
        Claimant::New if before.registry.claim != 0 => "claims the shard, the lease before it having run out,",
        Claimant::New => "claims the shard",
    };
    let instance = match claimant {
        Claimant::Again { claim } => before.owners[claim].instance,
        Claimant::New | Claimant::Old => after.instances,
    };
    if owner.phase == Phase::Stopped {
        return format!("router {instance} {manner}; it finds its own fence and stops");
    }
    let fences = if owner.fences == 0 { "nobody".to_owned() } else { routers(owner.fences) };
    format!("router {instance} {manner} under epoch {}; it has {fences} to fence", epoch(owner.epoch))
}

fn cut(before: &State, owner: usize, after: &State) -> String {
    match after.owners[owner].phase {
        Phase::Stopped => "the cut of the list fails, it has lost the shard".to_owned(),
        _ => format!("it cuts the list to itself (the list was {})", list(before)),
    }
}

fn list(state: &State) -> String {
    let listed: Vec<_> = state.registry.predecessors.iter().filter(|listed| **listed != 0).map(u8::to_string).collect();
    if listed.is_empty() { "empty".to_owned() } else { listed.join(", ") }
}

/// The replica's answer, as it stands after what arrived just before.
fn answer(before: &State, replica: usize, arriving: u32, after: &State) -> String {
    let name = name(before, replica);
    let answered = after.names.0.iter().position(|other| *other == name).unwrap_or(replica);
    let answered = rows(&after.storage.replicas[answered]);
    let arrived = (0..before.storage.writes.len()).filter(|write| arriving & 1 << write != 0);
    let arrived: Vec<_> = arrived.map(|write| rows(&before.storage.writes[write].rows)).collect();
    if arrived.is_empty() {
        return format!("{name} answers {answered}");
    }
    format!("{} has just reached {name}, which answers {answered}", arrived.join(" and "))
}

fn opening(after: &State, owner: usize) -> String {
    if matches!(after.violation, Some(Violation::Hole { .. })) {
        return "a seq below the head is missing".to_owned();
    }
    match after.owners[owner].phase {
        Phase::Rewriting => format!("it writes {} again", rows(&after.owners[owner].rows)),
        Phase::Serving if after.owners[owner].head() == 0 => "it is open and empty".to_owned(),
        Phase::Serving => format!("its fence read is clean, it commits {}", log(after, owner)),
        Phase::Reading => format!("it keeps the top row {} and asks for the rest", rows(&after.owners[owner].top)),
        Phase::Checking => "it has nothing to write again".to_owned(),
        _ => "it is superseded and stops".to_owned(),
    }
}

fn append(before: &State, owner: usize, after: &State) -> String {
    let batch = rows(&after.owners[owner].rows);
    if after.owners[owner].phase == Phase::Stopped {
        let mut issued = after.storage.writes.iter().filter(|write| !before.storage.writes.contains(write));
        let batch = issued.next().map_or_else(|| batch, |write| rows(&write.rows));
        return format!("{} appends {batch}, too late to commit it", router(before, owner));
    }
    format!("{} appends {batch}, formed at committed = {}", router(before, owner), before.owners[owner].head())
}

fn confirmed(before: &State, owner: usize, arriving_at: Replicas) -> String {
    let in_flight = before.owners[owner].rows;
    let on = before.storage.holders(&in_flight);
    let names = |set: Replicas| {
        let names: Vec<_> = (0..REPLICAS)
            .filter(|replica| set >> replica & 1 != 0)
            .map(|replica| name(before, replica).to_string())
            .collect();
        names.join(" and ")
    };
    if arriving_at == 0 {
        return format!("a quorum holds {}", rows(&in_flight));
    }
    if before.storage.writes.iter().all(|write| write.rows != in_flight) {
        return format!("{} is on {}", rows(&in_flight), names(arriving_at));
    }
    format!("{} reaches {}, so a quorum holds it", rows(&in_flight), names(arriving_at & !on))
}

fn verdict(last: &State, arrival_decides: bool) -> String {
    match last.violation {
        None => "no violation".to_owned(),
        Some(Violation::Hole { owner }) => {
            format!("HOLE: router {} has a head but not every seq below it", last.owners[usize::from(owner)].instance)
        }
        Some(Violation::TwoSeqs { message }) => format!("TWO SEQS: {} is committed twice", letter(message)),
        Some(Violation::TwoEntries { seq }) => {
            format!("TWO ENTRIES: seq {seq} was committed as {} before", letter(last.committed[usize::from(seq) - 1]))
        }
        Some(Violation::Reused { seq }) => format!("REUSED: two rows of one epoch differ at seq {seq}"),
        Some(Violation::Lost { seq }) => {
            let was = letter(last.committed[usize::from(seq) - 1]);
            let Some(loss) = last.loss(arrival_decides) else { return format!("LOST: seq {seq} was {was}") };
            let index = usize::from(loss.seq) - 1;
            let [first, second] = loss.pair;
            let pair = format!("{} and {}", name(last, first), name(last, second));
            let read = last.storage.replicas[first][index].max(last.storage.replicas[second][index]);
            match loss.after {
                Some(write) => format!(
                    "LOST: seq {seq} is committed as {was}; when {} arrives late at {pair}, they give {} at seq {seq}",
                    rows(&write),
                    letter(write[index].message()),
                ),
                None if read.is_empty() => {
                    format!("LOST: seq {seq} is committed as {was}; {pair} hold nothing at seq {seq}")
                }
                None => format!("LOST: seq {seq} is committed as {was}; {pair} give {}", letter(read.message())),
            }
        }
    }
}

fn log(state: &State, owner: usize) -> String {
    let log = state.owners[owner].log;
    // An owner that has nothing more to do forgets its log; what it committed is on record.
    let log = if log[0] == 0 { state.committed } else { log };
    let entries = log.iter().enumerate().filter(|(_, message)| **message != 0);
    let entries: Vec<_> = entries.map(|(index, message)| format!("{}={}", index + 1, letter(*message))).collect();
    if entries.is_empty() { "nothing".to_owned() } else { entries.join(" ") }
}

fn rows(rows: &Rows) -> String {
    let cells = rows.iter().enumerate().filter(|(_, cell)| !cell.is_empty());
    let cells: Vec<_> = cells
        .map(|(index, cell)| format!("{}={}@{}", index + 1, letter(cell.message()), epoch(cell.epoch())))
        .collect();
    if cells.is_empty() { "nothing".to_owned() } else { format!("[{}]", cells.join(" ")) }
}

fn router(state: &State, owner: usize) -> String {
    format!("router {} ({})", state.owners[owner].instance, epoch(state.owners[owner].epoch))
}

fn routers(instances: u8) -> String {
    let numbers: Vec<_> =
        (1..8).filter(|instance| instances >> instance & 1 != 0).map(|instance| instance.to_string()).collect();
    if numbers.is_empty() { "nobody".to_owned() } else { format!("router {}", numbers.join(" and ")) }
}

fn name(state: &State, replica: usize) -> char {
    state.names.0[replica]
}

fn letter(message: u8) -> char {
    char::from(b'A' + message - 1)
}

/// `e2`, or `g1e2` once the generation was raised.
fn epoch(epoch: u8) -> String {
    let (generation, counter) = ((epoch - 1) / EPOCHS_IN_A_GENERATION, (epoch - 1) % EPOCHS_IN_A_GENERATION + 1);
    if generation == 0 { format!("e{counter}") } else { format!("g{generation}e{counter}") }
}
