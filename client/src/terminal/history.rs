//! `im history`: stored entries, page by page.

use crate::{
    client::{Client, Page},
    config::Target,
};

use super::{failure::Failure, output::Output};

/// Entries of one page.
const PAGE: u64 = 1_000;

/// Prints `from..=to`, both the whole log if absent. With a limit and no beginning, the newest entries of the range.
pub(super) async fn run(
    client: &Client,
    target: Target,
    from: Option<u64>,
    to: Option<u64>,
    limit: Option<u64>,
    output: &mut Output,
) -> Result<(), Failure> {
    let newest = client.history(target.clone(), 1, 0, 1, true).await?;
    let Some((mut next, last)) = range(from, to, limit, newest.head, newest.first_seq) else { return Ok(()) };
    let target = Target::Conversation(newest.conversation);
    while next <= last {
        let want = u32::try_from((last - next + 1).min(PAGE)).unwrap_or(1);
        let Page { entries, first_seq, .. } = client.history(target.clone(), next, last, want, false).await?;
        let before = next;
        for entry in entries {
            if entry.seq >= next && entry.seq <= last {
                output.entry(&entry)?;
                next = entry.seq + 1;
            }
        }
        // What is no longer kept is stepped over.
        next = next.max(first_seq);
        if next == before {
            return Err(Failure::Failed(format!("the server does not give seq {next}, although it has {last}")));
        }
    }
    Ok(())
}

/// The first and last seq to print, or `None` if there is nothing.
fn range(from: Option<u64>, to: Option<u64>, limit: Option<u64>, head: u64, first_seq: u64) -> Option<(u64, u64)> {
    let last = to.unwrap_or(head).min(head);
    let limit = limit.unwrap_or(u64::MAX);
    let first = match from {
        Some(from) => from,
        None => (last + 1).saturating_sub(limit),
    };
    let first = first.max(first_seq).max(1);
    let last = last.min(first.saturating_add(limit).saturating_sub(1));
    (first <= last && limit > 0).then_some((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_to_what_there_is() {
        assert_eq!(range(None, None, None, 10, 1), Some((1, 10)));
        assert_eq!(range(Some(4), Some(1_000_000_000), None, 10, 1), Some((4, 10)));
        assert_eq!(range(Some(11), None, None, 10, 1), None);
        assert_eq!(range(None, None, None, 0, 0), None);
        assert_eq!(range(None, Some(5), None, 10, 3), Some((3, 5)));
        assert_eq!(range(None, Some(2), None, 10, 3), None);
    }

    #[test]
    fn a_limit_takes_the_first_after_from_and_else_the_newest() {
        assert_eq!(range(Some(4), None, Some(3), 10, 1), Some((4, 6)));
        assert_eq!(range(None, None, Some(3), 10, 1), Some((8, 10)));
        assert_eq!(range(None, Some(5), Some(3), 10, 1), Some((3, 5)));
        assert_eq!(range(None, None, Some(100), 10, 1), Some((1, 10)));
        assert_eq!(range(Some(1), None, Some(0), 10, 1), None);
        assert_eq!(range(None, None, Some(0), 10, 1), None);
        assert_eq!(range(Some(u64::MAX), None, Some(u64::MAX), u64::MAX - 1, 1), None);
    }
}
