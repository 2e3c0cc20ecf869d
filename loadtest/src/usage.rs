//! What was asked for cannot be done: wrong options, or something missing on this machine. Nothing was started; exit code 2.

use std::fmt;

/// Wrong usage, configuration or environment.
#[derive(Debug)]
struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// An error of usage: one line that says what is wrong and what to do.
pub fn usage(line: impl Into<String>) -> anyhow::Error {
    Usage(line.into()).into()
}

/// Whether whoever called is to change something.
pub fn is_usage(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<Usage>())
}
