//! What a person is writing: a text and a cursor between two grapheme clusters.

use unicode_segmentation::UnicodeSegmentation as _;

use super::text;

/// Leaves room in a body of 64 KiB for what stands around the text. What would go beyond is not taken.
pub(super) const TEXT_BYTES_MAX: usize = 60_000;

/// Movements of the cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Move {
    Left,
    Right,
    WordLeft,
    WordRight,
    LineStart,
    LineEnd,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Editor {
    text: String,
    /// A byte offset between two clusters.
    cursor: usize,
}

/// The editor on a grid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EditorView {
    pub(super) lines: Vec<String>,
    /// Line and cell of the cursor.
    pub(super) cursor: (usize, usize),
}

impl Editor {
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// Takes the text out.
    pub(super) fn take(&mut self) -> String {
        self.cursor = 0;
        std::mem::take(&mut self.text)
    }

    /// Inserts at the cursor. False if it would be too long.
    pub(super) fn insert(&mut self, inserted: &str) -> bool {
        let inserted = text::clean(inserted);
        if self.text.len() + inserted.len() > TEXT_BYTES_MAX {
            return false;
        }
        self.text.insert_str(self.cursor, &inserted);
        self.cursor += inserted.len();
        // What was inserted may have joined a cluster with what follows.
        self.cursor = self.boundary_at_or_after(self.cursor);
        true
    }

    /// Adds lines below; the cursor goes to their end. False if it would be too long.
    pub(super) fn append(&mut self, lines: &str) -> bool {
        if lines.is_empty() {
            return true;
        }
        let between = if self.text.is_empty() { "" } else { "\n" };
        let cursor = std::mem::replace(&mut self.cursor, self.text.len());
        let fits = self.insert(&format!("{between}{lines}"));
        if !fits {
            self.cursor = cursor;
        }
        fits
    }

    pub(super) fn go(&mut self, to: Move) {
        self.cursor = self.place(to);
    }

    /// Deletes what lies between the cursor and where a movement leads.
    pub(super) fn delete(&mut self, to: Move) {
        let place = self.place(to);
        let (from, to) = (self.cursor.min(place), self.cursor.max(place));
        self.text.replace_range(from..to, "");
        self.cursor = self.boundary_at_or_after(from);
    }

    fn place(&self, to: Move) -> usize {
        let (before, after) = self.text.split_at(self.cursor);
        match to {
            Move::Left => before.grapheme_indices(true).next_back().map_or(0, |(at, _)| at),
            Move::Right => self.cursor + after.graphemes(true).next().map_or(0, str::len),
            Move::WordLeft => {
                let words = before.split_word_bound_indices();
                words.rev().find(|(_, word)| !word.trim().is_empty()).map_or(0, |(at, _)| at)
            }
            Move::WordRight => {
                let mut words = after.split_word_bound_indices().filter(|(_, word)| !word.trim().is_empty());
                words.next().map_or(self.text.len(), |(at, word)| self.cursor + at + word.len())
            }
            Move::LineStart => before.rfind('\n').map_or(0, |at| at + 1),
            Move::LineEnd => after.find('\n').map_or(self.text.len(), |at| self.cursor + at),
        }
    }

    fn boundary_at_or_after(&self, at: usize) -> usize {
        let mut places = self.text.grapheme_indices(true).map(|(place, _)| place);
        places.find(|place| *place >= at).unwrap_or(self.text.len())
    }

    /// Lines of at most `cells`, with a place for the cursor behind the last character.
    pub(super) fn view(&self, cells: usize) -> EditorView {
        let cells = cells.max(2);
        let mut lines = vec![String::new()];
        let mut used = 0;
        let mut cursor = (0, 0);
        for (at, cluster) in self.text.grapheme_indices(true) {
            let wide = if cluster == "\n" { 0 } else { text::cluster_width(cluster) };
            if used + wide > cells {
                lines.push(String::new());
                used = 0;
            }
            if at == self.cursor {
                cursor = (lines.len() - 1, used);
            }
            if cluster == "\n" {
                lines.push(String::new());
                used = 0;
            } else if let Some(line) = lines.last_mut() {
                line.push_str(cluster);
                used += wide;
            }
        }
        if self.cursor == self.text.len() {
            if used >= cells {
                lines.push(String::new());
                used = 0;
            }
            cursor = (lines.len() - 1, used);
        }
        EditorView { lines, cursor }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn editor(text: &str) -> Editor {
        let mut editor = Editor::default();
        assert!(editor.insert(text));
        editor
    }

    #[test]
    fn a_cluster_is_deleted_and_passed_as_a_whole() {
        let mut family = editor("a👩‍👩‍👧b");
        family.go(Move::Left);
        family.delete(Move::Left);
        assert_eq!(family.text(), "ab");
        family.go(Move::LineStart);
        family.delete(Move::Right);
        assert_eq!(family.text(), "b");
    }

    #[test]
    fn words_and_lines_are_moved_over_and_deleted() {
        let mut text = editor("one two\nthree four");
        text.delete(Move::WordLeft);
        assert_eq!(text.text(), "one two\nthree ");
        text.delete(Move::LineStart);
        assert_eq!(text.text(), "one two\n");
        text.go(Move::Left);
        text.go(Move::WordLeft);
        text.delete(Move::LineEnd);
        assert_eq!(text.text(), "one \n");
    }

    #[test]
    fn the_cursor_stands_where_the_next_character_will() {
        assert_eq!(editor("你好").view(10).cursor, (0, 4));
        let full = editor("abcd").view(4);
        assert_eq!((full.lines, full.cursor), (vec!["abcd".to_owned(), String::new()], (1, 0)));
        assert_eq!(editor("a\n").view(4).cursor, (1, 0));
        assert_eq!(editor("").view(4), EditorView { lines: vec![String::new()], cursor: (0, 0) });
    }

    #[test]
    fn what_is_too_long_is_not_taken() {
        let mut text = editor(&"x".repeat(TEXT_BYTES_MAX));
        assert!(!text.insert("y"));
        assert_eq!(text.text().len(), TEXT_BYTES_MAX);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(String),
        Go(Move),
        Delete(Move),
    }

    fn step() -> impl Strategy<Value = Step> {
        let moves = prop_oneof![
            Just(Move::Left),
            Just(Move::Right),
            Just(Move::WordLeft),
            Just(Move::WordRight),
            Just(Move::LineStart),
            Just(Move::LineEnd)
        ];
        prop_oneof![
            "(\\PC|\n|\u{301}|👩|\u{200d}){0,4}".prop_map(Step::Insert),
            moves.clone().prop_map(Step::Go),
            moves.prop_map(Step::Delete),
        ]
    }

    proptest! {
        #[test]
        fn the_cursor_is_always_between_two_clusters_and_on_the_grid(
            steps in proptest::collection::vec(step(), 0..30),
            cells in 2_usize..12,
        ) {
            let mut editor = Editor::default();
            for step in steps {
                match step {
                    Step::Insert(text) => prop_assert!(editor.insert(&text)),
                    Step::Go(to) => editor.go(to),
                    Step::Delete(to) => editor.delete(to),
                }
                let boundaries: Vec<usize> = editor.text.grapheme_indices(true).map(|(at, _)| at).collect();
                prop_assert!(editor.cursor == editor.text.len() || boundaries.contains(&editor.cursor));
                let view = editor.view(cells);
                prop_assert!(view.cursor.0 < view.lines.len() && view.cursor.1 <= cells);
                prop_assert_eq!(view.lines.concat(), editor.text.replace('\n', ""));
            }
        }
    }
}
