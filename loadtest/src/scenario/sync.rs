//! Sync of many conversations after absence, and history pages of 100, while others chat. PF8.

use std::{sync::Arc, sync::atomic::Ordering, time::Duration};

use anyhow::Context as _;
use im_proto::{method::Method, v1};
use tokio::time::Instant;

use super::{LIVE_WITHIN, ProgressLine, SETTLE_WITHIN, Target, chat, judge, run_load_while, threads_of};
use crate::{
    control::Control,
    crowd::{Flow, LanePlan, Plan, SendPlan, With},
    load::{Load, LoadPlan, total},
    options::Common,
    report::{Goal, Latencies, Report},
};

/// Users who come back, in turns.
const USERS: usize = 8;
/// Messages in each of their conversations, at least about so many: more than a page of the history.
const MESSAGES: u64 = 130;
/// What the user missed in each conversation.
const MISSED: u64 = 20;
const PAGE: u32 = 100;
/// History pages after each sync.
const PAGES: usize = 4;
/// Between two returns: what is measured is a person who opens the application, not a stampede.
const PAUSE: Duration = Duration::from_millis(20);
/// Share of the closed loop's rate, if the options name neither rate nor share.
const LOAD: f64 = 0.25;

#[derive(Default)]
struct Measured {
    sync: Latencies,
    history: Latencies,
    syncs: u64,
    pages: u64,
    short_pages: u64,
}

/// One run.
pub async fn run(options: &Common, conversations: usize) -> anyhow::Result<Report> {
    let mut target = Target::open(options).await?;
    let users = prepare(&mut target, options, conversations).await?;
    let mut options = options.clone();
    let pairs = options.pair_count(chat::PAIRS);
    if options.rate.is_none() {
        let closed = chat::closed_loop(&mut target, &options, pairs).await?;
        options.rate = Some(closed.delivered_per_s * options.rate_of.unwrap_or(LOAD));
    }
    target.next_users();
    let load = Load::start(chat::plan(&target, &options, pairs)?, target.endpoints.clone())?;
    let coming_back = come_back(&target, &users, conversations, options.time());
    let (mut report, outcome, measured) = run_load_while(load, &target, &options, "sync", coming_back).await?;
    let measured = measured?;
    report.connections = 2 * pairs + 1;
    judge(&target, &options, outcome, &mut report).await;
    let (sync, history) = (measured.sync.percentiles(), measured.history.percentiles());
    report.detail("sync", serde_json::json!({ "conversations": conversations, "count": measured.syncs, "us": sync }));
    report.detail(
        "history",
        serde_json::json!({
            "entries": PAGE, "count": measured.pages, "shorter": measured.short_pages, "us": history,
        }),
    );
    let ms = |micros: u64| micros as f64 / 1000.0;
    let what = format!("Sync of {conversations} conversations after absence, p99, ms");
    report.goals.push(Goal::at_most("PF8", &what, 20.0, ms(sync.p99)));
    report.goals.push(Goal::at_most("PF8", "history page of 100, p99, ms", 5.0, ms(history.p99)));
    target.close(&mut report).await?;
    Ok(report)
}

