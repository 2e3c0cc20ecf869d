//! What ends a command before it is done, and the exit code that says so.

use std::fmt;

/// One line for a person, and who has to act.
#[derive(Debug)]
pub enum Failure {
    /// It was tried and failed: exit 1.
    Operation(String),
    /// Wrong usage, configuration or environment, nothing was changed: exit 2.
    Usage(String),
    /// A promise of the system did not hold: exit 3.
    Promise(String),
}

impl Failure {
    /// Wrong usage, configuration or environment.
    pub fn usage(error: impl fmt::Display) -> Self {
        Self::Usage(format!("{error:#}"))
    }

    /// It was tried and failed.
    pub fn operation(error: impl fmt::Display) -> Self {
        Self::Operation(format!("{error:#}"))
    }

    /// The exit code of the process.
    pub fn code(&self) -> u8 {
        match self {
            Self::Operation(_) => 1,
            Self::Usage(_) => 2,
            Self::Promise(_) => 3,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operation(text) | Self::Usage(text) | Self::Promise(text) => f.write_str(text),
        }
    }
}
