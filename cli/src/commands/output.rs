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
            Cell::new(text).set_alignment(if column == 0 { CellAlignment::Left } else { CellAlignment::Right })
        };
        self.0.add_row(cells.into_iter().enumerate().map(align));
    }

    /// Adds a row of words.
    pub fn words(&mut self, cells: impl IntoIterator<Item = String>) {
        self.0.add_row(cells.into_iter().map(Cell::new));
    }

    pub fn print(&self) -> io::Result<()> {
        writeln!(io::stdout(), "{}", self.0)
    }
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