/// The conversations of the users who will come back, each with some messages: one peer for each, who writes to all of them.
async fn prepare(target: &mut Target, options: &Common, conversations: usize) -> anyhow::Result<Vec<String>> {
    let users: Vec<String> = (0..USERS).map(|index| format!("{}-back", target.user(index))).collect();
    let mut peers = Vec::with_capacity(conversations);
    for peer in 0..conversations {
        let name = target.user(peer);
        let lanes = users.iter().enumerate().map(|(user, name)| {
            let flow = u32::try_from(peer * USERS + user).unwrap_or(u32::MAX);
            let sends = SendPlan { flow, window: 16, body_bytes: options.body, every: None };
            LanePlan { with: With::Peer(name.clone()), sends: Some(sends) }
        });
        peers.push(vec![Plan {
            token: target.token(&name)?,
            lanes: lanes.collect(),
            user: name,
            stalls: false,
            reads_every: None,
        }]);
    }
    let plan = LoadPlan {
        transport: target.transport,
        threads: threads_of(peers, options.threads()),
        // The receivers are away: an ack completes a message.
        flows: (0..conversations * USERS).map(|_| Flow::new(0)).collect(),
        open_loop: false,
        reconnect: true,
        pin: options.pin,
    };
    let load = Load::start(plan, target.endpoints.clone())?;
    let line = ProgressLine::start("prepare", Arc::clone(&load.progress));
    load.all_live(LIVE_WITHIN).await?;
    load.switches.sending.store(true, Ordering::Relaxed);
    let wanted = (conversations * USERS) as u64 * MESSAGES;
    let deadline = Instant::now() + LIVE_WITHIN;
    while total(&load.progress.acknowledged) < wanted {
        anyhow::ensure!(Instant::now() < deadline, "{wanted} messages take longer than {LIVE_WITHIN:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    load.switches.sending.store(false, Ordering::Relaxed);
    load.settled(SETTLE_WITHIN).await;
    drop(line);
    load.finish()?;
    Ok(users)
}

/// The users come back one after the other, until the time is over.
async fn come_back(
    target: &Target,
    users: &[String],
    conversations: usize,
    time: Duration,
) -> anyhow::Result<Measured> {
    let mut positions: Vec<Option<Vec<v1::SyncHave>>> = vec![None; users.len()];
    let mut measured = Measured::default();
    let end = Instant::now() + time;
    let mut turn = 0;
    while Instant::now() < end {
        let index = turn % users.len();
        let mut control = target.control(&users[index], "back").await?;
        let have = positions[index].clone();
        let begun = Instant::now();
        let rows = sync(&mut control, have.clone().unwrap_or_default()).await?;
        let took = micros(begun);
        anyhow::ensure!(rows.len() >= conversations, "sync gave {} of {conversations} conversations", rows.len());
        if have.is_some() {
            measured.sync.record(took);
            measured.syncs += 1;
            for page in 0..PAGES {
                // Another conversation each time, so that no cache is warm from the one before.
                let row = &rows[(turn * PAGES + page) * 7 % rows.len()];
                let begun = Instant::now();
                let entries = history(&mut control, row).await?;
                measured.history.record(micros(begun));
                measured.pages += 1;
                measured.short_pages += u64::from(entries < PAGE as usize && row.head > u64::from(PAGE));
            }
        } else {
            let known = rows.iter().map(|row| v1::SyncHave {
                conversation_id: row.conversation_id.clone(),
                seq: row.head.saturating_sub(MISSED),
                read_seq: 0,
            });
            positions[index] = Some(known.collect());
        }
        turn += 1;
        drop(control);
        tokio::time::sleep(PAUSE).await;
    }
    Ok(measured)
}

async fn sync(control: &mut Control, have: Vec<v1::SyncHave>) -> anyhow::Result<Vec<v1::ConversationRow>> {
    let mut request = v1::SyncRequest { version: 0, have, page: bytes::Bytes::new(), limit: 0, details: false };
    let mut rows = Vec::new();
    loop {
        let reply: v1::SyncReply = control.call(Method::ConversationSync, &request).await.context("sync")?;
        rows.extend(reply.conversations);
        if reply.next.is_empty() {
            return Ok(rows);
        }
        request.page = reply.next;
    }
}

/// The newest page; how many entries it has.
async fn history(control: &mut Control, row: &v1::ConversationRow) -> anyhow::Result<usize> {
    let target = v1::target::Target::ConversationId(row.conversation_id.clone());
    let request = v1::HistoryRequest {
        target: Some(v1::Target { target: Some(target) }),
        from: 0,
        to: 0,
        limit: PAGE,
        newest: true,
    };
    let reply: v1::HistoryReply =
        control.call(Method::MessageHistory, &request).await.context("read a history page")?;
    Ok(reply.entries.len())
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
