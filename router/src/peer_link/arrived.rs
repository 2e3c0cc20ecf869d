//! How far what was queued for another router has arrived there, known by one mark at a time.

use tokio::time::Instant;

/// Of one link.
#[derive(Debug)]
pub struct Arrived {
    /// All that was queued before this moment has arrived, or the resync in its place.
    until: Instant,
    /// When this number is acknowledged, all that was queued before that moment has arrived.
    mark: Option<(u64, Instant)>,
    /// Something was lost, and the resync in its place is not queued yet.
    lost: bool,
}

impl Arrived {
    /// Nothing was queued yet.
    pub fn new(now: Instant) -> Self {
        Self { until: now, mark: None, lost: false }
    }

    /// Something that was queued is lost: no number speaks of it any more.
    pub fn lost(&mut self) {
        (self.lost, self.mark) = (true, None);
    }

    /// The resync in its place is queued.
    pub fn replaced(&mut self) {
        self.lost = false;
    }

    /// The moment before which everything has arrived, where `last` is the number of the last message that was queued up to `now`.
    pub fn look(&mut self, now: Instant, last: u64, acknowledged: u64) -> Instant {
        if self.lost {
            return self.until;
        }
        if let Some((_, at)) = self.mark.take_if(|(number, _)| *number <= acknowledged) {
            self.until = at;
        }
        if last <= acknowledged {
            (self.until, self.mark) = (now, None);
        } else if self.mark.is_none() {
            self.mark = Some((last, now));
        }
        self.until
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_was_queued_has_arrived_once_its_number_is_acknowledged_however_much_comes_after() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let mut arrived = Arrived::new(start);
        assert_eq!(arrived.look(at(1), 0, 0), at(1));
        assert_eq!(arrived.look(at(2), 5, 3), at(1));
        assert_eq!(arrived.look(at(3), 9, 4), at(1), "number 5 was queued by then");
        assert_eq!(arrived.look(at(4), 12, 5), at(2));
        assert_eq!(arrived.look(at(5), 14, 11), at(2));
        assert_eq!(arrived.look(at(6), 20, 12), at(4));
        assert_eq!(arrived.look(at(7), 20, 20), at(7));
    }

    #[test]
    fn what_was_lost_has_arrived_when_what_was_queued_in_its_place_has() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let mut arrived = Arrived::new(start);
        assert_eq!(arrived.look(at(1), 5, 0), at(0));
        arrived.lost();
        assert_eq!(arrived.look(at(2), 6, 6), at(0), "numbers above that of the mark say nothing of what it was for");
        arrived.replaced();
        assert_eq!(arrived.look(at(3), 8, 6), at(0));
        assert_eq!(arrived.look(at(4), 9, 8), at(3));
    }
}
