//! Ctrl-C: the first asks the command to finish what it began, the second ends the process at once.

use im_proto::environment::Environment;
use tokio::sync::watch;

/// The exit code of a process that a signal ended, as shells write it.
const INTERRUPTED: i32 = 130;

pub(super) struct Interrupt {
    requested: watch::Receiver<bool>,
}

impl Interrupt {
    /// From now on the signal does not end the process by itself.
    pub(super) fn listen(environment: &Environment) -> Self {
        let (sender, requested) = watch::channel(false);
        environment.spawn(async move {
            if tokio::signal::ctrl_c().await.is_err() {
                // Then the signal keeps its usual effect, and nobody asks for a clean end.
                return std::future::pending().await;
            }
            sender.send_replace(true);
            let _ = tokio::signal::ctrl_c().await;
            end_at_once();
        });
        Self { requested }
    }

    /// Finishes when the user has asked for the end.
    pub(super) async fn requested(&self) {
        let mut requested = self.requested.clone();
        if requested.wait_for(|requested| *requested).await.is_err() {
            std::future::pending().await
        }
    }
}

#[allow(clippy::disallowed_methods, reason = "the user asked twice: what is not flushed is not wanted")]
fn end_at_once() {
    std::process::exit(INTERRUPTED);
}
