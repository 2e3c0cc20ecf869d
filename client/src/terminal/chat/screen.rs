//! The terminal: taken over for the chat, and given back however the chat ends.

use std::{
    io::{self, BufWriter, Stdout, Write as _},
    panic,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use ratatui::{
    buffer::Buffer,
    crossterm::{
        cursor,
        event::{self, DisableBracketedPaste, DisableFocusChange, EnableBracketedPaste, EnableFocusChange},
        execute, terminal,
    },
    layout::Rect,
};
use tokio::sync::mpsc;

use super::{canvas::Canvas, render, state::View};

/// How soon the reading thread notices that it is not wanted any more.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Keys that wait while the screen is drawn. Beyond it the terminal keeps them.
const KEYS_MAX: usize = 256;
/// Most screens are written with one call, so that none is seen half drawn.
const FRAME_BYTES: usize = 64 * 1024;

type Hook = Box<dyn Fn(&panic::PanicHookInfo<'_>) + Send + Sync>;

/// Dropping it gives the terminal back.
pub(super) struct Screen {
    canvas: Canvas<BufWriter<Stdout>>,
    painted: Option<View>,
    taken: Taken,
}

/// The terminal and the words of a panic, in the hands of the chat. It stands before the first of them is taken, so that whatever
/// fails on the way gives back what was taken until then.
struct Taken {
    give_back: fn(),
    panicked: Arc<AtomicBool>,
    previous_hook: Arc<Hook>,
}

impl Screen {
    /// Takes the terminal over.
    pub(super) fn enter() -> io::Result<Self> {
        let (taken, ()) = Taken::with(restore, take_over)?;
        let canvas = Canvas::new(BufWriter::with_capacity(FRAME_BYTES, io::stdout()));
        Ok(Self { canvas, painted: None, taken })
    }

    /// Columns and lines.
    pub(super) fn size(&self) -> io::Result<(u16, u16)> {
        terminal::size()
    }

    /// Draws what has changed.
    pub(super) fn draw(&mut self, view: View) -> io::Result<()> {
        if self.painted.as_ref() == Some(&view) {
            return Ok(());
        }
        let (columns, lines) = self.size()?;
        let mut next = Buffer::empty(Rect::new(0, 0, columns, lines));
        let cursor = render::paint(&view, &mut next);
        self.canvas.show(next, cursor)?;
        self.painted = Some(view);
        Ok(())
    }

    /// Draws everything with the next view.
    pub(super) fn redraw(&mut self) -> io::Result<()> {
        self.painted = None;
        self.canvas.clear()
    }

    /// Gives the terminal to the shell until the user brings the chat back.
    pub(super) fn suspend(&mut self) -> io::Result<()> {
        restore();
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TSTP)?;
        take_over()?;
        self.redraw()
    }

    /// Whether some part of the program has panicked: the terminal is not ours any more.
    pub(super) fn has_panicked(&self) -> bool {
        self.taken.panicked.load(Ordering::SeqCst)
    }
}

impl Taken {
    fn with<T>(give_back: fn(), take: impl FnOnce() -> io::Result<T>) -> io::Result<(Self, T)> {
        let panicked = Arc::new(AtomicBool::new(false));
        let previous_hook: Arc<Hook> = Arc::new(panic::take_hook());
        let (mark, previous) = (panicked.clone(), previous_hook.clone());
        // Whatever part of the program it is, its words must be readable.
        panic::set_hook(Box::new(move |info| {
            mark.store(true, Ordering::SeqCst);
            give_back();
            previous(info);
        }));
        let taken = Self { give_back, panicked, previous_hook };
        let got = take()?;
        Ok((taken, got))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        (self.give_back)();
        if !thread::panicking() {
            let previous = self.previous_hook.clone();
            panic::set_hook(Box::new(move |info| previous(info)));
        }
    }
}

fn take_over() -> io::Result<()> {
    terminal::enable_raw_mode()?;
    // What is wider than its cells is cut off at the right end and does not go on in the row below.
    execute!(
        io::stdout(),
        terminal::EnterAlternateScreen,
        terminal::DisableLineWrap,
        EnableBracketedPaste,
        EnableFocusChange
    )
}

/// Twice does no harm. A terminal that is gone cannot be restored.
fn restore() {
    let _ = execute!(
        io::stdout(),
        DisableFocusChange,
        DisableBracketedPaste,
        terminal::EnableLineWrap,
        terminal::LeaveAlternateScreen,
        cursor::Show
    );
    let _ = terminal::disable_raw_mode();
    let _ = io::stdout().flush();
}

/// What the terminal says, read by a thread of its own until this is dropped.
pub(super) struct Keyboard {
    pub(super) events: mpsc::Receiver<io::Result<event::Event>>,
    stop: Arc<AtomicBool>,
}

impl Keyboard {
    pub(super) fn listen() -> io::Result<Self> {
        let (sender, events) = mpsc::channel(KEYS_MAX);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        thread::Builder::new().name("keyboard".to_owned()).spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let read = match event::poll(LOOK_INTERVAL) {
                    Ok(false) => continue,
                    Ok(true) => event::read(),
                    Err(error) => Err(error),
                };
                let failed = read.is_err();
                if sender.blocking_send(read).is_err() || failed {
                    return;
                }
            }
        })?;
        Ok(Self { events, stop })
    }
}

impl Drop for Keyboard {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn a_terminal_that_is_taken_half_is_given_back() {
        static GIVEN_BACK: AtomicUsize = AtomicUsize::new(0);
        fn give_back() {
            GIVEN_BACK.fetch_add(1, Ordering::SeqCst);
        }
        assert!(Taken::with(give_back, || Err::<(), _>(io::Error::other("half way"))).is_err());
        assert_eq!(GIVEN_BACK.load(Ordering::SeqCst), 1);
        let (taken, ()) = Taken::with(give_back, || Ok(())).unwrap();
        assert_eq!(GIVEN_BACK.load(Ordering::SeqCst), 1, "not before the end");
        drop(taken);
        assert_eq!(GIVEN_BACK.load(Ordering::SeqCst), 2);
    }
}
