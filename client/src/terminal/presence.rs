//! `im presence`: who is there, and with `--watch` who comes and goes. `im invisible`: whether others see this.

use std::collections::BTreeMap;

use im_proto::{Timestamp, UserId, v1};
use serde::Serialize;

use crate::{client::Client, event::Event};

use super::{
    args::{Format, Switch},
    failure::Failure,
    interrupt::Interrupt,
    output::{Output, rfc3339},
};

#[derive(Serialize)]
struct PresenceJson<'a> {
    user: &'a str,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_seen: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    invisible: bool,
}

/// Prints how it is, once.
pub(super) async fn read(client: &Client, users: &[UserId], output: &mut Output) -> Result<(), Failure> {
    let known = client.presence(users).await?;
    print_all(users, &known, output)
}

/// Prints how it is, then what changes, until it is interrupted.
pub(super) async fn watch(
    client: &Client,
    users: &[UserId],
    output: &mut Output,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let mut events = client.events().ok_or_else(|| Failure::Failed("the events are taken".to_owned()))?;
    let known = tokio::select! {
        biased;
        known = client.watch_presence(users) => known?,
        () = interrupt.requested() => return Ok(()),
    };
    print_all(users, &known, output)?;
    let mut shown: BTreeMap<String, v1::UserPresence> =
        known.into_iter().map(|known| (known.user_id.clone(), known)).collect();
    loop {
        output.flush()?;
        let event = tokio::select! {
            biased;
            event = events.recv() => event,
            () = interrupt.requested() => return Ok(()),
        };
        match event {
            Some(Event::Presence(users)) => {
                for user in users {
                    let before = shown.insert(user.user_id.clone(), user.clone());
                    if before.is_none_or(|before| before != user && !(before.online && user.online)) {
                        print(&user.user_id, Some(&user), output)?;
                    }
                }
            }
            Some(Event::Closed(reason)) => return Err(reason.into()),
            Some(_) => {}
            None => return Ok(()),
        }
    }
}

/// Sets whether others see this user.
pub(super) async fn invisible(client: &Client, switch: Switch) -> Result<(), Failure> {
    client.set_invisible(switch == Switch::On).await?;
    Ok(())
}

/// In the order of the command line.
fn print_all(users: &[UserId], known: &[v1::UserPresence], output: &mut Output) -> Result<(), Failure> {
    for user in users {
        let known = known.iter().find(|known| known.user_id == user.as_str());
        print(user.as_str(), known, output)?;
    }
    Ok(())
}

fn print(user: &str, known: Option<&v1::UserPresence>, output: &mut Output) -> Result<(), Failure> {
    let state = match known {
        Some(known) if known.online => "online",
        Some(_) => "offline",
        None => "unknown",
    };
    let last_seen = known.map(|known| known.last_seen_ms).filter(|millis| *millis > 0);
    let last_seen = last_seen.map(|millis| rfc3339(Timestamp::from_millis(millis)));
    let invisible = known.is_some_and(|known| known.invisible);
    match output.format() {
        Format::Plain => {
            let hidden = if invisible { "\tinvisible" } else { "" };
            output.line(&format!("{user}\t{state}\t{}{hidden}", last_seen.as_deref().unwrap_or("-")))
        }
        Format::Json => output.json(&PresenceJson { user, state, last_seen, invisible }),
    }
}
