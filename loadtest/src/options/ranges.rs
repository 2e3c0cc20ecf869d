//! What an option may be: each range is said when it is left, and what is in it the scenarios take as it is.

use std::{fmt::Display, str::FromStr};

use im_proto::limits;

/// Pairs of users: as many as [`CONNECTIONS_MAX`] are.
pub const PAIRS_MAX: usize = CONNECTIONS_MAX / 2;
pub const CONNECTIONS_MAX: usize = 1_000_000;
/// Servers and processes of clients for idle connections.
pub const PROCESSES_MAX: usize = 1_000;
/// Tokens last a day: 23 hours, so that there is time before and after.
pub const SECONDS_MAX: f64 = 82_800.0;
pub const HOUR_SECONDS: f64 = 3_600.0;
/// What a server takes as `gateway.heartbeat_interval`.
pub const HEARTBEAT_SECONDS: [f64; 2] = [1.0, 1_800.0];
/// The longest text in a body: besides it, tag and length of its two fields.
pub const TEXT_BYTES_MAX: usize = limits::BODY_BYTES_MAX - 8;
pub const RATE_MAX: f64 = 10_000_000.0;
pub const FLOOD_RATE_MAX: f64 = 1_000_000.0;
pub const READS_MAX: f64 = 100_000.0;
pub const FILL_MAX: u64 = 10_000_000_000;
pub const KILLS_MAX: u32 = 100_000;
/// A process id is an `i32` that is greater than 0.
pub const PID_MAX: u32 = i32::MAX.unsigned_abs();

/// A whole number of this range.
pub fn whole<T: Within>(least: T, most: T) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static {
    move |text| within(text, least, most).ok_or_else(|| format!("allowed is a whole number from {least} to {most}"))
}

/// A number of this range: it is finite.
pub fn number(least: f64, most: f64) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync + 'static {
    move |text| within(text, least, most).ok_or_else(|| format!("allowed is a number from {least} to {most}"))
}

/// A number of this range, or 0, which means none.
pub fn zero_or(least: f64, most: f64) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync + 'static {
    move |text| {
        let found = within(text, 0.0, 0.0).or_else(|| within(text, least, most));
        found.ok_or_else(|| format!("allowed is 0, or a number from {least} to {most}"))
    }
}

/// A setting of the server.
pub fn setting(text: &str) -> Result<String, String> {
    let key = text.split_once('=').map_or("", |(key, _)| key);
    if key.is_empty() { Err("allowed is KEY=VALUE".to_owned()) } else { Ok(text.to_owned()) }
}

/// What has a range and is written as a number.
pub trait Within: Copy + Display + FromStr + PartialOrd + Send + Sync + 'static {}

impl<T: Copy + Display + FromStr + PartialOrd + Send + Sync + 'static> Within for T {}

fn within<T: Within>(text: &str, least: T, most: T) -> Option<T> {
    // What is no number compares as neither.
    text.parse().ok().filter(|value| *value >= least && *value <= most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_text_makes_the_longest_body() {
        assert_eq!(im_proto::body::text("x".repeat(TEXT_BYTES_MAX)).len(), limits::BODY_BYTES_MAX);
    }

    #[test]
    fn both_ends_of_a_range_are_in_it_and_zero_where_it_means_none() {
        let seconds = number(0.1, 60.0);
        assert_eq!((seconds("0.1"), seconds("60")), (Ok(0.1), Ok(60.0)));
        assert!(["0", "60.1", "NaN", "inf", "-inf", ""].iter().all(|text| seconds(text).is_err()));
        let ceiling = zero_or(0.1, 60.0);
        assert_eq!((ceiling("0"), ceiling("0.1")), (Ok(0.0), Ok(0.1)));
        assert!(["0.09", "-0.1", "NaN"].iter().all(|text| ceiling(text).is_err()));
        let pairs = whole(1_usize, 5);
        assert_eq!((pairs("1"), pairs("5")), (Ok(1), Ok(5)));
        assert!(["0", "6", "-1", "1.5", "18446744073709551616"].iter().all(|text| pairs(text).is_err()));
    }
}
