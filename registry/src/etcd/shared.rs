//! What all parts of one process's registry share, and the calls that everything else is made of.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use etcd_client::{GetOptions, KeyValue, ResponseHeader, Txn, TxnResponse};
use im_proto::{InstanceId, environment::Environment};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::{
    ConnectError, EtcdOptions,
    hold::Hold,
    keys::{ClusterRecord, Keys},
    leases::Identity,
    lineage::{Admitted, Lineage, Origin, Sent, may_claim, outdated},
    metrics::Metrics,
    mirror::{Entry, Mirror},
    transport::{CallError, Transport, origin},
};
use crate::{RegistryError, View};

/// Keys of one page of a full reading. At 500 bytes a key this stays far below the 4 MiB of a gRPC message.
const PAGE_KEYS: i64 = 2_000;

pub(super) struct Shared {
    pub(super) keys: Keys,
    pub(super) transport: Transport,
    pub(super) metrics: Arc<Metrics>,
    pub(super) environment: Environment,
    /// What this process was started with.
    pub(super) generation: Option<u64>,
    pub(super) reconcile_interval: Duration,
    pub(super) lineage: Mutex<Lineage>,
    pub(super) mirror: Mutex<Mirror>,
    pub(super) hold: Mutex<Hold>,
    /// The mirror changed.
    pub(super) changed: Notify,
    /// Somebody saw something that the mirror does not show.
    pub(super) reconcile_soon: Notify,
    view: watch::Sender<Arc<View>>,
    /// Live registrations of this process.
    pub(super) identities: Mutex<BTreeMap<InstanceId, Arc<Identity>>>,
    /// The alarm that was last told.
    alarm: Mutex<Option<String>>,
}

impl Shared {
    pub(super) fn new(options: EtcdOptions, environment: Environment) -> Result<Self, ConnectError> {
        let keys = options.check()?;
        let metrics = Arc::new(Metrics::new());
        let connect_options = options.connect_options();
        let transport = Transport::new(&options.endpoints, connect_options, options.call_timeout, metrics.clone());
        Ok(Self {
            keys,
            transport,
            metrics,
            environment,
            generation: options.generation,
            reconcile_interval: options.reconcile_interval,
            lineage: Mutex::new(Lineage::new(options.claimed)),
            mirror: Mutex::default(),
            hold: Mutex::new(Hold::new(options.hold)),
            changed: Notify::new(),
            reconcile_soon: Notify::new(),
            view: watch::Sender::default(),
            identities: Mutex::default(),
            alarm: Mutex::default(),
        })
    }

    pub(super) fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    /// Shows the processes what the mirror holds. Returns when to do so again although nothing changes.
    pub(super) fn publish(&self) -> Option<Instant> {
        let truth = self.mirror.lock().view();
        self.metrics.instances.set(truth.instances.len() as f64);
        let shown = self.hold.lock().observe(truth, Instant::now());
        self.metrics.instances_held.set(shown.held as f64);
        if shown.began {
            self.metrics.views_held_back.increment(1);
            tracing::error!(
                instances = shown.held,
                "more than half of the instances disappeared at once; they are shown as live until one lease has passed"
            );
        }
        if !Arc::ptr_eq(&self.view.borrow(), &shown.view) {
            self.view.send_replace(shown.view);
        }
        shown.until
    }

