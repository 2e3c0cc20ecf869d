//! Is this still the registry in which all earlier claims were made?
//!
//! Revisions are in the epochs and predecessor lists tell whom to fence, so nothing may be claimed in an etcd that lost part of its
//! history. etcd does not say that it was restored. What shows it:
//!
//! - the **cluster record** is absent (an empty etcd), or of another generation than the process was started with;
//! - the record names another **cluster id** than the one that etcd gives in its answers (restored under a new token), or an answer
//!   carries another than the answers before;
//! - an answer that must be newer carries a **revision** below one that was seen before (restored under the old token). From then
//!   on everything is refused, whatever later answers say.
//!
//! A refusal ends with a record of a greater generation, which `imd cluster recover` writes after it has fenced all that were
//! started before.
//!
//! A process that starts after a restore under the old token has seen nothing newer than the snapshot. The message store has: whoever
//! claims notes it there before anything is served, and an etcd that is **behind the claims** that the store knows of may not be claimed
//! in. What this cannot see: a restore that lost no more revisions than were made again before a router started. README.md says how to
//! restore so that this cannot happen.
//!
//! Pure: no I/O, no time.

use im_proto::Epoch;

use super::keys::ClusterRecord;

/// The remedy, named in every refusal.
const REMEDY: &str = "stop the routers and run `imd cluster recover`";

/// Where an answer comes from, by its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) etcd_cluster: u64,
    pub(super) revision: u64,
}

/// What was known when a request was sent: its answer cannot be older.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    era: u64,
    revision: u64,
}

/// The history of one etcd as far as this process has seen it.
#[derive(Debug)]
struct Era {
    etcd_cluster: u64,
    revision: u64,
    generation: Option<u64>,
}

/// What a full reading means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admitted {
    /// The registry went on.
    Continued,
    /// The first reading, or the first after a recovery: revisions may be lower than before.
    NewEra,
}

#[derive(Debug, Default)]
pub(super) struct Lineage {
    era: Option<Era>,
    eras: u64,
    refused: Option<String>,
    /// The greatest claim that the message store knew of when this process started.
    claimed: Option<Epoch>,
    /// Why nothing may be claimed in this era.
    behind: Option<String>,
}

impl Lineage {
    /// Nothing was read yet.
    pub(super) fn new(claimed: Option<Epoch>) -> Self {
        Self { claimed, ..Self::default() }
    }

    /// Why nothing may be claimed until a recovery, although the registry may be used.
    pub(super) fn behind(&self) -> Option<&str> {
        self.behind.as_deref()
    }

    /// To be called before a request is sent.
    pub(super) fn sent(&self) -> Sent {
        Sent { era: self.eras, revision: self.era.as_ref().map_or(0, |era| era.revision) }
    }

    /// The cluster id of the etcd in use.
    pub(super) fn etcd_cluster(&self) -> Option<u64> {
        self.era.as_ref().map(|era| era.etcd_cluster)
    }

    /// Why nothing may be done here, until a recovery.
    pub(super) fn refused(&self) -> Option<&str> {
        self.refused.as_deref()
    }

    /// Judges an answer that reflects everything confirmed before its request was sent (a transaction or a linearizable read).
    pub(super) fn check(&mut self, sent: Sent, origin: Origin) -> Result<(), String> {
        if let Some(reason) = &self.refused {
            return Err(reason.clone());
        }
        self.check_cluster(origin.etcd_cluster)?;
        if sent.era != self.eras {
            return Err("the registry was replaced while the call was under way".to_owned());
        }
        if origin.revision < sent.revision {
            let reason = format!(
                "etcd is back at revision {} after {} was seen, so it was restored from an old snapshot or lost data: {REMEDY}",
                origin.revision, sent.revision
            );
            self.refused = Some(reason.clone());
            return Err(reason);
        }
        self.saw(origin.revision);
        Ok(())
    }

    /// Judges an answer by its cluster id alone (renewals and watches are answered by members that may lag).
    pub(super) fn check_cluster(&self, etcd_cluster: u64) -> Result<(), String> {
        match &self.era {
            Some(era) if era.etcd_cluster != etcd_cluster => Err(format!(
                "an etcd with cluster id {etcd_cluster:016x} answers where {:016x} answered before: if it was restored or replaced, \
                 {REMEDY}; else correct the endpoints",
                era.etcd_cluster
            )),
            _ => Ok(()),
        }
    }

