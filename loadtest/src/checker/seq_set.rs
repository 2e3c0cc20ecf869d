//! A set of seqs as runs. What arrives in order costs one run, whatever its length.

/// Disjoint, ascending, never touching runs `(first, last)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SeqSet {
    runs: Vec<(u64, u64)>,
}

impl SeqSet {
    /// Adds a seq; false if it was in already.
    pub(super) fn insert(&mut self, seq: u64) -> bool {
        if let Some(last) = self.runs.last_mut() {
            if seq == last.1 + 1 {
                last.1 = seq;
                return true;
            }
            if seq <= last.1 {
                return self.insert_before_the_end(seq);
            }
        }
        self.runs.push((seq, seq));
        true
    }

    fn insert_before_the_end(&mut self, seq: u64) -> bool {
        // The first run that ends at or after `seq - 1`: the only one that can hold it or grow at its end.
        let at = self.runs.partition_point(|run| run.1 + 1 < seq);
        let (first, last) = self.runs[at];
        if first <= seq && seq <= last {
            return false;
        }
        if seq == last + 1 {
            self.runs[at].1 = seq;
            if self.runs.get(at + 1).is_some_and(|next| next.0 == seq + 1) {
                self.runs[at].1 = self.runs[at + 1].1;
                self.runs.remove(at + 1);
            }
        } else if seq + 1 == first {
            self.runs[at].0 = seq;
        } else {
            self.runs.insert(at, (seq, seq));
        }
        true
    }

    /// The runs of `first..=last` that are not in.
    pub(super) fn gaps(&self, first: u64, last: u64) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        let mut next = first;
        for &(start, end) in &self.runs {
            if start > last {
                break;
            }
            if start > next {
                gaps.push((next, start - 1));
            }
            next = next.max(end + 1);
        }
        if next <= last {
            gaps.push((next, last));
        }
        gaps
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_a_plain_set(seqs in proptest::collection::vec(1u64..60, 0..120)) {
            let mut runs = SeqSet::default();
            let mut plain = BTreeSet::new();
            for seq in seqs {
                prop_assert_eq!(runs.insert(seq), plain.insert(seq));
            }
            prop_assert!(runs.runs.windows(2).all(|pair| pair[0].1 + 1 < pair[1].0), "{:?}", runs);
            let missing: Vec<u64> = runs.gaps(5, 50).into_iter().flat_map(|(first, last)| first..=last).collect();
            let expected: Vec<u64> = (5..=50).filter(|seq| !plain.contains(seq)).collect();
            prop_assert_eq!(missing, expected);
        }
    }
}
