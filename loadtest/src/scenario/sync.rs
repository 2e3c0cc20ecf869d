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

/// Users who come back, in turns: so many, and fewer if each has very many conversations.
const USERS_MAX: usize = 8;
const USERS_MIN: usize = 2;
/// Conversations of all of them together, beyond which there are fewer users.
const CONVERSATIONS: usize = 2_400;
/// Messages in each of their conversations, at least about so many: more than a page of the history, as long as all of them together are
/// not more than 300 conversations of 8 users have.
const MESSAGES_MAX: u64 = 130;
const ALL_MESSAGES: u64 = 312_000;
/// What the user missed in each conversation, and the fewest messages that one has.
const MISSED: u64 = 20;
const MESSAGES_MIN: u64 = MISSED + 4;
const PAGE: u32 = 100;
/// History pages after each sync.
const PAGES: usize = 4;
/// Between two returns: what is measured is a person who opens the application, not a stampede.
const PAUSE: Duration = Duration::from_millis(20);
/// Share of the closed loop's rate, if the options name neither rate nor share.
const LOAD: f64 = 0.25;

/// Who comes back to what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Past {
    users: usize,
    conversations: usize,
    /// In each conversation.
    messages: u64,
}

impl Past {
    /// As much as can be prepared in two minutes, whatever the number of conversations.
    fn of(conversations: usize) -> Self {
        let users = (CONVERSATIONS / conversations.max(1)).clamp(USERS_MIN, USERS_MAX);
        let messages = (ALL_MESSAGES / (conversations * users).max(1) as u64).clamp(MESSAGES_MIN, MESSAGES_MAX);
        Self { users, conversations, messages }
    }

    /// Whether a page of the history is a whole one.
    fn has_pages(self) -> bool {
        self.messages > u64::from(PAGE)
    }
}

#[derive(Default)]
struct Measured {
    /// Until the whole list is there, and until its first page is.
    sync: Latencies,
    first_page: Latencies,
    history: Latencies,
    syncs: u64,
    pages: u64,
    short_pages: u64,
}

/// One run.
pub async fn run(options: &Common, conversations: usize) -> anyhow::Result<Report> {
    let mut target = Target::open(options).await?;
    let past = Past::of(conversations);
    let users = prepare(&mut target, options, past).await?;
    let mut options = options.clone();
    let pairs = options.pair_count(chat::PAIRS);
    if options.rate.is_none() {
        let closed = chat::closed_loop(&mut target, &options, pairs).await?;
        options.rate = Some(closed.delivered_per_s * options.rate_of.unwrap_or(LOAD));
    }
    target.next_users();
    let load = Load::start(chat::plan(&target, &options, pairs)?, target.endpoints.clone())?;
    let coming_back = come_back(&target, &users, past, options.time());
    let (mut report, outcome, measured) = run_load_while(load, &target, &options, "sync", coming_back).await?;
    let measured = measured?;
    report.connections = 2 * pairs + 1;
    judge(&target, &options, outcome, &mut report).await;
    let (sync, first_page) = (measured.sync.percentiles(), measured.first_page.percentiles());
    let history = measured.history.percentiles();
    report.detail(
        "sync",
        serde_json::json!({
            "conversations": conversations, "users": past.users, "messages": past.messages, "count": measured.syncs,
            "us": sync, "first_page_us": first_page,
        }),
    );
    report.detail(
        "history",
        serde_json::json!({
            "entries": PAGE, "count": measured.pages, "shorter": measured.short_pages, "us": history,
        }),
    );
    let ms = |micros: u64| micros as f64 / 1000.0;
    let what = format!("Sync of {conversations} conversations after absence, p99, ms");
    report.goals.push(Goal::at_most("PF8", &what, 20.0, ms(sync.p99)));
    let what = format!("first page of a Sync of {conversations} conversations, p99, ms");
    report.goals.push(Goal::at_most("V4", &what, 20.0, ms(first_page.p99)));
    // Of conversations that are shorter it would be no page.
    if past.has_pages() {
        report.goals.push(Goal::at_most("PF8", "history page of 100, p99, ms", 5.0, ms(history.p99)));
    }
    target.close(&mut report).await?;
    Ok(report)
}

/// The conversations of the users who will come back, each with some messages: one peer for each, who writes to all of them.
async fn prepare(target: &mut Target, options: &Common, past: Past) -> anyhow::Result<Vec<String>> {
    let Past { users: count, conversations, messages } = past;
    let users: Vec<String> = (0..count).map(|index| format!("{}-back", target.user(index))).collect();
    let mut peers = Vec::with_capacity(conversations);
    for peer in 0..conversations {
        let name = target.user(peer);
        let lanes = users.iter().enumerate().map(|(user, name)| {
            let flow = u32::try_from(peer * count + user).unwrap_or(u32::MAX);
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
        flows: (0..conversations * count).map(|_| Flow::new(0)).collect(),
        open_loop: false,
        reconnect: true,
        pin: options.pin,
    };
    let load = Load::start(plan, target.endpoints.clone())?;
    let line = ProgressLine::start("prepare", Arc::clone(&load.progress));
    load.all_live(LIVE_WITHIN).await?;
    load.switches.sending.store(true, Ordering::Relaxed);
    let wanted = (conversations * count) as u64 * messages;
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
async fn come_back(target: &Target, users: &[String], past: Past, time: Duration) -> anyhow::Result<Measured> {
    let conversations = past.conversations;
    let mut positions: Vec<Option<Vec<v1::SyncHave>>> = vec![None; users.len()];
    let mut measured = Measured::default();
    let end = Instant::now() + time;
    let mut turn = 0;
    while Instant::now() < end {
        let index = turn % users.len();
        let mut control = target.control(&users[index], "back").await?;
        let have = positions[index].clone();
        let begun = Instant::now();
        let (rows, first_page) = sync(&mut control, have.clone().unwrap_or_default()).await?;
        let took = micros(begun);
        anyhow::ensure!(rows.len() >= conversations, "sync gave {} of {conversations} conversations", rows.len());
        if have.is_some() {
            measured.sync.record(took);
            measured.first_page.record(first_page);
            measured.syncs += 1;
            for page in 0..if past.has_pages() { PAGES } else { 0 } {
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

/// All pages of the list, and the microseconds until the first was there.
async fn sync(control: &mut Control, have: Vec<v1::SyncHave>) -> anyhow::Result<(Vec<v1::ConversationRow>, u64)> {
    let begun = Instant::now();
    let mut first_page = None;
    let mut request = v1::SyncRequest { version: 0, have, page: bytes::Bytes::new(), limit: 0, details: false };
    let mut rows = Vec::new();
    loop {
        let reply: v1::SyncReply = control.call(Method::ConversationSync, &request).await.context("sync")?;
        let first_page = *first_page.get_or_insert_with(|| micros(begun));
        rows.extend(reply.conversations);
        if reply.next.is_empty() {
            return Ok((rows, first_page));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_prepared_stays_about_as_much_however_many_conversations_a_user_has() {
        assert_eq!(Past::of(300), Past { users: 8, conversations: 300, messages: 130 });
        assert_eq!(Past::of(5_000), Past { users: 2, conversations: 5_000, messages: 31 });
        for conversations in [1, 20, 300, 1_000, 5_000] {
            let past = Past::of(conversations);
            let all = (past.users * conversations) as u64 * past.messages;
            assert!(all <= ALL_MESSAGES && past.messages > MISSED, "{past:?}");
        }
        assert!(Past::of(300).has_pages() && !Past::of(5_000).has_pages());
    }
}
