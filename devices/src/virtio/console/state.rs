//! The saved state of a console.

use serde::{Deserialize, Serialize};

/// The saved state of a console. Unread input stays with the parent, because a child does not share
/// its parent's terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {}
