//! How a command ends that does not end well.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use im_proto::StatusCode;

use crate::error::{CallError, ClosedReason, ConfigError, ConnectError, SendError, Status};

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

    /// Of a call about a device that the user named.
    pub(super) fn of_device(error: CallError) -> Self {
        Self::of_call(error, "; `im device list` prints your devices")
    }

    /// Of a call about a channel that need not be one of the user's conversations.
    pub(super) fn of_channel(error: CallError) -> Self {
        Self::of_call(error, "; there is no such channel: whoever made it has its id in `im list`")
    }

    fn of_call(error: CallError, if_not_found: &str) -> Self {
        match error {
            CallError::Closed(reason) => reason.into(),
            CallError::Refused(status) => Failure::Failed(format!("{status}{}", hint(&status, if_not_found))),
            other => Failure::Failed(other.to_string()),
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

/// Whether an attempt failed because nobody who is trusted has signed the certificate. The second is an issuer of the same name, as
/// that of every `imd up` is.
pub(super) fn is_distrust(last: &str) -> bool {
    last.contains("UnknownIssuer") || last.contains("BadSignature")
}

/// What mends it that there is no connection, by why the last attempt failed. The reasons are texts of other libraries; one that is
/// not known here costs no more than a useless advice.
pub(super) fn advice(last: &str) -> &'static str {
    if is_distrust(last) {
        "; name its CA with --ca FILE (`imd up` writes DATA/ca.pem)"
    } else if last.contains("InvalidContentType") || last.contains("this one announces") {
        "; is this port tcp, tls or quic?"
    } else if last.contains("invalid peer certificate") {
        ""
    } else {
        "; --timeout SECONDS waits longer"
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::TimedOut { ref last, .. } => Failure::Failed(format!("{error}{}", advice(last))),
            ConnectError::Closed(reason) => reason.into(),
        }
    }
}

/// To a user who learns only that it is not found.
const NO_CONVERSATION: &str = "; there is no such conversation for you: `im list` prints yours";

fn hint<'a>(status: &Status, if_not_found: &'a str) -> &'a str {
    if status.code == Some(StatusCode::NotFound) { if_not_found } else { "" }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        Self::of_call(error, NO_CONVERSATION)
    }
}

impl From<SendError> for Failure {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Closed(reason) => reason.into(),
            SendError::Refused(ref status) => Failure::Failed(format!("{error}{}", hint(status, NO_CONVERSATION))),
            other => Failure::Failed(other.to_string()),
        }
    }
}

impl From<ClosedReason> for Failure {
    fn from(reason: ClosedReason) -> Self {
        use StatusCode::{Revoked, TokenExpired, Unauthenticated};
        let hint = match &reason {
            ClosedReason::ByServer(status) => match status.code {
                Some(TokenExpired) => "; make a new token, for example with `imd token --user U`",
                Some(Unauthenticated) => {
                    "; is the token of this cluster, and does it last no longer than its token.lifetime_max (1h in a cluster)?"
                }
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn said(failure: impl Into<Failure>) -> String {
        match failure.into() {
            Failure::Failed(text) => text,
            other => panic!("{other:?}"),
        }
    }

    fn no_connection(last: &str) -> String {
        said(ConnectError::TimedOut { after: Duration::from_secs(10), last: last.to_owned() })
    }

    #[test]
    fn who_has_no_connection_is_told_what_mends_it() {
        // As `tests/transports.rs` shows that they come.
        let server = "tls://127.0.0.1:7101";
        for (last, advice) in [
            ("invalid peer certificate: BadSignature", "; name its CA with --ca FILE (`imd up` writes DATA/ca.pem)"),
            ("invalid peer certificate: UnknownIssuer", "; name its CA with --ca FILE (`imd up` writes DATA/ca.pem)"),
            ("received corrupt message of type InvalidContentType", "; is this port tcp, tls or quic?"),
            (
                "the server broke the protocol: a frame has at most 8 bytes here, this one announces 352518912",
                "; is this port tcp, tls or quic?",
            ),
            ("invalid peer certificate: certificate expired", ""),
            ("Connection refused (os error 111)", "; --timeout SECONDS waits longer"),
        ] {
            let said = no_connection(&format!("{server}: {last}"));
            assert_eq!(said, format!("no connection within 10 s: {server}: {last}{advice}"));
        }
    }

    #[test]
    fn what_is_not_found_comes_with_where_to_look() {
        let status = || Status::from_code(StatusCode::NotFound);
        let refused = || CallError::Refused(status());
        let conversations = "not found; there is no such conversation for you: `im list` prints yours";
        assert_eq!(said(refused()), conversations);
        assert_eq!(said(SendError::Refused(status())), format!("the server refused the message: {conversations}"));
        assert_eq!(said(Failure::of_device(refused())), "not found; `im device list` prints your devices");
        assert_eq!(
            said(Failure::of_channel(refused())),
            "not found; there is no such channel: whoever made it has its id in `im list`"
        );
        let other = || CallError::Refused(Status::from_code(StatusCode::Forbidden));
        for failure in [Failure::from(other()), Failure::of_device(other()), Failure::of_channel(other())] {
            assert_eq!(said(failure), "forbidden");
        }
    }

    #[test]
    fn who_is_refused_for_the_token_is_told_what_may_be_wrong_with_it() {
        let refused = |code| said(ClosedReason::ByServer(Status::from_code(code)));
        let said = refused(StatusCode::Unauthenticated);
        assert!(
            said.ends_with(
                "; is the token of this cluster, and does it last no longer than its token.lifetime_max \
                                (1h in a cluster)?"
            ),
            "{said}"
        );
        assert!(refused(StatusCode::TokenExpired).contains("imd token --user"));
    }
}