    /// A revision that the registry in use has reached.
    pub(super) fn saw(&mut self, revision: u64) {
        if let Some(era) = &mut self.era {
            era.revision = era.revision.max(revision);
        }
    }

    /// Judges a full reading, which alone can show that a recovery took place.
    pub(super) fn admit(
        &mut self,
        sent: Sent,
        origin: Origin,
        record: Option<&ClusterRecord>,
    ) -> Result<Admitted, String> {
        let generation = record.map(|record| record.generation);
        let Some(era) = &self.era else {
            self.begin(origin, generation);
            return Ok(Admitted::NewEra);
        };
        let recovered = record.is_some_and(|record| {
            record.etcd_cluster == origin.etcd_cluster && Some(record.generation) > era.generation
        });
        match self.check(sent, origin) {
            Ok(()) => {
                if let Some(era) = &mut self.era {
                    era.generation = era.generation.max(generation);
                }
                Ok(Admitted::Continued)
            }
            Err(_) if recovered => {
                self.begin(origin, generation);
                Ok(Admitted::NewEra)
            }
            Err(reason) => Err(reason),
        }
    }

    fn begin(&mut self, origin: Origin, generation: Option<u64>) {
        self.eras += 1;
        self.refused = None;
        let is_lost =
            |claimed: &Epoch| Some(claimed.generation()) == generation && origin.revision < claimed.revision();
        self.behind = self.claimed.filter(is_lost).map(|claimed| {
            format!(
                "etcd is at revision {} and the message store knows of a claim at {}, so etcd was restored from an old snapshot or lost \
                 data: {REMEDY}",
                origin.revision,
                claimed.revision()
            )
        });
        self.era = Some(Era { etcd_cluster: origin.etcd_cluster, revision: origin.revision, generation });
    }
}

/// Whether a process that was started with the generation `own` may claim in an etcd with this record and cluster id.
pub(super) fn may_claim(own: Option<u64>, record: Option<&ClusterRecord>, etcd_cluster: u64) -> Result<(), String> {
    let Some(own) = own.filter(|own| *own > 0) else {
        return Err("this process was started without a generation and cannot claim shards".to_owned());
    };
    let Some(record) = record else {
        return Err(format!("etcd holds no cluster record: it is new or has lost its data; {REMEDY}"));
    };
    if record.etcd_cluster != etcd_cluster {
        return Err(format!(
            "the cluster record was written in the etcd {:016x}, but {etcd_cluster:016x} answers: it was restored; {REMEDY}",
            record.etcd_cluster
        ));
    }
    if let Some(reason) = outdated(own, record) {
        return Err(reason);
    }
    if record.generation < own {
        return Err(format!(
            "etcd is at generation {} and the message store at {own}: etcd was restored, or a recovery has not ended; {REMEDY}",
            record.generation
        ));
    }
    Ok(())
}