    /// One transaction in the registry as this process knows it.
    pub(super) async fn txn(&self, txn: Txn) -> Result<TxnResponse, CallError> {
        let sent = self.begin()?;
        let call = self.transport.call(|mut client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        });
        let answer = call.await?;
        self.check(sent, answer.header()).await?;
        Ok(answer)
    }

    /// One key, as of some moment after the call.
    pub(super) async fn read(&self, key: &str) -> Result<Option<KeyValue>, CallError> {
        let sent = self.begin()?;
        let mut answer = self.transport.call(|mut client| async move { client.get(key, None).await }).await?;
        self.check(sent, answer.header()).await?;
        Ok(answer.take_kvs().pop())
    }

    fn begin(&self) -> Result<Sent, CallError> {
        let lineage = self.lineage.lock();
        match lineage.refused() {
            Some(reason) => Err(CallError::Refused(reason.to_owned())),
            None => Ok(lineage.sent()),
        }
    }

    async fn check(&self, sent: Sent, header: Option<&ResponseHeader>) -> Result<(), CallError> {
        let origin = origin(header)?;
        let judged = self.lineage.lock().check(sent, origin);
        match judged {
            Ok(()) => Ok(()),
            Err(reason) => Err(self.refuse(reason).await),
        }
    }

    /// Judges an answer that may be older than its request.
    pub(super) async fn check_cluster(&self, header: Option<&ResponseHeader>) -> Result<Origin, CallError> {
        let origin = origin(header)?;
        let judged = self.lineage.lock().check_cluster(origin.etcd_cluster);
        match judged {
            Ok(()) => Ok(origin),
            Err(reason) => Err(self.refuse(reason).await),
        }
    }

    /// This is not the registry that it was. Another member may be.
    async fn refuse(&self, reason: String) -> CallError {
        self.transport.next_member().await;
        self.reconcile_soon.notify_one();
        self.raise_alarm(&reason);
        CallError::Refused(reason)
    }

    /// Tells an alarm once.
    pub(super) fn raise_alarm(&self, reason: &str) {
        let mut alarm = self.alarm.lock();
        self.metrics.refused.set(1.0);
        if alarm.as_deref() != Some(reason) {
            tracing::error!(reason, "the registry must not be used as it is");
            *alarm = Some(reason.to_owned());
        }
    }

    pub(super) fn end_alarm(&self) {
        if self.alarm.lock().take().is_some() {
            self.metrics.refused.set(0.0);
            tracing::info!("the registry can be used again");
        }
    }

    /// Reads everything and takes it over.
    pub(super) async fn reconcile(&self) -> Result<Admitted, CallError> {
        let sent = self.lineage.lock().sent();
        let (origin, entries) = self.read_all().await?;
        let fresh = Mirror::read(&self.keys, origin.revision, &entries);
        let unreadable = fresh.unreadable();
        let judged = self.take_over(sent, origin, fresh);
        let admitted = match judged {
            Ok(admitted) => admitted,
            Err(reason) => return Err(self.refuse(reason).await),
        };
        self.metrics.reconciles.increment(1);
        self.metrics.unreadable_keys.set(unreadable as f64);
        self.changed.notify_one();
        let usable = self.may_claim();
        match usable {
            Ok(_) => self.end_alarm(),
            // Who is not registered yet asks by `check_claims`, and tells in its own words.
            Err(reason) if self.generation.is_some() && !self.identities.lock().is_empty() => self.raise_alarm(&reason),
            Err(_) => self.end_alarm(),
        }
        self.repair_registrations().await;
        Ok(admitted)
    }

    fn take_over(&self, sent: Sent, origin: Origin, fresh: Mirror) -> Result<Admitted, String> {
        let mut mirror = self.mirror.lock();
        let admitted = self.lineage.lock().admit(sent, origin, fresh.record().map(|(record, _)| record))?;
        if admitted == Admitted::Continued {
            if fresh.revision() < mirror.revision() {
                // The watch was faster than this reading.
                return Ok(admitted);
            }
            if fresh.revision() == mirror.revision() && fresh != *mirror {
                self.metrics.reconcile_differences.increment(1);
                tracing::error!(revision = fresh.revision(), "the watch had missed changes of the registry");
            }
        }
        *mirror = fresh;
        Ok(admitted)
    }

    /// All keys of the cluster at one revision.
    async fn read_all(&self) -> Result<(Origin, Vec<Entry>), CallError> {
        let end = prefix_end(self.keys.prefix());
        let mut from = self.keys.prefix().as_bytes().to_vec();
        let mut entries = Vec::new();
        let mut first: Option<Origin> = None;
        loop {
            let revision = first.map_or(0, |origin| i64::try_from(origin.revision).unwrap_or(i64::MAX));
            let options = GetOptions::new().with_range(end.clone()).with_limit(PAGE_KEYS).with_revision(revision);
            let answer = self.transport.call(|mut client| {
                let (from, options) = (from.clone(), options.clone());
                async move { client.get(from, Some(options)).await }
            });
            let answer = answer.await?;
            let origin = origin(answer.header())?;
            let first = *first.get_or_insert(origin);
            if origin.etcd_cluster != first.etcd_cluster {
                return Err(CallError::Unavailable("the endpoints belong to different etcd clusters".to_owned()));
            }
            entries.extend(answer.kvs().iter().map(entry));
            match answer.kvs().last() {
                Some(last) if answer.more() => {
                    from = last.key().to_vec();
                    from.push(0);
                }
                _ => return Ok((first, entries)),
            }
        }
    }

    /// The exact bytes that the cluster record must have for a claim of this process, or why it must not claim.
    pub(super) fn may_claim(&self) -> Result<Vec<u8>, String> {
        let etcd_cluster = {
            let lineage = self.lineage.lock();
            if let Some(reason) = lineage.behind() {
                return Err(reason.to_owned());
            }
            lineage.etcd_cluster().unwrap_or(0)
        };
        let mirror = self.mirror.lock();
        may_claim(self.generation, mirror.record().map(|(record, _)| record), etcd_cluster)?;
        Ok(mirror.record().map(|(_, bytes)| bytes.clone()).unwrap_or_default())
    }

    /// Why this process has to start again: the cluster has gone on to a greater generation than its own.
    pub(super) fn outdated(&self) -> Option<String> {
        let mirror = self.mirror.lock();
        let (record, _) = mirror.record()?;
        self.generation.and_then(|own| outdated(own, record))
    }

    /// What to say of a transaction that did not find the cluster record that it required.
    pub(super) fn record_differs(&self, found: Option<&KeyValue>) -> RegistryError {
        self.reconcile_soon.notify_one();
        let etcd_cluster = self.lineage.lock().etcd_cluster().unwrap_or(0);
        let record = match found.map(|found| ClusterRecord::decode(found.value())).transpose() {
            Ok(record) => record,
            Err(error) => return RegistryError::Refused(format!("the cluster record cannot be read: {error}")),
        };
        match may_claim(self.generation, record.as_ref(), etcd_cluster) {
            Ok(()) => RegistryError::Unavailable("the cluster record has just been written".to_owned()),
            Err(reason) => {
                self.raise_alarm(&reason);
                RegistryError::Refused(reason)
            }
        }
    }
}

/// A key with its value, out of the client's type.
pub(super) fn entry(found: &KeyValue) -> Entry {
    Entry {
        key: found.key().to_vec(),
        value: Some(found.value().to_vec()),
        mod_revision: revision(found.mod_revision()),
        lease: lease_number(found.lease()),
    }
}

/// etcd's revisions are never negative.
pub(super) fn revision(of_etcd: i64) -> u64 {
    u64::try_from(of_etcd).unwrap_or(0)
}

/// The bits of a lease id, whose sign means nothing.
pub(super) fn lease_number(of_etcd: i64) -> u64 {
    of_etcd.cast_unsigned()
}

/// The end of the range of all keys with a prefix that ends with a slash.
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}
