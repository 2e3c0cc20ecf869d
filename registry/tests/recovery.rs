//! An etcd that is killed, emptied, restored or without a quorum. These start an etcd of their own.

use std::{future::Future, path::Path, time::Duration};

use im_proto::{Epoch, ShardId};
use im_registry::{
    ClaimOutcome, ConnectError, EtcdOptions, EtcdRegistry, EtcdTls, EtcdUser, Lease, Registry as _, RegistryError,
    conformance::{Fixture as _, TTL},
};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    cluster::{Cluster, claim, eventually},
    server::Etcd,
    support::{id, router},
};

const PATIENCE: Duration = Duration::from_secs(40);

/// Calls again until it is answered as wanted.
async fn until<T, F: Future<Output = T>>(what: &str, mut call: impl FnMut() -> F, mut wanted: impl FnMut(&T) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = call().await;
        if wanted(&answer) {
            return;
        }
        assert!(Instant::now() < deadline, "in vain: {what}");
        sleep(Duration::from_millis(100)).await;
    }
}

fn refused<T>(answer: &Result<T, RegistryError>) -> bool {
    matches!(answer, Err(RegistryError::Refused(_)))
}

async fn with_a_claim(etcd: &Etcd) -> (Cluster, EtcdRegistry, Lease) {
    let cluster = Cluster::on(etcd.urls());
    let registry = cluster.connect(cluster.options(&cluster.members)).await;
    registry.recover(1).await.expect("recover");
    let lease = registry.register(router("a"), TTL).await.expect("register");
    claim(&registry, &lease, ShardId(1)).await;
    (cluster, registry, lease)
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn etcd_killed_and_back_costs_nothing_but_time() {
    let mut etcd = Etcd::start(1).await;
    let (cluster, registry, lease) = with_a_claim(&etcd).await;
    let mut view = registry.view();
    eventually(&mut view, |view| view.owner(ShardId(1)) == Some(&id("a"))).await;
    let before = claim(&registry, &lease, ShardId(1)).await;
    etcd.kill(0);
    assert!(matches!(registry.claim(&lease, &[ShardId(2)]).await, Err(RegistryError::Unavailable(_))));
    // Far beyond the lease: nobody could tell that it is dead, so it is not.
    sleep(TTL + TTL / 2).await;
    assert!(lease.deadline() < cluster.since_boot(), "the deadline passes");
    assert!(!*lease.lost().borrow());
    assert_eq!(view.borrow().owner(ShardId(1)), Some(&id("a")));
    etcd.restart(0).await;
    let deadline = lease.deadline();
    let renewed = async || lease.deadline();
    until("a renewal", renewed, |now| *now > deadline).await;
    assert_eq!(claim(&registry, &lease, ShardId(1)).await, before, "the claim stands under its epoch");
    claim(&registry, &lease, ShardId(2)).await;
    eventually(&mut view, |view| view.owner(ShardId(2)) == Some(&id("a"))).await;
    assert!(!*lease.lost().borrow());
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn members_may_die_as_long_as_a_quorum_lives() {
    let mut etcd = Etcd::start(3).await;
    let (cluster, registry, lease) = with_a_claim(&etcd).await;
    let watching = cluster.connect(EtcdOptions { generation: None, ..cluster.options(&etcd.urls()) }).await;
    let mut view = watching.view();
    for (round, shard) in [(0, 10), (1, 11), (2, 12)] {
        // One of the rounds kills the leader, and each the member in use of somebody sooner or later.
        etcd.kill(round);
        let killed_at = Instant::now();
        let shards = [ShardId(shard)];
        let claim = || registry.claim(&lease, &shards);
        let claimed = |answer: &Result<Vec<ClaimOutcome>, _>| matches!(answer, Ok(outcomes) if matches!(outcomes[0], ClaimOutcome::Claimed(_)));
        until("a claim with one member dead", claim, claimed).await;
        eventually(&mut view, |view| view.owner(ShardId(shard)) == Some(&id("a"))).await;
        println!("member {round} killed: claimed and seen after {:?}", killed_at.elapsed());
        assert!(!*lease.lost().borrow());
        etcd.restart(round).await;
    }
    etcd.kill(0);
    etcd.kill(1);
    assert!(matches!(registry.claim(&lease, &[ShardId(20)]).await, Err(RegistryError::Unavailable(_))));
    sleep(TTL + TTL / 2).await;
    assert!(!*lease.lost().borrow(), "without a quorum nobody can say that a lease is dead");
    etcd.restart(0).await;
    until("a claim after the quorum is back", || registry.claim(&lease, &[ShardId(20)]), Result::is_ok).await;
    eventually(&mut view, |view| view.owner(ShardId(20)) == Some(&id("a"))).await;
    assert!(!*lease.lost().borrow(), "leases begin anew with a new leader");
}

/// What must follow after etcd lost what it knew, however: nobody claims, nobody is ended, and a recovery makes it usable.
async fn refused_until_recovered(cluster: &Cluster, registry: &EtcdRegistry, lease: &Lease, lost: impl AsyncFnOnce()) {
    let watching = cluster.connect(EtcdOptions { generation: None, ..cluster.options(&cluster.members) }).await;
    let watching_lease = watching.register(router("w"), TTL).await.expect("register");
    let highest = claim(registry, lease, ShardId(3)).await.epoch;
    let mut view = watching.view();
    eventually(&mut view, |view| view.claims.contains_key(&ShardId(3))).await;
    lost().await;
    until("a refusal", || registry.claim(lease, &[ShardId(2)]), refused).await;
    assert!(refused(&registry.check_claims().await));
    sleep(TTL + TTL / 2).await;
    assert!(refused(&registry.claim(lease, &[ShardId(2)]).await));
    assert!(!*lease.lost().borrow(), "an etcd that lost its data cannot say that a lease is dead");
    assert_eq!(view.borrow().owner(ShardId(3)), Some(&id("a")), "views stay as they were");

    let tool = cluster.connect(EtcdOptions { generation: None, ..cluster.options(&cluster.members) }).await;
    tool.recover(2).await.expect("recover");
    until("the end of a lease", async || *watching_lease.lost().borrow(), |lost| *lost).await;
    eventually(&mut view, |view| view.claims.is_empty()).await;
    timeout(PATIENCE, lease.lost().wait_for(|lost| *lost)).await.expect("the old router is told to end").ok();
    assert!(refused(&registry.register(router("a2"), TTL).await), "started before the recovery");
    let started_after = cluster.connect(EtcdOptions { generation: Some(2), ..cluster.options(&cluster.members) }).await;
    started_after.check_claims().await.expect("usable");
    let new_lease = started_after.register(router("b"), TTL).await.expect("register");
    let claimed = claim(&started_after, &new_lease, ShardId(3)).await;
    assert!(claimed.epoch > highest && claimed.epoch > Epoch::new(2, 0));
    eventually(&mut view, |view| view.owner(ShardId(3)) == Some(&id("b"))).await;
    watching.register(router("w2"), TTL).await.expect("who never claims goes on in the recovered registry");
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn an_emptied_etcd_is_refused_until_recovered() {
    let mut etcd = Etcd::start(1).await;
    let (cluster, registry, lease) = with_a_claim(&etcd).await;
    refused_until_recovered(&cluster, &registry, &lease, async || {
        etcd.kill(0);
        etcd.restart_empty(0).await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn an_etcd_restored_under_a_new_token_is_refused_until_recovered() {
    let mut etcd = Etcd::start(1).await;
    let (cluster, registry, lease) = with_a_claim(&etcd).await;
    etcd.save("old");
    refused_until_recovered(&cluster, &registry, &lease, async || {
        etcd.restore("old", "another").await;
        // Also for a process that saw nothing of what was lost.
        let fresh = cluster.connect(cluster.options(&cluster.members)).await;
        assert!(refused(&fresh.check_claims().await));
    })
    .await;
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn an_etcd_restored_under_the_old_token_is_refused_by_whoever_saw_more() {
    let mut etcd = Etcd::start(1).await;
    let (cluster, registry, lease) = with_a_claim(&etcd).await;
    etcd.save("old");
    refused_until_recovered(&cluster, &registry, &lease, async || etcd.restore("old", "etcd-cluster").await).await;
}

/// It has seen nothing of what was lost. The message store has.
#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn an_etcd_restored_under_the_old_token_is_refused_by_whoever_starts_if_the_store_knows_more() {
    let mut etcd = Etcd::start(1).await;
    let (cluster, registry, lease) = with_a_claim(&etcd).await;
    etcd.save("old");
    let lost = claim(&registry, &lease, ShardId(3)).await.epoch;
    let with = |generation| EtcdOptions {
        generation: Some(generation),
        claimed: Some(lost),
        ..cluster.options(&cluster.members)
    };
    cluster.connect(with(1)).await.check_claims().await.expect("nothing is lost yet");
    etcd.restore("old", "etcd-cluster").await;
    let unaware = cluster.connect(cluster.options(&cluster.members)).await;
    unaware.check_claims().await.expect("etcd does not say that it was restored");
    assert!(refused(&cluster.connect(with(1)).await.check_claims().await));
    let tool = cluster.connect(EtcdOptions { generation: None, ..cluster.options(&cluster.members) }).await;
    tool.recover(2).await.expect("recover");
    cluster.connect(with(2)).await.check_claims().await.expect("usable");
}

/// A CA, and certificates for the members and for a client.
fn certificates(folder: &Path) -> EtcdTls {
    let ca_key = KeyPair::generate().expect("a key");
    let mut ca = CertificateParams::new(Vec::new()).expect("no names");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(DnType::CommonName, "test ca");
    let ca_certificate = ca.self_signed(&ca_key).expect("a certificate");
    let issuer = Issuer::new(ca, ca_key);
    let signed = |name: &str| {
        let key = KeyPair::generate().expect("a key");
        let mut leaf = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).expect("names");
        leaf.distinguished_name.push(DnType::CommonName, name);
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        (leaf.signed_by(&key, &issuer).expect("a certificate").pem(), key.serialize_pem())
    };
    let (server, server_key) = signed("server");
    for (name, text) in [("ca.pem", &ca_certificate.pem()), ("server.pem", &server), ("server-key.pem", &server_key)] {
        std::fs::write(folder.join(name), text).expect("a file");
    }
    let (client, client_key) = signed("root");
    EtcdTls {
        ca_pem: ca_certificate.pem().into_bytes(),
        identity: Some((client.into_bytes(), client_key.into_bytes())),
        server_name: None,
    }
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn etcd_can_ask_for_certificates() {
    let tls = std::sync::Mutex::new(None);
    let etcd = Etcd::start_with(1, "https", |folder| {
        *tls.lock().expect("not poisoned") = Some(certificates(folder));
        let file = |name: &str| folder.join(name).to_string_lossy().into_owned();
        vec![
            format!("--cert-file={}", file("server.pem")),
            format!("--key-file={}", file("server-key.pem")),
            format!("--trusted-ca-file={}", file("ca.pem")),
            "--client-cert-auth".to_owned(),
        ]
    })
    .await;
    let tls = tls.into_inner().expect("not poisoned").expect("certificates");
    let cluster = Cluster::on(etcd.urls());
    let with = |tls: EtcdTls| EtcdOptions { tls: Some(tls), ..cluster.options(&cluster.members) };
    let registry = cluster.connect(with(tls.clone())).await;
    registry.recover(1).await.expect("recover");
    let lease = registry.register(router("a"), TTL).await.expect("register");
    claim(&registry, &lease, ShardId(1)).await;
    eventually(&mut registry.view(), |view| view.owner(ShardId(1)) == Some(&id("a"))).await;
    let anonymous = EtcdTls { identity: None, ..tls };
    assert!(matches!(cluster.try_connect(with(anonymous)).await, Err(ConnectError::Unreachable(_))));
}

#[tokio::test]
#[ignore = "needs etcd: run through deploy/test.sh"]
async fn etcd_can_ask_for_a_user_whose_token_runs_out() {
    let token_lives = || vec!["--auth-token-ttl=2".to_owned()];
    let etcd = Etcd::start_with(1, "http", |_| token_lives()).await;
    let cluster = Cluster::on(etcd.urls());
    let mut root = cluster.client().await;
    root.user_add("root", "geheim", None).await.expect("a user");
    root.user_grant_role("root", "root").await.expect("a role");
    root.auth_enable().await.expect("authentication");
    let with = |password: &str| {
        let user = Some(EtcdUser { name: "root".to_owned(), password: password.to_owned() });
        EtcdOptions { user, ..cluster.options(&cluster.members) }
    };
    let registry = cluster.connect(with("geheim")).await;
    registry.recover(1).await.expect("recover");
    let lease = registry.register(router("a"), TTL).await.expect("register");
    sleep(TTL).await;
    claim(&registry, &lease, ShardId(1)).await;
    eventually(&mut registry.view(), |view| view.owner(ShardId(1)) == Some(&id("a"))).await;
    assert!(!*lease.lost().borrow());
    let refused = cluster.try_connect(with("falsch")).await.map(drop);
    assert!(matches!(&refused, Err(ConnectError::Unreachable(why)) if why.contains("auth")), "{refused:?}");
}
