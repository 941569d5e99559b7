//! Processes that clients start: their table, their start, and their output.

pub(crate) mod output;
pub(crate) mod spawn;
pub(crate) mod table;

pub(crate) use table::{Process, Table};
