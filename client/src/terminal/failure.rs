//! How a command ends that does not end well.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use crate::error::{CallError, ClosedReason, ConfigError, ConnectError, SendError};

use super::output::harmless;

/// One line for people and the exit code.
#[derive(Debug)]
pub(super) enum Failure {
    /// Exit code 1.
    Failed(String),
    /// Exit code 2; nothing was changed.
    Usage(String),
    /// Nobody reads standard output any more: a quiet end.
    OutputClosed,
}

impl Failure {
    pub(super) fn interrupted() -> Self {
        Failure::Failed("interrupted".to_owned())
    }

    /// Tells the user and gives the exit code.
    pub(super) fn report(self) -> ExitCode {
        match self {
            Failure::Failed(text) => {
                say(&text);
                ExitCode::from(1)
            }
            Failure::Usage(text) => {
                say(&text);
                ExitCode::from(2)
            }
            Failure::OutputClosed => ExitCode::SUCCESS,
        }
    }

    /// Of writing to standard output.
    pub(super) fn of_output(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::OutputClosed,
            _ => Failure::Failed(format!("cannot write to standard output: {error}")),
        }
    }
}

/// A terminal that is gone hears nothing; the exit code still says it. The words may be a server's.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "im: {}", harmless(text));
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::TimedOut { .. } => Failure::Failed(format!("{error}; --timeout SECONDS waits longer")),
            ConnectError::Closed(reason) => reason.into(),
        }
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Closed(reason) => reason.into(),
            other => Failure::Failed(other.to_string()),
        }
    }
}

impl From<SendError> for Failure {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Closed(reason) => reason.into(),
            other => Failure::Failed(other.to_string()),
        }
    }
}

impl From<ClosedReason> for Failure {
    fn from(reason: ClosedReason) -> Self {
        use im_proto::StatusCode::{Revoked, TokenExpired, Unauthenticated};
        let hint = match &reason {
            ClosedReason::ByServer(status) => match status.code {
                Some(TokenExpired) => "; make a new token, for example with `imd token --user U`",
                Some(Unauthenticated) => "; is the token of this cluster?",
                Some(Revoked) => "; this device must log in again",
                _ => "",
            },
            ClosedReason::ByCaller | ClosedReason::NoToken(_) => "",
        };
        Failure::Failed(format!("{reason}{hint}"))
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Failure::Usage(error.to_string())
    }
}
