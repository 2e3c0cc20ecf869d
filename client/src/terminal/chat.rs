//! `im chat`: the full-screen chat. Here is the loop between the parts: keys, the server and time go into the state machine
//! (`state`), what it wants done goes to the SDK, and its view to the screen.
//!
//! Order of a turn: what ended it, keys, answers, events, time; then one drawing for all of them.

mod blocks;
mod canvas;
mod conversation;
mod editor;
mod keys;
mod log;
mod render;
mod screen;
mod sends;
mod state;
mod text;
mod zone;

use std::{
    collections::VecDeque,
    io::{self, IsTerminal as _},
    time::Duration,
};

use im_proto::environment::Environment;
use ratatui::crossterm::event::Event as TerminalEvent;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use crate::{
    client::Client,
    config::{ClientConfig, FollowAll, Target},
    error::ClosedReason,
    event::Event,
};

use super::failure::Failure;
use screen::{Keyboard, Screen};
use sends::{Outgoing, Sends};
use state::{Chat, Effect, Input};

/// Time goes on in the view at least so often.
const TICK: Duration = Duration::from_millis(200);
/// Events taken before the screen is drawn: a flood of messages must not keep keys waiting.
const EVENTS_PER_TURN: usize = 512;
/// Answers that wait; a call whose answer finds no place waits itself.
const ANSWERS_MAX: usize = 64;

/// Runs until the user leaves, a signal comes, or the server ends it for good.
pub(super) async fn run(mut config: ClientConfig, target: Option<Target>) -> Result<(), Failure> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        let text = "im chat needs a terminal for input and output; in a script use im tail, im send or im pipe";
        return Err(Failure::Usage(text.to_owned()));
    }
    config.follow_all = FollowAll::FromNow;
    let environment = config.environment.clone();
    let client = Client::start(config);
    let failed = |error: io::Error| Failure::Failed(format!("cannot use the terminal: {error}"));
    let mut signals = Signals::listen().map_err(failed)?;
    let mut screen = Screen::enter().map_err(failed)?;
    let mut keyboard = Keyboard::listen().map_err(failed)?;
    let size = screen.size().map_err(failed)?;
    let now = environment.clock.now();
    let chat = Chat::new(target, now, zone::utc_offset_seconds(now), size);
    let mut chat = Loop::new(client.clone(), environment, chat)?;
    let outcome = chat.run(&mut screen, &mut keyboard, &mut signals).await;
    drop(screen);
    let unsent = chat.finish(&mut keyboard, &mut signals).await;
    drop(keyboard);
    client.close().await;
    and_unsent(outcome, unsent)
}

/// What was not sent is said, however the chat has ended.
fn and_unsent(outcome: Result<(), Failure>, unsent: usize) -> Result<(), Failure> {
    let words = match unsent {
        0 => return outcome,
        1 => "1 message was not sent".to_owned(),
        _ => format!("{unsent} messages were not sent"),
    };
    Err(Failure::Failed(match outcome {
        Ok(()) | Err(Failure::OutputClosed) => words,
        Err(Failure::Failed(text) | Failure::Usage(text)) => format!("{text}; {words}"),
    }))
}

struct Signals([Signal; 4]);

impl Signals {
    fn listen() -> io::Result<Self> {
        let of = |kind| signal(kind);
        Ok(Self([
            of(SignalKind::interrupt())?,
            of(SignalKind::terminate())?,
            of(SignalKind::hangup())?,
            of(SignalKind::quit())?,
        ]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup, quit] = &mut self.0;
        tokio::select! {
            biased;
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
            _ = quit.recv() => {}
        }
    }

    /// A person asks for the end. A terminal that is closed may send its signal more than once, which is no such wish.
    async fn hurry(&mut self) {
        let [interrupt, _, _, quit] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = quit.recv() => {}
        }
    }
}

struct Loop {
    client: Client,
    environment: Environment,
    chat: Chat,
    events: mpsc::Receiver<Event>,
    answers: mpsc::Receiver<Input>,
    answer: mpsc::Sender<Input>,
    sends: Sends,
}

/// Whether the loop goes on.
enum Next {
    Turn,
    End(Result<(), Failure>),
}

impl Loop {
    fn new(client: Client, environment: Environment, chat: Chat) -> Result<Self, Failure> {
        let events = client.events().ok_or_else(|| Failure::Failed("the events are taken".to_owned()))?;
        let (answer, answers) = mpsc::channel(ANSWERS_MAX);
        let sends = Sends::start(client.clone(), &environment, answer.clone());
        Ok(Self { client, environment, chat, events, answers, answer, sends })
    }