/// Why a process that was started with the generation `own` has to start again.
pub(super) fn outdated(own: u64, record: &ClusterRecord) -> Option<String> {
    let now = record.generation;
    (now > own).then(|| {
        format!("the cluster is at generation {now} and this process was started with {own}: it must start again")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: u64 = 0xa;

    fn origin(etcd_cluster: u64, revision: u64) -> Origin {
        Origin { etcd_cluster, revision }
    }

    fn record(generation: u64, etcd_cluster: u64) -> ClusterRecord {
        ClusterRecord { generation, etcd_cluster }
    }

    fn begun() -> Lineage {
        let mut lineage = Lineage::default();
        let first = lineage.admit(lineage.sent(), origin(HOME, 10), Some(&record(1, HOME)));
        assert_eq!(first, Ok(Admitted::NewEra));
        lineage
    }

    #[test]
    fn answers_may_arrive_in_any_order_but_not_be_older_than_their_request() {
        let mut lineage = begun();
        let (first, second) = (lineage.sent(), lineage.sent());
        assert_eq!(lineage.check(second, origin(HOME, 12)), Ok(()));
        assert_eq!(lineage.check(first, origin(HOME, 11)), Ok(()), "sent before 12 was seen");
        assert!(lineage.check(lineage.sent(), origin(HOME, 11)).is_err(), "sent after 12 was seen");
    }

    #[test]
    fn a_revision_that_went_back_is_refused_for_good() {
        let mut lineage = begun();
        lineage.saw(50);
        assert!(lineage.check(lineage.sent(), origin(HOME, 20)).is_err());
        assert!(
            lineage.check(lineage.sent(), origin(HOME, 60)).is_err(),
            "it overtook what was seen, but its history differs"
        );
        assert!(lineage.refused().is_some_and(|reason| reason.contains("imd cluster recover")));
        assert!(lineage.admit(lineage.sent(), origin(HOME, 61), Some(&record(1, HOME))).is_err());
    }

    #[test]
    fn nothing_is_claimed_in_an_etcd_that_is_behind_the_claims_of_the_store() {
        for (revision, is_behind) in [(19, true), (20, false), (21, false)] {
            let mut lineage = Lineage::new(Some(Epoch::new(1, 20)));
            let first = lineage.admit(lineage.sent(), origin(HOME, revision), Some(&record(1, HOME)));
            assert_eq!((first, lineage.behind().is_some()), (Ok(Admitted::NewEra), is_behind), "{revision}");
        }
        let mut lineage = Lineage::new(Some(Epoch::new(1, 20)));
        lineage.admit(lineage.sent(), origin(HOME, 5), Some(&record(1, HOME))).unwrap();
        lineage.admit(lineage.sent(), origin(HOME, 50), Some(&record(1, HOME))).unwrap();
        assert!(lineage.behind().is_some_and(|reason| reason.contains("imd cluster recover")), "its history differs");
        // Claims of a generation before say nothing of this one.
        let mut lineage = Lineage::new(Some(Epoch::new(1, 20)));
        lineage.admit(lineage.sent(), origin(HOME, 5), Some(&record(2, HOME))).unwrap();
        assert_eq!(lineage.behind(), None);
    }

    #[test]
    fn another_etcd_is_refused_and_the_first_one_still_trusted() {
        let mut lineage = begun();
        assert!(lineage.check(lineage.sent(), origin(0xb, 70)).is_err());
        assert!(lineage.check_cluster(0xb).is_err());
        assert!(lineage.admit(lineage.sent(), origin(0xb, 70), Some(&record(1, HOME))).is_err());
        assert_eq!(lineage.check(lineage.sent(), origin(HOME, 10)), Ok(()));
    }

    #[test]
    fn only_a_greater_generation_of_the_same_etcd_begins_a_new_era() {
        for (etcd, revision) in [(HOME, 5), (0xb, 5), (0xb, 500)] {
            let mut lineage = begun();
            let before = lineage.sent();
            assert!(lineage.admit(lineage.sent(), origin(etcd, revision), None).is_err());
            assert!(lineage.admit(lineage.sent(), origin(etcd, revision), Some(&record(1, etcd))).is_err());
            assert!(lineage.admit(lineage.sent(), origin(etcd, revision), Some(&record(2, 0xc))).is_err());
            let recovered = lineage.admit(lineage.sent(), origin(etcd, revision), Some(&record(2, etcd)));
            assert_eq!(recovered, Ok(Admitted::NewEra));
            assert_eq!(lineage.refused(), None);
            assert_eq!(lineage.check(lineage.sent(), origin(etcd, revision)), Ok(()));
            assert!(lineage.check(before, origin(etcd, revision + 500)).is_err(), "asked before the recovery");
        }
    }

    #[test]
    fn a_generation_raised_in_a_healthy_etcd_is_no_new_era() {
        let mut lineage = begun();
        let raised = lineage.admit(lineage.sent(), origin(HOME, 30), Some(&record(2, HOME)));
        assert_eq!(raised, Ok(Admitted::Continued));
        assert!(lineage.admit(lineage.sent(), origin(0xb, 1), Some(&record(2, 0xb))).is_err(), "not greater than 2");
    }

    #[test]
    fn claims_need_the_record_of_their_own_generation_and_etcd() {
        assert_eq!(may_claim(Some(3), Some(&record(3, HOME)), HOME), Ok(()));
        for (own, found) in [
            (None, Some(record(3, HOME))),
            (Some(0), Some(record(0, HOME))),
            (Some(3), None),
            (Some(3), Some(record(2, HOME))),
            (Some(3), Some(record(4, HOME))),
            (Some(3), Some(record(3, 0xb))),
        ] {
            assert!(may_claim(own, found.as_ref(), HOME).is_err(), "{own:?} {found:?}");
        }
    }
}
