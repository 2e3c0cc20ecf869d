//! Who is there: read once, or watched; and whether others see this user.

use im_proto::{StatusCode, UserId, limits, method::Method, v1};
use tokio::{sync::oneshot, time::Instant};

use super::{Client, texts};
use crate::{
    core::Command,
    error::{CallError, Status},
};

impl Client {
    /// Who of these users is online, and was last seen when. Those who share no conversation with this user, or of whom nothing is known
    /// just now, are missing in the answer: that does not mean offline.
    pub async fn presence(&self, users: &[UserId]) -> Result<Vec<v1::UserPresence>, CallError> {
        let mut known = Vec::with_capacity(users.len());
        for users in users.chunks(limits::PRESENCE_USERS_MAX) {
            let request = v1::PresenceReadRequest { user_ids: texts(users) };
            let reply: v1::PresenceReadReply = self.call(Method::PresenceRead, &request).await?;
            known.extend(reply.users);
        }
        Ok(known)
    }

    /// Watches these users, and none besides: from now on [`crate::Event::Presence`] tells who of them comes and goes, across reconnects.
    /// At most [`limits::PRESENCE_WATCHED_MAX`], else `too large`, and those who were watched before still are. The answer is how it is now,
    /// as [`Self::presence`] tells it; what has changed since an event told it comes as an event again.
    ///
    /// The last call counts: one that is still under way then ends with [`CallError::Replaced`]. A call that ends in another way than with
    /// its answer, by its deadline or because it is not awaited any more, is not undone: its users are watched as soon as that is possible.
    pub async fn watch_presence(&self, users: &[UserId]) -> Result<Vec<v1::UserPresence>, CallError> {
        if users.len() > limits::PRESENCE_WATCHED_MAX {
            return Err(CallError::Refused(Status::from_code(StatusCode::TooLarge)));
        }
        let after = self.inner.call_timeout;
        let deadline = Instant::now() + after;
        let closed = || CallError::Closed(self.closed_reason());
        let (answer, answered) = oneshot::channel();
        let sent = self.inner.commands.send(Command::Watch { users: users.to_vec(), answer }).await;
        sent.map_err(|_| closed())?;
        match tokio::time::timeout_at(deadline, answered).await {
            Ok(answer) => answer.unwrap_or_else(|_| Err(closed())),
            Err(_) => Err(CallError::TimedOut { after, last: "no answer".to_owned() }),
        }
    }

    /// Sets whether others see this user come and go, on all devices and until it is set again. While they do not, no client of this
    /// user tells what has arrived or that somebody types. The seq of the entry in the user's own log, 0 if it was so already.
    pub async fn set_invisible(&self, invisible: bool) -> Result<u64, CallError> {
        let request = v1::PresenceSetVisibilityRequest { invisible };
        let reply: v1::PresenceSetVisibilityReply = self.call(Method::PresenceSetVisibility, &request).await?;
        Ok(reply.seq)
    }
}
