//! `im tail`: entries as they come, after history from a seq if one is given; each once and in order, across reconnects.

use im_proto::ConversationId;
use tokio::sync::mpsc;

use crate::{
    client::{Client, Position},
    config::Target,
    error::CallError,
    event::Event,
};

use super::{failure::Failure, interrupt::Interrupt, output::Output};

pub(super) async fn run(
    client: &Client,
    target: Target,
    from: Option<u64>,
    count: Option<u64>,
    output: &mut Output,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    if count == Some(0) {
        return Ok(());
    }
    let mut events = client.events().ok_or_else(|| Failure::Failed("the events are taken".to_owned()))?;
    let position = from.map_or(Position::Now, Position::Seq);
    let conversation = tokio::select! {
        biased;
        conversation = follow(client, target, position) => conversation?,
        () = interrupt.requested() => return Ok(()),
    };
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        let event = match events.try_recv() {
            Ok(event) => event,
            Err(mpsc::error::TryRecvError::Disconnected) => break,
            Err(mpsc::error::TryRecvError::Empty) => {
                // Nothing more for now: show what there is.
                output.flush()?;
                let event = tokio::select! {
                    biased;
                    event = events.recv() => event,
                    () = interrupt.requested() => return Ok(()),
                };
                let Some(event) = event else { break };
                event
            }
        };
        if show(event, conversation, output)? {
            left -= 1;
        }
    }
    output.flush()
}

/// Goes on trying while the server is away: `tail` survives that.
async fn follow(client: &Client, target: Target, position: Position) -> Result<Option<ConversationId>, Failure> {
    loop {
        match client.follow(target.clone(), position).await {
            Err(CallError::TimedOut { .. }) => {}
            Err(error) => return Err(error.into()),
            Ok(conversation) => return Ok(conversation),
        }
    }
}

/// Prints what is to be printed; true if that was a message.
fn show(event: Event, conversation: Option<ConversationId>, output: &mut Output) -> Result<bool, Failure> {
    let is_ours = |id: ConversationId| conversation.is_none_or(|ours| ours == id);
    match event {
        Event::Message(entry) if is_ours(entry.conversation) => output.entry(&entry),
        Event::Gone { conversation, through } if is_ours(conversation) => {
            eprintln!("im: entries up to seq {through} are no longer kept");
            Ok(false)
        }
        Event::Unreadable { conversation, status } if is_ours(conversation) => {
            output.flush()?;
            Err(Failure::Failed(format!("this conversation cannot be read any more: {status}")))
        }
        Event::Closed(reason) => {
            output.flush()?;
            Err(reason.into())
        }
        _ => Ok(false),
    }
}
