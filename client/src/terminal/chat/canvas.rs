//! From the cells that a terminal shows to those that it is to show: what differs is written.
//!
//! How many columns a cluster takes is the terminal's to say, and terminals do not agree: some add up the code points of a flag or of
//! a family, some have older tables. So nothing is concluded from where such a cluster should have ended: what follows is written to
//! its own column, and a row that has or had one is written anew if anything in it changes.

use std::io::{self, Write};

use ratatui::{
    backend::{Backend as _, ClearType as Region, CrosstermBackend},
    buffer::{Buffer, Cell, CellWidth as _},
    crossterm::{
        cursor, queue,
        terminal::{Clear, ClearType},
    },
    layout::Position,
};

pub(super) struct Canvas<W: Write> {
    backend: CrosstermBackend<W>,
    shown: Buffer,
}

impl<W: Write> Canvas<W> {
    /// Of a terminal of which nothing is known: the first [`Canvas::show`] clears it.
    pub(super) fn new(writer: W) -> Self {
        Self { backend: CrosstermBackend::new(writer), shown: Buffer::default() }
    }

    /// Whatever the terminal shows is gone.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        self.shown.reset();
        self.backend.clear_region(Region::All)
    }

    /// Writes what differs. Without a cursor it is hidden.
    pub(super) fn show(&mut self, next: Buffer, cursor: Option<Position>) -> io::Result<()> {
        if self.shown.area != next.area {
            self.shown = Buffer::empty(next.area);
            self.clear()?;
        }
        let anew: Vec<bool> = next.area.rows().map(|row| is_written_anew(&self.shown, &next, row.y)).collect();
        let differs = self.shown.diff_iter(&next).filter(|(_, y, _)| !anew[usize::from(*y)]);
        self.backend.draw(differs)?;
        for (y, _) in (0..).zip(anew).filter(|(_, anew)| *anew) {
            self.write_row(&next, y)?;
        }
        match cursor {
            Some(Position { x, y }) => queue!(self.backend, cursor::Show, cursor::MoveTo(x, y))?,
            None => queue!(self.backend, cursor::Hide)?,
        }
        self.shown = next;
        Write::flush(&mut self.backend)
    }

    fn write_row(&mut self, next: &Buffer, y: u16) -> io::Result<()> {
        // A cluster that is narrower than its cells leaves a gap.
        queue!(self.backend, cursor::MoveTo(0, y), Clear(ClearType::CurrentLine))?;
        let mut piece = Vec::new();
        let mut x = 0;
        while x < next.area.width {
            let cell = &next[(x, y)];
            piece.push((x, y, cell));
            if !is_one_column(cell) {
                // The next piece begins with the column in which it stands.
                self.backend.draw(piece.drain(..))?;
            }
            x += cell.cell_width().max(1);
        }
        self.backend.draw(piece.into_iter())
    }
}

/// Whether every terminal gives it one column.
fn is_one_column(cell: &Cell) -> bool {
    let mut code_points = cell.symbol().chars();
    code_points.next().is_some() && code_points.next().is_none() && cell.cell_width() == 1
}

fn is_written_anew(shown: &Buffer, next: &Buffer, y: u16) -> bool {
    let columns = usize::from(next.area.width);
    let row = usize::from(y) * columns..(usize::from(y) + 1) * columns;
    let (shown, next) = (&shown.content[row.clone()], &next.content[row]);
    shown != next && !shown.iter().chain(next).all(is_one_column)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ratatui::{layout::Rect, style::Style};

    use super::*;

    const COLUMNS: u16 = 40;
    const LINES: u16 = 3;

    fn cells(lines: &[&str]) -> Buffer {
        let mut buffer = Buffer::empty(Rect::new(0, 0, COLUMNS, LINES));
        for (y, line) in (0..LINES).zip(lines) {
            buffer.set_string(0, y, line, Style::new());
            // What stands at the right end, as the marks of messages do.
            buffer.set_string(COLUMNS - 1, y, "|", Style::new());
        }
        buffer
    }

    /// What a terminal shows that counts the width of each code point for itself, as many do.
    fn shown(frames: &[Buffer]) -> Vec<String> {
        let mut terminal = vt100::Parser::new(LINES, COLUMNS, 0);
        let mut bytes = Vec::new();
        let mut canvas = Canvas::new(&mut bytes);
        for frame in frames {
            canvas.show(frame.clone(), None).unwrap();
        }
        terminal.process(&bytes);
        terminal.screen().rows(0, COLUMNS).map(|row| row.trim_end().to_owned()).collect()
    }

    /// Families and flags are wider there than here, presentations of emoji narrower, and the Devanagari of old tables either.
    const CLUSTERS: [&str; 8] = ["a", " ", "你", "e\u{301}", "👩‍👩‍👧", "🇩🇪", "❤\u{fe0f}", "क्षि"];

    #[test]
    fn nothing_remains_of_clusters_that_the_terminal_counts_otherwise() {
        for cluster in CLUSTERS {
            let before = cells(&[&format!("{cluster}{cluster} before"), "", cluster]);
            let after = cells(&["b", "", "c"]);
            let plain = shown(std::slice::from_ref(&after));
            assert_eq!(shown(&[before, after]), plain, "{cluster:?}");
        }
    }

    #[test]
    fn what_stands_after_such_a_cluster_stands_in_its_column() {
        for cluster in CLUSTERS {
            let rows = shown(&[cells(&["", "old text that goes"]), cells(&["", cluster])]);
            assert_eq!(rows[1].chars().last(), Some('|'), "{cluster:?}");
            assert!(!rows[1].contains("text"), "{cluster:?}: {rows:?}");
        }
    }

    #[test]
    fn a_terminal_without_room_is_shown_nothing() {
        for (columns, lines) in [(0, 0), (0, 5), (5, 0), (1, 1)] {
            let mut canvas = Canvas::new(Vec::new());
            canvas.show(Buffer::empty(Rect::new(0, 0, columns, lines)), None).unwrap();
        }
    }

    proptest! {
        #[test]
        fn a_screen_is_what_it_is_whatever_was_on_it(
            frames in prop::collection::vec(prop::collection::vec(prop::collection::vec(0..8_usize, 0..6), 3), 1..6)
        ) {
            let frame = |lines: &Vec<Vec<usize>>| {
                let lines: Vec<String> =
                    lines.iter().map(|line| line.iter().map(|cluster| CLUSTERS[*cluster]).collect()).collect();
                cells(&lines.iter().map(String::as_str).collect::<Vec<_>>())
            };
            let frames: Vec<Buffer> = frames.iter().map(frame).collect();
            prop_assert_eq!(shown(&frames), shown(&frames[frames.len() - 1..]));
        }
    }
}
