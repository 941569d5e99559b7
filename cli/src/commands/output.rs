//! Output: tables for people, JSON for programs.

use std::io::{self, Write};

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{Cell, CellAlignment, ContentArrangement};
use serde::Serialize;

/// A table; the first column is text, the others are figures.
#[derive(Debug)]
pub struct Table(comfy_table::Table);

impl Table {
    pub fn new<'a>(header: impl IntoIterator<Item = &'a str>) -> Self {
        let mut table = comfy_table::Table::new();
        table.load_style(UTF8_BORDERS_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
        table.set_header(header);
        Self(table)
    }

    /// Adds a row: a label, then figures.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let align = |(column, text): (usize, String)| {
            Cell::new(printable(&text)).set_alignment(if column == 0 {
                CellAlignment::Left
            } else {
                CellAlignment::Right
            })
        };
        self.0.add_row(cells.into_iter().enumerate().map(align));
    }

    /// Adds a row of words.
    pub fn words(&mut self, cells: impl IntoIterator<Item = String>) {
        self.0.add_row(cells.into_iter().map(|text| Cell::new(printable(&text))));
    }

    pub fn print(&self) -> io::Result<()> {
        writeln!(io::stdout(), "{}", self.0)
    }
}

/// Text of images and guests for a terminal: its control characters are escaped, but for the ends of lines.
pub(super) fn printable(text: &str) -> String {
    let is_shown = |c: char| matches!(c, '\n' | '"' | '\'' | '\\');
    let escaped = |c: char| if is_shown(c) { c.to_string() } else { c.escape_debug().to_string() };
    text.chars().map(escaped).collect()
}

/// Writes to standard output, and flushes it: it may end within a line.
pub(super) fn print_bytes(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(bytes).and_then(|()| stdout.flush())
}

/// Prints one JSON value on standard output.
pub fn print_json(value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    writeln!(io::stdout(), "{text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_in_a_table_are_escaped() {
        let mut table = Table::new(["name", ""]);
        table.words(["a\u{1b}]0;b\u{7}\u{202e}".to_owned(), "é\n\"c\\\"".to_owned()]);
        table.row(["\u{9b}2J".to_owned(), "1".to_owned()]);
        let shown = table.0.to_string();
        for text in [r"a\u{1b}]0;b\u{7}\u{202e}", "é", r#""c\""#, r"\u{9b}2J"] {
            assert!(shown.contains(text), "{text}: {shown}");
        }
    }
}
