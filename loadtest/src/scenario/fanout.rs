//! One sends to a group whose members are all online. PF3.
//!
//! With `--window 1` every message goes out alone; with more, several messages share a write of each connection.

use anyhow::Context as _;
use im_proto::{ConversationId, limits, method::Method, v1};

use super::{Target, ceilings, chat::schedule, judge, peer, ratios, run_load};
use crate::{
    ceiling::Workload,
    crowd::{Flow, LanePlan, Plan, SendPlan, With},
    load::{Load, LoadPlan},
    options::Common,
    report::{Goal, Report},
};

/// What the goal asks for.
const SHARE_OF_CEILING: f64 = 0.75;

/// One run.
pub async fn run(options: &Common) -> anyhow::Result<Report> {
    let members = options.members();
    let online = options.online.unwrap_or(members).clamp(1, members);
    let ceilings = ceilings(options, Workload::Fanout, online).await?;
    let peer = match options.peer {
        Some(name) => Some(peer::measure(options, name, Workload::Fanout, online, options.peer_time()).await?),
        None => None,
    };
    let mut target = Target::open(options).await?;
    let mut report = once(&mut target, options, online).await?;
    ratios(&mut report, &ceilings, peer.as_ref());
    if let (None, Some(ceiling)) = (options.rate, ceilings.first()) {
        let what =
            format!("deliveries to {online} members online, window {}, against the bare fan-out", options.window);
        let reached = report.delivered_per_s / ceiling.delivered_per_s.max(1.0);
        report.goals.push(Goal::at_least("PF3", &what, SHARE_OF_CEILING, reached));
    }
    target.close(&mut report).await?;
    Ok(report)
}

/// One load with users of its own, judged. Of the group's members so many are there; the others never were.
pub async fn once(target: &mut Target, options: &Common, online: usize) -> anyhow::Result<Report> {
    target.next_users();
    let users: Vec<String> = (0..=options.members()).map(|index| target.user(index)).collect();
    let group = create_group(target, &users).await?;
    let plan = plan(target, options, &users[..=online.min(users.len() - 1)], group, 0)?;
    let load = Load::start(plan, target.endpoints.clone())?;
    let (mut report, outcome) = run_load(load, target, options, "fanout").await?;
    report.connections = online + 1;
    report.detail("members_away", users.len() - 1 - online);
    judge(target, options, outcome, &mut report).await;
    Ok(report)
}

/// A group of all users, created by the first.
pub async fn create_group(target: &Target, users: &[String]) -> anyhow::Result<ConversationId> {
    let (creator, members) = users.split_first().context("a group needs a creator")?;
    let mut control = target.control(creator, "setup").await?;
    let mut chunks = members.chunks(limits::MEMBERS_PER_CALL_MAX - 1);
    let request = v1::GroupCreateRequest {
        key: b"loadtest"[..].into(),
        name: "loadtest".to_owned(),
        members: chunks.next().unwrap_or_default().to_vec(),
    };
    let created: v1::GroupCreateReply = control.call(Method::GroupCreate, &request).await?;
    for (number, chunk) in chunks.enumerate() {
        let request = v1::GroupInviteRequest {
            conversation_id: created.conversation_id.clone(),
            members: chunk.to_vec(),
            client_message_id: format!("invite-{number}").into(),
        };
        let _: v1::GroupInviteReply = control.call(Method::GroupInvite, &request).await?;
    }
    Ok(ConversationId::from_slice(&created.conversation_id)?)
}

/// The first user sends, all others receive; the last of them stop reading when the sending begins.
pub fn plan(
    target: &Target,
    options: &Common,
    users: &[String],
    group: ConversationId,
    stalled: usize,
) -> anyhow::Result<LoadPlan> {
    let sends =
        SendPlan { flow: 0, window: options.window, body_bytes: options.body, every: schedule(options.rate, 0, 1) };
    let mut threads: Vec<Vec<Plan>> = (0..options.threads()).map(|_| Vec::new()).collect();
    for (index, user) in users.iter().enumerate() {
        let lane = LanePlan { with: With::Conversation(group), sends: (index == 0).then_some(sends) };
        let plan = Plan {
            user: user.clone(),
            token: target.token(user)?,
            lanes: vec![lane],
            stalls: index + stalled >= users.len(),
            reads_every: None,
        };
        threads[index % options.threads()].push(plan);
    }
    Ok(LoadPlan {
        transport: target.transport,
        threads,
        flows: vec![Flow::new(users.len() - 1 - stalled)],
        open_loop: options.rate.is_some(),
        reconnect: true,
        pin: options.pin,
    })
}
