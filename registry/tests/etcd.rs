//! The etcd backend on a real etcd. `deploy/test.sh` runs these with the address in IM_TEST_ETCD.

use std::{process::Stdio, time::Duration};

use im_proto::{Epoch, ShardId};
use im_registry::{
    CLAIMS_PER_CALL_MAX, Claim, ClaimOutcome, Endpoint, EtcdOptions, Instance, Lease, Registry as _, RegistryError,
    Role, conformance,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    time::{Instant, sleep, timeout},
};

use crate::{
    cluster::{Cluster, claim, eventually},
    proxy::Way,
    support::{Numbers, id, instance, router},
};

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn etcd_conforms() {
    conformance::all(Cluster::new).await;
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn a_member_that_does_not_answer_is_left_for_the_next() {
    let cluster = Cluster::new().await;
    let member = cluster.members[0].clone();
    let registry = cluster.registry_of("a", &[member.clone(), member]).await;
    cluster.proxy("a", 0).set(Way::Silent);
    let started = Instant::now();
    let lease = registry.register(router("a"), conformance::TTL).await.expect("the other member answers");
    assert!(started.elapsed() < Duration::from_secs(5), "one deadline and the answer");
    let started = Instant::now();
    registry.claim(&lease, &[ShardId(1)]).await.expect("claim");
    assert!(started.elapsed() < Duration::from_secs(1), "the silent member is not asked again");
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn a_compaction_while_cut_off_is_answered_by_reading_everything() {
    let cluster = Cluster::new().await;
    let (watching, acting) = (cluster.registry("w").await, cluster.registry("a").await);
    let lease = acting.register(router("a"), conformance::TTL).await.expect("register");
    let mut view = watching.view();
    eventually(&mut view, |view| view.instances.contains_key(&id("a"))).await;
    cluster.set("w", Way::Cut);
    claim(&acting, &lease, ShardId(1)).await;
    let second = claim(&acting, &lease, ShardId(2)).await;
    acting.release(&[second]).await.expect("release");
    cluster.compact().await;
    claim(&acting, &lease, ShardId(3)).await;
    cluster.set("w", Way::Open);
    let all = |view: &im_registry::View| view.claims.keys().copied().eq([ShardId(1), ShardId(3)]);
    eventually(&mut view, all).await;
    // And the watch goes on from there.
    claim(&acting, &lease, ShardId(4)).await;
    eventually(&mut view, |view| view.claims.contains_key(&ShardId(4))).await;
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn a_silent_connection_is_noticed_by_the_watch() {
    let cluster = Cluster::new().await;
    let member = cluster.members[0].clone();
    let watching = cluster.registry_of("w", &[member.clone(), member]).await;
    let acting = cluster.registry("a").await;
    cluster.proxy("w", 0).set(Way::Silent);
    acting.register(router("a"), conformance::TTL).await.expect("register");
    eventually(&mut watching.view(), |view| view.instances.contains_key(&id("a"))).await;
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn a_guard_compares_who_claimed_and_not_only_the_revision() {
    let cluster = Cluster::new().await;
    let registry = cluster.registry("a").await;
    let lease = registry.register(router("a"), conformance::TTL).await.expect("register");
    let claimed = claim(&registry, &lease, ShardId(1)).await;
    // What a restore may lead to: the claim of another stands at a revision that this process takes for its own.
    let mut etcd = cluster.client().await;
    let key = format!("/im/{}/v1/claims/00001", cluster.id);
    let other = r#"{"instance":"b","boot":"0000000000000001","lease":"0000000000000001","generation":1}"#;
    let put = etcd.put(key.clone(), other, None).await.expect("put");
    let at = u64::try_from(put.header().expect("a header").revision()).expect("positive");
    let confused = Claim { epoch: Epoch::new(1, at), ..claimed };
    assert_eq!(registry.cut_predecessors(std::slice::from_ref(&confused)).await, Ok(vec![false]));
    assert_eq!(registry.raise_epoch(&confused).await, Ok(None));
    registry.release(&[confused]).await.expect("release");
    let left = etcd.get(key, None).await.expect("get");
    assert_eq!(left.kvs()[0].value(), other.as_bytes(), "the claim of the other stands");
    assert_eq!(registry.claim(&lease, &[ShardId(1)]).await, Ok(vec![ClaimOutcome::Taken(ShardId(1))]));
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn a_predecessor_list_that_cannot_be_read_is_not_an_empty_one() {
    let cluster = Cluster::new().await;
    let registry = cluster.registry("a").await;
    let lease = registry.register(router("a"), conformance::TTL).await.expect("register");
    let mut etcd = cluster.client().await;
    etcd.put(format!("/im/{}/v1/predecessors/00001", cluster.id), "[\"a b\"]", None).await.expect("put");
    let refused = registry.claim(&lease, &[ShardId(1)]).await;
    assert!(matches!(&refused, Err(RegistryError::Refused(why)) if why.contains("predecessors/00001")), "{refused:?}");
    claim(&registry, &lease, ShardId(2)).await;
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn a_registration_that_somebody_deleted_comes_back() {
    let cluster = Cluster::new().await;
    let options = EtcdOptions { reconcile_interval: Duration::from_millis(500), ..cluster.options(&cluster.members) };
    let registry = cluster.connect(options).await;
    registry.register(router("a"), conformance::TTL).await.expect("register");
    let mut view = registry.view();
    eventually(&mut view, |view| view.instances.contains_key(&id("a"))).await;
    cluster.client().await.delete(format!("/im/{}/v1/instances/router/a", cluster.id), None).await.expect("delete");
    // One of one is more than half: the view of the actor holds it. Another process, started now, sees it gone or back.
    let fresh = cluster.registry("w").await;
    eventually(&mut fresh.view(), |view| view.instances.contains_key(&id("a"))).await;
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn a_view_that_loses_more_than_half_is_held_back() {
    let cluster = Cluster::new().await;
    let options = EtcdOptions { hold: Duration::from_secs(3), ..cluster.options(&cluster.members) };
    let numbers = Numbers::default();
    let watching = {
        // One thread: the handles of this registry alone are made meanwhile.
        let _recording = metrics::set_default_local_recorder(&numbers);
        cluster.connect(options).await
    };
    let alarm = || (numbers.counter("im_registry_views_held_back_total"), numbers.gauge("im_registry_instances_held"));
    let acting = cluster.registry("a").await;
    let mut leases: Vec<Lease> = Vec::new();
    for name in ["a", "b", "c", "d", "e"] {
        leases.push(acting.register(instance(Role::Gateway, name), conformance::TTL).await.expect("register"));
    }
    let mut view = watching.view();
    eventually(&mut view, |view| view.instances.len() == 5).await;
    let gone_at = Instant::now();
    for lease in &leases[1..] {
        acting.revoke(lease).await.expect("revoke");
    }
    eventually(&mut view, |view| view.instances.len() == 3).await;
    assert!(gone_at.elapsed() < Duration::from_secs(2), "half may go at once");
    let held = async {
        while alarm() != (1, 2.0) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(2), held).await.unwrap_or_else(|_| panic!("the alarm is not raised: {:?}", alarm()));
    eventually(&mut view, |view| view.instances.len() == 1).await;
    assert!(gone_at.elapsed() >= Duration::from_secs(3), "the others are held");
    assert_eq!(alarm(), (1, 0.0), "it was one alarm, and it is over");
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn a_claim_needs_the_record_of_its_generation() {
    let cluster = Cluster::unrecovered().await;
    let unknown = cluster.connect(EtcdOptions::new(cluster.members.clone(), &cluster.id, Some(2))).await;
    let lease = unknown.register(router("a"), conformance::TTL).await.expect("a registration claims nothing");
    let refused = unknown.claim(&lease, &[ShardId(1)]).await;
    assert!(matches!(&refused, Err(RegistryError::Refused(why)) if why.contains("imd cluster recover")), "{refused:?}");
    assert!(matches!(unknown.check_claims().await, Err(RegistryError::Refused(_))));
    assert!(matches!(unknown.recover(0).await, Err(RegistryError::Refused(_))));

    let record = unknown.recover(2).await.expect("recover");
    assert_eq!(unknown.recover(2).await, Ok(record.clone()), "a repeat changes nothing");
    assert_eq!(unknown.cluster_record().await, Ok(Some(record)));
    unknown.check_claims().await.expect("the record is there");
    let claimed = claim(&unknown, &lease, ShardId(1)).await;
    assert_eq!(claimed.epoch.generation(), 2);

    let older = cluster.connect(EtcdOptions::new(cluster.members.clone(), &cluster.id, Some(1))).await;
    let refused = older.register(router("old"), conformance::TTL).await;
    assert!(matches!(&refused, Err(RegistryError::Refused(why)) if why.contains("start again")), "{refused:?}");
    assert!(matches!(older.check_claims().await, Err(RegistryError::Refused(_))));
    let never = cluster.connect(EtcdOptions::new(cluster.members.clone(), &cluster.id, None)).await;
    let never_lease = never.register(router("never"), conformance::TTL).await.expect("register");
    assert!(matches!(never.claim(&never_lease, &[ShardId(2)]).await, Err(RegistryError::Refused(_))));

    // Raised under a router that runs: what it holds is gone, it can neither claim nor raise, and is told to end.
    older.recover(3).await.expect("recover");
    assert!(matches!(unknown.raise_epoch(&claimed).await, Err(RegistryError::Refused(_)) | Ok(None)));
    timeout(Duration::from_secs(5), lease.lost().wait_for(|lost| *lost)).await.expect("it ends").expect("it lives");
    assert!(unknown.claim(&lease, &[ShardId(1)]).await.is_err());
    assert_eq!(unknown.cut_predecessors(std::slice::from_ref(&claimed)).await, Ok(vec![false]));
    unknown.release(&[claimed]).await.expect("giving up is always allowed");
    assert!(matches!(older.recover(2).await, Err(RegistryError::Refused(_))), "a generation never falls");
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn all_shards_of_a_cluster_are_claimed_and_left_in_little_time() {
    let cluster = Cluster::new().await;
    let registry = cluster.registry("a").await;
    let lease = registry.register(router("a"), conformance::TTL).await.expect("register");
    let shards: Vec<ShardId> = (0..1024).map(ShardId).collect();
    let started = Instant::now();
    let mut claims = Vec::new();
    for shards in shards.chunks(CLAIMS_PER_CALL_MAX) {
        for outcome in registry.claim(&lease, shards).await.expect("claim") {
            let ClaimOutcome::Claimed(claim) = outcome else { panic!("{outcome:?}") };
            claims.push(claim);
        }
    }
    let claimed = started.elapsed();
    for claims in claims.chunks(CLAIMS_PER_CALL_MAX) {
        assert!(registry.cut_predecessors(claims).await.expect("cut").iter().all(|cut| *cut));
    }
    let cut = started.elapsed() - claimed;
    eventually(&mut registry.view(), |view| view.claims.len() == 1024).await;
    for claims in claims.chunks(CLAIMS_PER_CALL_MAX) {
        registry.release(claims).await.expect("release");
    }
    println!("1024 shards: claimed in {claimed:?}, cut in {cut:?}, all in {:?}", started.elapsed());
    eventually(&mut registry.view(), |view| view.claims.is_empty()).await;
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn members_say_how_they_are() {
    let cluster = Cluster::new().await;
    let endpoints = [cluster.members[0].clone(), "http://127.0.0.1:1".to_owned()];
    let registry = cluster.connect(cluster.options(&endpoints)).await;
    let members = registry.members().await;
    assert_eq!(members.iter().map(|member| &member.endpoint).collect::<Vec<_>>(), endpoints.each_ref());
    let state = members[0].state.as_ref().expect("it answers");
    assert!(state.has_leader && state.revision > 0 && !state.version.is_empty());
    let record = registry.cluster_record().await.expect("an answer").expect("a record");
    assert_eq!(state.etcd_cluster, record.etcd_cluster);
    assert!(members[1].state.is_err());
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn the_example_in_python_lists_the_gateways() {
    let cluster = Cluster::new().await;
    let registry = cluster.registry("a").await;
    let endpoint =
        |transport: &str, port| Endpoint { transport: transport.to_owned(), address: format!("127.0.0.1:{port}") };
    let endpoints = vec![endpoint("tcp", 7100), endpoint("quic", 7101)];
    let gateway = Instance { endpoints, zone: "a".into(), draining: true, ..instance(Role::Gateway, "gateway-1") };
    registry.register(gateway, conformance::TTL).await.expect("register");
    registry.register(router("router-1"), conformance::TTL).await.expect("register");
    let listed = Command::new("python3")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/gateways.py"))
        .args(["--etcd", &cluster.members[0], "--cluster", &cluster.id])
        .output()
        .await
        .expect("python3 is installed");
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    let expected = "gateway-1\tdraining\ta\ttcp=127.0.0.1:7100 quic=127.0.0.1:7101\n";
    assert_eq!(String::from_utf8_lossy(&listed.stdout), expected);
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn the_example_in_python_follows_the_gateways() {
    let cluster = Cluster::new().await;
    let registry = cluster.registry("a").await;
    let gateway = |name: &str, draining| {
        let endpoint = Endpoint { transport: "tcp".to_owned(), address: "127.0.0.1:7100".to_owned() };
        Instance { endpoints: vec![endpoint], draining, ..instance(Role::Gateway, name) }
    };
    registry.register(gateway("gateway-1", false), conformance::TTL).await.expect("register");
    let mut watching = Command::new("python3")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/gateways.py"))
        .args(["--etcd", &cluster.members[0], "--cluster", &cluster.id, "--watch"])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("python3 is installed");
    let mut lines = BufReader::new(watching.stdout.take().expect("it is piped")).lines();
    let mut says = async |expected: &str| {
        let line = timeout(Duration::from_secs(20), lines.next_line()).await.expect("it is told in time");
        assert_eq!(line.expect("readable").expect("it goes on"), expected);
    };
    says("gateway-1\tlive\t-\ttcp=127.0.0.1:7100").await;
    let lease = registry.register(gateway("gateway-2", false), conformance::TTL).await.expect("register");
    says("gateway-2\tlive\t-\ttcp=127.0.0.1:7100").await;
    registry.register(router("router-1"), conformance::TTL).await.expect("register");
    registry.update(&lease, gateway("gateway-2", true)).await.expect("update");
    says("gateway-2\tdraining\t-\ttcp=127.0.0.1:7100").await;
    registry.revoke(&lease).await.expect("revoke");
    says("gateway-2\tgone").await;
    // A lease that nobody renews ends by itself.
    drop(registry);
    says("gateway-1\tgone").await;
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn a_list_that_changed_a_moment_ago_is_not_taken_from_memory() {
    let cluster = Cluster::new().await;
    let registry = cluster.registry("a").await;
    let lease = registry.register(router("a"), conformance::TTL).await.expect("register");
    let mut etcd = cluster.client().await;
    for shard in 0..20 {
        // The watch has no time to tell.
        let key = format!("/im/{}/v1/predecessors/{shard:05}", cluster.id);
        etcd.put(key, r#"["b"]"#, None).await.expect("put");
        assert_eq!(claim(&registry, &lease, ShardId(shard)).await.predecessors, [id("b")]);
    }
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn a_record_that_went_a_moment_ago_is_not_taken_from_memory() {
    let cluster = Cluster::new().await;
    let registry = cluster.registry("a").await;
    let lease = registry.register(router("a"), conformance::TTL).await.expect("register");
    let held = claim(&registry, &lease, ShardId(100)).await;
    let mut etcd = cluster.client().await;
    let key = format!("/im/{}/v1/cluster", cluster.id);
    let record = etcd.get(key.clone(), None).await.expect("get").kvs()[0].value().to_vec();
    for shard in 0..10 {
        // The watch has no time to tell.
        etcd.delete(key.clone(), None).await.expect("delete");
        let refused = registry.claim(&lease, &[ShardId(shard)]).await;
        assert!(matches!(&refused, Err(RegistryError::Refused(_))), "{refused:?}");
        assert!(registry.raise_epoch(&held).await.is_err());
        assert!(registry.cut_predecessors(std::slice::from_ref(&held)).await.is_err());
        etcd.put(key.clone(), record.clone(), None).await.expect("put");
        registry.check_claims().await.expect("usable again");
    }
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn a_lease_that_an_operator_revokes_is_lost_with_the_next_renewal() {
    let cluster = Cluster::new().await;
    let registry = cluster.registry("a").await;
    let lease = registry.register(router("a"), conformance::TTL).await.expect("register");
    // One renewal has been answered: the stream stands.
    let deadline = lease.deadline();
    let renewed = async {
        while lease.deadline() == deadline {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(conformance::TTL, renewed).await.expect("a renewal");
    let mut etcd = cluster.client().await;
    let key = format!("/im/{}/v1/instances/router/a", cluster.id);
    let id = etcd.get(key, None).await.expect("get").kvs()[0].lease();
    etcd.lease_revoke(id).await.expect("revoke");
    timeout(conformance::TTL / 2, lease.lost().wait_for(|lost| *lost)).await.expect("it is told").expect("it lives");
}
