//! How far the user's clock is ahead of UTC, from the system's time zone file.
//!
//! Only the offset in force now: a chat that runs over a change of summer time shows older times by the newer offset. What cannot be
//! read is UTC. The format is TZif, RFC 8536.

use std::path::PathBuf;

use im_proto::Timestamp;

/// The largest file looked at; those of the system have some kilobytes.
const FILE_BYTES_MAX: usize = 256 * 1024;
const HEADER_BYTES: usize = 44;

/// Seconds to add to UTC.
pub(super) fn utc_offset_seconds(now: Timestamp) -> i64 {
    let named = std::env::var("TZ").ok().map(|zone| zone.trim_start_matches(':').to_owned());
    let path = match named.as_deref() {
        Some("" | "UTC") => return 0,
        // Only names and paths; a rule such as "CET-1" is not looked at.
        Some(zone) if zone.starts_with('/') => PathBuf::from(zone),
        Some(zone) if !zone.contains("..") => PathBuf::from("/usr/share/zoneinfo").join(zone),
        Some(_) => return 0,
        None => PathBuf::from("/etc/localtime"),
    };
    let bytes = std::fs::read(path).unwrap_or_default();
    if bytes.len() > FILE_BYTES_MAX {
        return 0;
    }
    offset(&bytes, now.as_millis().div_euclid(1000)).unwrap_or(0)
}

/// The offset of a file at a time in seconds.
fn offset(file: &[u8], now: i64) -> Option<i64> {
    let counts = |header: &[u8]| -> Option<[usize; 6]> {
        if header.get(..4)? != b"TZif" {
            return None;
        }
        let mut counts = [0; 6];
        for (count, bytes) in counts.iter_mut().zip(header.get(20..HEADER_BYTES)?.chunks_exact(4)) {
            *count = usize::try_from(u32::from_be_bytes(bytes.try_into().ok()?)).ok().filter(|n| *n < 1 << 20)?;
        }
        Some(counts)
    };
    let data_bytes = |[isut, isstd, leap, times, types, chars]: [usize; 6], time_bytes: usize| {
        times * time_bytes + times + types * 6 + chars + leap * (time_bytes + 4) + isstd + isut
    };
    let first = counts(file)?;
    // The second part has times of 64 bits, from version 2 on.
    let (part, counts, time_bytes) = match file.get(4)? {
        0 => (file.get(HEADER_BYTES..)?, first, 4),
        _ => {
            let second = file.get(HEADER_BYTES + data_bytes(first, 4)..)?;
            (second.get(HEADER_BYTES..)?, counts(second)?, 8)
        }
    };
    let [_, _, _, times, types, _] = counts;
    let time = |bytes: &[u8]| match bytes.len() {
        8 => bytes.try_into().ok().map(i64::from_be_bytes),
        _ => bytes.try_into().ok().map(i32::from_be_bytes).map(i64::from),
    };
    let passed = part.get(..times * time_bytes)?.chunks_exact(time_bytes).filter_map(time).filter(|at| *at <= now);
    let kinds = part.get(times * time_bytes..)?;
    let kind = match passed.count() {
        0 => 0,
        passed => usize::from(*kinds.get(passed - 1)?),
    };
    let kinds = kinds.get(times..times + types * 6)?;
    let record = kinds.chunks_exact(6).nth(kind)?;
    Some(i64::from(i32::from_be_bytes(record.get(..4)?.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One zone of one hour, then two hours from second 1,000 on.
    fn file() -> Vec<u8> {
        let header = |times: u32, types: u32, chars: u32| {
            let mut header = b"TZif2".to_vec();
            header.extend([0; 15]);
            for count in [0, 0, 0, times, types, chars] {
                header.extend(count.to_be_bytes());
            }
            header
        };
        let mut file = header(0, 1, 1);
        file.extend([0; 7]);
        file.extend(header(1, 2, 1));
        file.extend(1_000_i64.to_be_bytes());
        file.push(1);
        for offset in [3_600_i32, 7_200] {
            file.extend(offset.to_be_bytes());
            file.extend([0, 0]);
        }
        file.push(0);
        file
    }

    #[test]
    fn the_offset_is_that_of_the_last_change() {
        assert_eq!(offset(&file(), 999), Some(3_600));
        assert_eq!(offset(&file(), 1_000), Some(7_200));
    }

    #[test]
    fn what_is_no_zone_file_has_no_offset_and_a_cut_one_does_not_panic() {
        assert_eq!(offset(b"hello", 0), None);
        let file = file();
        for length in 0..file.len() {
            let _ = offset(&file[..length], 0);
        }
    }
}
