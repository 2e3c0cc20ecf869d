//! Text for a grid of cells: cleaned of what steers a terminal, measured and broken by grapheme clusters.
//!
//! Widths are those of `unicode-width`, as the renderer has them. Nothing here trusts what others wrote.

use unicode_segmentation::UnicodeSegmentation as _;
use unicode_width::UnicodeWidthStr as _;

/// Cells that a text takes.
pub(super) fn width(text: &str) -> usize {
    text.graphemes(true).map(cluster_width).sum()
}

/// Cells that a grapheme cluster takes.
pub(super) fn cluster_width(cluster: &str) -> usize {
    cluster.width()
}

/// The text without control characters and without marks that turn the direction of what follows; line ends stay, a tab becomes
/// spaces.
pub(super) fn clean(text: &str) -> String {
    let mut cleaned = String::with_capacity(text.len());
    let mut previous = ' ';
    for c in text.chars() {
        match c {
            '\n' if previous == '\r' => {}
            '\n' | '\r' => cleaned.push('\n'),
            '\t' => cleaned.push_str("    "),
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}' => {}
            c if c.is_control() => {}
            c => cleaned.push(c),
        }
        previous = c;
    }
    cleaned
}

/// On one line.
pub(super) fn one_line(text: &str) -> String {
    clean(text).replace('\n', " ")
}

/// At most `cells` wide; what is cut off shows as an ellipsis.
pub(super) fn cut(text: &str, cells: usize) -> String {
    if width(text) <= cells {
        return text.to_owned();
    }
    let mut kept = String::new();
    let mut used = 0;
    for cluster in text.graphemes(true) {
        let wide = cluster_width(cluster);
        if used + wide + 1 > cells {
            break;
        }
        used += wide;
        kept.push_str(cluster);
    }
    if cells > 0 {
        kept.push('…');
    }
    kept
}

/// Lines of at most `cells`, broken between words where there is a place, else between clusters. A cluster wider than a line stands
/// alone.
pub(super) fn wrap(text: &str, cells: usize) -> Vec<String> {
    let cells = cells.max(1);
    let mut lines = Vec::new();
    for paragraph in text.split('\n') {
        let mut line = String::new();
        let mut used = 0;
        for word in paragraph.split_word_bounds() {
            let wide = width(word);
            if used + wide <= cells {
                line.push_str(word);
                used += wide;
                continue;
            }
            if word.trim().is_empty() {
                // White space at a line's end is not carried over.
                lines.push(std::mem::take(&mut line));
                used = 0;
                continue;
            }
            if used > 0 {
                lines.push(std::mem::take(&mut line).trim_end().to_owned());
                used = 0;
            }
            for cluster in word.graphemes(true) {
                let wide = cluster_width(cluster);
                if used > 0 && used + wide > cells {
                    lines.push(std::mem::take(&mut line));
                    used = 0;
                }
                line.push_str(cluster);
                used += wide;
            }
        }
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_that_steers_a_terminal_stays() {
        assert_eq!(clean("a\x1b[2Jb\x07\tc\r\nd\u{202e}e\u{9b}f"), "a[2Jb    c\nd\u{65}f");
        assert_eq!(one_line("a\nb"), "a b");
    }

    #[test]
    fn wide_characters_and_clusters_count_as_they_show() {
        assert_eq!(width("abc"), 3);
        assert_eq!(width("你好"), 4);
        assert_eq!(width("e\u{301}"), 1);
        assert_eq!(width("👩‍👩‍👧"), 2);
        assert_eq!(cut("你好世界", 5), "你好…");
        assert_eq!(cut("你好", 4), "你好");
        assert_eq!(cut("abc", 0), "");
    }

    #[test]
    fn lines_break_between_words_and_long_words_between_clusters() {
        assert_eq!(wrap("the quick brown fox", 10), ["the quick", "brown fox"]);
        assert_eq!(wrap("你好世界", 5), ["你好", "世界"]);
        assert_eq!(wrap("abcdefgh", 3), ["abc", "def", "gh"]);
        assert_eq!(wrap("a\n\nb", 5), ["a", "", "b"]);
        assert_eq!(wrap("", 5), [""]);
    }

    proptest! {
        #[test]
        fn wrapped_lines_fit_and_lose_nothing_but_white_space(text in "\\PC{0,80}", cells in 2_usize..30) {
            let lines = wrap(&text, cells);
            for line in &lines {
                let clusters = line.graphemes(true).filter(|cluster| cluster_width(cluster) > 0).count();
                prop_assert!(width(line) <= cells || clusters == 1, "{line:?} in {cells}");
            }
            let solid = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
            prop_assert_eq!(solid(&lines.concat()), solid(&text));
        }

        #[test]
        fn a_cut_text_fits(text in "\\PC{0,40}", cells in 0_usize..20) {
            prop_assert!(width(&cut(&text, cells)) <= cells);
        }
    }
}
