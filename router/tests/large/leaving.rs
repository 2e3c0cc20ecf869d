//! Who leaves a large group, or comes while it becomes large, and what its own log knows of that yet.

use super::*;

/// Nor while the user's own log does not know of it yet.
#[tokio::test(start_paused = true)]
async fn who_has_left_a_large_group_gets_nothing_from_that_entry_on() {
    let mut cluster = Cluster::new(3).await;
    let (id, there) = group_of_the_first(&mut cluster).await;
    send_all(&mut cluster, &there[0], id, "before", 1).await;
    cluster.pushed(id).await;
    let delay = Duration::from_secs(2)..=Duration::from_secs(2);
    cluster.store.set_plan(FaultPlan { delay, ..FaultPlan::none() });
    // Both are committed with one batch; the entry in the leaver's own log takes as long again.
    let (home, session) = cluster.sessions[&user(&there[1])];
    let leave = v1::GroupLeaveRequest { conversation_id: id.to_bytes(), ..Default::default() };
    let request = prost::Message::encode_to_vec(&leave).into();
    let call = v1::Call { request_id: 7, method: Method::GroupLeave.number(), request };
    let call = v1::SessionCall { session_id: session, call: Some(call) };
    cluster.gateways[home].push(vec![v1::gateway_message::Message::Call(call)]).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let seqs = send_all(&mut cluster, &there[0], id, "after", 1).await;
    cluster.store.set_plan(FaultPlan::none());
    let (got, _) = cluster.pushed(id).await;
    assert_got(&cluster, &got, &there[2..], &seqs);
    assert_eq!(got.get(&session), None);
}

/// The owner told the member's router of the member's sync that the group is large, then that the member has left; it comes the other way
/// round.
#[tokio::test(start_paused = true)]
async fn who_has_left_a_large_group_gets_nothing_though_a_sync_from_before_ends_later() {
    let mut cluster = Cluster::new(3).await;
    let (id, there) = group_of_the_first(&mut cluster).await;
    let leaver = there[1..].iter().find(|name| cluster.sessions[&user(name)].0 != 0).unwrap().clone();
    let (home, session) = cluster.sessions[&user(&leaver)];
    cluster.mesh.hold_answers_to(Some(&format!("r{home}")));
    let leave = v1::GroupLeaveRequest { conversation_id: id.to_bytes(), ..Default::default() };
    let sync = call(session, 701, Method::ConversationSync, &v1::SyncRequest::default());
    for call in [sync, call(session, 702, Method::GroupLeave, &leave)] {
        cluster.gateways[home].push(vec![call]).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    cluster.mesh.hold_answers_to(None);
    for request_id in [701, 702] {
        let answered = cluster.gateways[home].expect("an answer", |message| match message {
            Down::CallReply(reply) if reply.request_id == request_id => Some(reply.status.clone()),
            _ => None,
        });
        assert_eq!(answered.await, None);
    }
    cluster.pushed(id).await;
    let seqs = send_all(&mut cluster, &there[0], id, "after", 1).await;
    let (got, _) = cluster.pushed(id).await;
    let stay: Vec<String> = there[1..].iter().filter(|name| **name != leaver).cloned().collect();
    assert_got(&cluster, &got, &stay, &seqs);
    assert_eq!(got.get(&session), None);
}

/// The owner of a large group asks who follows it before the member's session begins, and the member's own log learns of the group
/// only after the session has synced.
#[tokio::test(start_paused = true)]
async fn who_syncs_before_the_list_knows_a_large_group_misses_nothing_of_it() {
    let mut cluster = Cluster::new(2).await;
    let late: Vec<String> = (0..20).map(|n| format!("late{n}")).collect();
    let mut members = late.clone();
    members.extend((0..280).map(|n| format!("away{n}")));
    cluster.come("creator").await;
    let id = cluster.group("creator", "k", &["early".to_owned()]).await;
    // No log can begin a burst: the group's is in one, the members' are not, so that the effects on them wait.
    cluster.store.set_plan(FaultPlan { refused_table: Some(Table::Busy), ..FaultPlan::none() });
    let invite =
        v1::GroupInviteRequest { conversation_id: id.to_bytes(), members, ..v1::GroupInviteRequest::default() };
    cluster.call::<v1::GroupInviteReply>("creator", Method::GroupInvite, &invite).await.unwrap();
    for name in &late {
        cluster.come(name).await;
        let list = cluster.sync(name).await;
        assert!(list.conversations.iter().all(|row| row.conversation_id != id.to_bytes()), "{name} came too late");
    }
    cluster.pushed(id).await;
    let unheard = send_all(&mut cluster, "creator", id, "unheard", 3).await;
    cluster.store.set_plan(FaultPlan::none());
    tokio::time::sleep(Duration::from_secs(30)).await;
    let resynced = resynced(&mut cluster).await;
    let (got, _) = cluster.pushed(id).await;
    for name in &late {
        let session = cluster.session(name);
        let has_all = got.get(&session).is_some_and(|seqs| unheard.iter().all(|seq| seqs.contains(seq)));
        assert!(has_all || resynced.contains(&session), "{name} is not told");
    }
    let heard = send_all(&mut cluster, "creator", id, "heard", 3).await;
    let (got, _) = cluster.pushed(id).await;
    assert_got(&cluster, &got, &late, &heard);
}
