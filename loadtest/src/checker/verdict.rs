//! What the checker found: exact counts, and the first findings in words.

use std::fmt;

use im_proto::ConversationId;
use serde::Serialize;

/// Findings kept in words; all are counted.
const SAMPLES_MAX: usize = 50;

/// A promise that did not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Violation {
    /// Acknowledged, and not in the history at its seq.
    AcknowledgedNotStored,
    /// Acknowledged at a seq at which somebody saw another entry.
    AcknowledgedElsewhere,
    /// Delivered, and not in the history at its seq.
    DeliveredNotStored,
    /// Stored, and not delivered to a client that stayed or came back.
    NotDelivered,
    /// One client message id at two seqs.
    TwoSeqs,
    /// Delivered twice to one client as new.
    DeliveredTwice,
    /// Messages of one session to one conversation out of order.
    SessionOrder,
    /// A session was given a lower seq as new after a higher one.
    DeliveryOrder,
    /// Two observers saw different entries at one seq.
    DifferentOrders,
    /// The history was read after an entry was known to exist, and ended below it.
    HeadWentBack,
    /// A seq below the head without an entry.
    Hole,
    /// Other bytes than were sent, or different bytes for different observers.
    Bytes,
    /// An entry that nobody sent.
    NobodySent,
    /// A seq of 0, or one so far beyond all others that it cannot be.
    ImpossibleSeq,
}

impl Violation {
    /// The total it counts towards.
    pub fn total(self) -> Total {
        match self {
            Self::AcknowledgedNotStored
            | Self::AcknowledgedElsewhere
            | Self::DeliveredNotStored
            | Self::HeadWentBack
            | Self::NotDelivered => Total::Lost,
            Self::TwoSeqs | Self::DeliveredTwice => Total::Duplicated,
            Self::SessionOrder | Self::DeliveryOrder | Self::DifferentOrders => Total::Reordered,
            Self::Hole | Self::ImpossibleSeq => Total::Holes,
            Self::Bytes | Self::NobodySent => Total::Corrupted,
        }
    }
}

/// The totals of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Total {
    Lost,
    Duplicated,
    Reordered,
    Holes,
    Corrupted,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub violation: Violation,
    /// In hexadecimal.
    pub conversation: String,
    pub seq: u64,
    pub detail: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} in {} at seq {}: {}", self.violation, self.conversation, self.seq, self.detail)
    }
}

/// The judgement over a whole run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Different messages that were sent at least once.
    pub sent: u64,
    /// Different messages that were acknowledged.
    pub acknowledged: u64,
    /// Deliveries as new, all clients together.
    pub delivered: u64,
    /// Entries found in the final histories.
    pub stored: u64,
    pub lost: u64,
    pub duplicated: u64,
    pub reordered: u64,
    pub holes: u64,
    pub corrupted: u64,
    /// The first findings.
    pub findings: Vec<Finding>,
}

impl Verdict {
    /// Whether every promise held.
    pub fn is_clean(&self) -> bool {
        [self.lost, self.duplicated, self.reordered, self.holes, self.corrupted].iter().all(|&count| count == 0)
    }

    pub(super) fn found(&mut self, violation: Violation, conversation: ConversationId, seq: u64, detail: &str) {
        self.found_many(1, violation, conversation, seq, detail);
    }

    pub(super) fn found_many(
        &mut self,
        count: u64,
        violation: Violation,
        conversation: ConversationId,
        seq: u64,
        detail: &str,
    ) {
        let total = match violation.total() {
            Total::Lost => &mut self.lost,
            Total::Duplicated => &mut self.duplicated,
            Total::Reordered => &mut self.reordered,
            Total::Holes => &mut self.holes,
            Total::Corrupted => &mut self.corrupted,
        };
        *total += count;
        if self.findings.len() < SAMPLES_MAX {
            let detail = if count > 1 { format!("{detail} ({count} from there on)") } else { detail.to_owned() };
            self.findings.push(Finding { violation, conversation: conversation.to_string(), seq, detail });
        }
    }

    /// Adds what another part of the run found while it ran.
    pub(super) fn absorb(&mut self, other: Verdict) {
        self.sent += other.sent;
        self.acknowledged += other.acknowledged;
        self.delivered += other.delivered;
        self.stored += other.stored;
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.reordered += other.reordered;
        self.holes += other.holes;
        self.corrupted += other.corrupted;
        let room = SAMPLES_MAX.saturating_sub(self.findings.len());
        self.findings.extend(other.findings.into_iter().take(room));
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} sent, {} acknowledged, {} delivered, {} stored; lost {}, duplicated {}, reordered {}, holes {}, corrupted {}",
            self.sent,
            self.acknowledged,
            self.delivered,
            self.stored,
            self.lost,
            self.duplicated,
            self.reordered,
            self.holes,
            self.corrupted
        )?;
        self.findings.iter().try_for_each(|finding| writeln!(f, "  {finding}"))
    }
}
