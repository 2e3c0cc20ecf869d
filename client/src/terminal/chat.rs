//! `im chat`: the full-screen chat. Here is the loop between the parts: keys, the server and time go into the state machine
//! (`state`), what it wants done goes to the SDK, and its view to the screen.
//!
//! Order of a turn: what ended it, keys, answers, events, time; then one drawing for all of them.

mod blocks;
mod conversation;
mod editor;
mod keys;
mod log;
mod render;
mod screen;
mod state;
mod text;
mod zone;

use std::{
    io::{self, IsTerminal as _},
    time::Duration,
};

use bytes::Bytes;
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
use state::{Chat, Effect, Input};

/// Time goes on in the view at least so often.
const TICK: Duration = Duration::from_millis(200);
/// Events taken before the screen is drawn: a flood of messages must not keep keys waiting.
const EVENTS_PER_TURN: usize = 512;
/// Answers that wait; a call whose answer finds no place waits itself.
const ANSWERS_MAX: usize = 64;
/// More than may be unsent, so that a send always finds a place.
const SENDS_MAX: usize = 2 * log::PENDING_MAX;

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
    let outcome = Loop::new(client.clone(), environment, chat)?.run(&mut screen, &mut keyboard, &mut signals).await;
    drop((keyboard, screen));
    client.close().await;
    outcome
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
}

type Send = (usize, u64, Target, Bytes);

struct Loop {
    client: Client,
    environment: Environment,
    chat: Chat,
    events: mpsc::Receiver<Event>,
    answers: mpsc::Receiver<Input>,
    answer: mpsc::Sender<Input>,
    sends: mpsc::Sender<Send>,
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
        let (sends, sends_end) = mpsc::channel(SENDS_MAX);
        environment.spawn(send_in_order(client.clone(), environment.clone(), sends_end, answer.clone()));
        Ok(Self { client, environment, chat, events, answers, answer, sends })
    }

    async fn run(mut self, screen: &mut Screen, keyboard: &mut Keyboard, signals: &mut Signals) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::Failed(format!("cannot use the terminal: {error}"));
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            screen.draw(self.chat.view()).map_err(failed)?;
            let next = tokio::select! {
                biased;
                () = signals.next() => Next::End(Ok(())),
                key = keyboard.events.recv() => self.keys(key, keyboard, screen).map_err(failed)?,
                Some(answer) = self.answers.recv() => self.input(answer, screen).map_err(failed)?,
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
        for effect in self.chat.on(input) {
            match effect {
                Effect::Quit => return Ok(Next::End(Ok(()))),
                Effect::Redraw => screen.redraw()?,
                Effect::Suspend => screen.suspend()?,
                Effect::Send { index, local, target, body } => {
                    // There is room: the state machine bounds what is unsent.
                    let _ = self.sends.try_send((index, local, target, body));
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

/// Hands messages over one after the other, so that they keep their order.
async fn send_in_order(
    client: Client,
    environment: Environment,
    mut sends: mpsc::Receiver<Send>,
    answer: mpsc::Sender<Input>,
) {
    while let Some((index, local, target, body)) = sends.recv().await {
        match client.enqueue(target, body).await {
            Ok(pending) => {
                let answer = answer.clone();
                environment.spawn(async move {
                    let outcome = pending.await;
                    let _ = answer.send(Input::Sent(index, local, outcome)).await;
                });
            }
            Err(error) => {
                let _ = answer.send(Input::Sent(index, local, Err(error))).await;
            }
        }
    }
}