    async fn run(
        &mut self,
        screen: &mut Screen,
        keyboard: &mut Keyboard,
        signals: &mut Signals,
    ) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::Failed(format!("cannot use the terminal: {error}"));
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            screen.draw(self.chat.view()).map_err(failed)?;
            let next = tokio::select! {
                biased;
                () = signals.next() => Next::End(Ok(())),
                key = keyboard.events.recv() => self.keys(key, keyboard, screen).map_err(failed)?,
                Some(answer) = self.answers.recv() => {
                    self.sends.answered(&answer);
                    self.input(answer, screen).map_err(failed)?
                }
                event = self.events.recv() => self.events(event, screen).await.map_err(failed)?,
                _ = ticks.tick() => Next::Turn,
            };
            if let Next::End(outcome) = next {
                return outcome;
            }
            if screen.has_panicked() {
                return Err(Failure::Failed("a part of the program has panicked; its words are above".to_owned()));
            }
            let now = self.environment.clock.now();
            if let Next::End(outcome) = self.input(Input::Tick(now), screen).map_err(failed)? {
                return outcome;
            }
        }
    }

    /// Without the screen: waits a moment for what is under way, unless the user asks a second time for the end. How many messages
    /// were not sent.
    async fn finish(&mut self, keyboard: &mut Keyboard, signals: &mut Signals) -> usize {
        let Self { sends, answers, events, .. } = self;
        let hurry = async {
            loop {
                tokio::select! {
                    biased;
                    () = signals.hurry() => return,
                    // It was pressed before the terminal was given back.
                    Some(event) = keyboard.events.recv() => {
                        if let Ok(TerminalEvent::Key(key)) = event
                            && keys::command(key) == Some(keys::Command::Quit)
                        {
                            return;
                        }
                    }
                    // Nobody looks at them any more; they must not stand in the way.
                    Some(_) = events.recv() => {}
                }
            }
        };
        sends.finish(answers, hurry).await
    }

    fn keys(
        &mut self,
        first: Option<io::Result<TerminalEvent>>,
        keyboard: &mut Keyboard,
        screen: &mut Screen,
    ) -> io::Result<Next> {
        let mut next = first;
        loop {
            let Some(event) = next else { return Ok(Next::End(Ok(()))) };
            let input = match event? {
                TerminalEvent::Key(key) => keys::command(key).map(Input::Command),
                TerminalEvent::Paste(text) => Some(Input::Paste(text)),
                TerminalEvent::Resize(columns, lines) => Some(Input::Size(columns, lines)),
                TerminalEvent::FocusGained => Some(Input::Focus(true)),
                TerminalEvent::FocusLost => Some(Input::Focus(false)),
                TerminalEvent::Mouse(_) => None,
            };
            if let Some(input) = input
                && let Next::End(outcome) = self.input(input, screen)?
            {
                return Ok(Next::End(outcome));
            }
            match keyboard.events.try_recv() {
                Ok(event) => next = Some(event),
                Err(_) => return Ok(Next::Turn),
            }
        }
    }

    async fn events(&mut self, first: Option<Event>, screen: &mut Screen) -> io::Result<Next> {
        let mut next = first;
        for _ in 0..EVENTS_PER_TURN {
            let event = match next {
                None => return Ok(Next::End(Err(ClosedReason::ByCaller.into()))),
                Some(Event::Closed(reason)) => return Ok(Next::End(Err(reason.into()))),
                Some(event) => event,
            };
            let connected = matches!(event, Event::Connected { .. });
            if let Next::End(outcome) = self.input(Input::Event(event), screen)? {
                return Ok(Next::End(outcome));
            }
            // There is a session: who this is is known.
            if connected
                && !self.chat.is_identified()
                && let Ok((user, own_log)) = self.client.identity().await
            {
                self.input(Input::Identified(user, own_log), screen)?;
            }
            match self.events.try_recv() {
                Ok(event) => next = Some(event),
                Err(_) => break,
            }
        }
        Ok(Next::Turn)
    }

    fn input(&mut self, input: Input, screen: &mut Screen) -> io::Result<Next> {
        let mut effects = VecDeque::from(self.chat.on(input));
        while let Some(effect) = effects.pop_front() {
            match effect {
                Effect::Quit => return Ok(Next::End(Ok(()))),
                Effect::Redraw => screen.redraw()?,
                Effect::Suspend => screen.suspend()?,
                Effect::Send { index, local, target, body } => {
                    if let Some(outcome) = self.sends.send(Outgoing { index, local, target, body }) {
                        effects.extend(self.chat.on(outcome));
                    }
                }
                effect => self.call(effect),
            }
        }
        Ok(Next::Turn)
    }

    /// Asks the server; the answer comes back as an input.
    fn call(&self, effect: Effect) {
        let client = self.client.clone();
        let answer = self.answer.clone();
        self.environment.spawn(async move {
            let input = match effect {
                Effect::List => Input::Listed(client.conversations().await),
                Effect::Page { index, target, to, limit } => {
                    Input::Paged(index, client.history(target, 1, to, limit, true).await)
                }
                Effect::Members { index, group } => Input::Members(index, client.members(group).await),
                Effect::MarkRead { index, target, seq } => Input::Marked(index, client.mark_read(target, seq).await),
                Effect::Watch { peer } => Input::Watched(client.watch_presence(&[peer]).await),
                Effect::Typing { target, active } => {
                    // Without a session it is worth nothing.
                    let _ = client.typing(target, active).await;
                    return;
                }
                Effect::Send { .. } | Effect::Suspend | Effect::Redraw | Effect::Quit => return,
            };
            // Nobody wants it any more when the chat is over.
            let _ = answer.send(input).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(outcome: Result<(), Failure>, unsent: usize) -> String {
        match and_unsent(outcome, unsent) {
            Err(Failure::Failed(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_was_not_sent_is_said_and_is_a_failure() {
        assert!(and_unsent(Ok(()), 0).is_ok());
        assert_eq!(said(Ok(()), 1), "1 message was not sent");
        assert_eq!(said(Ok(()), 2), "2 messages were not sent");
        assert_eq!(said(Err(Failure::Failed("revoked".to_owned())), 3), "revoked; 3 messages were not sent");
    }
}
