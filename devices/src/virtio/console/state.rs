//! The saved state of a console.

use serde::{Deserialize, Serialize};

/// The saved state of a console. Input that the guest has not read stays with the parent: a child
/// has no part in its parent's terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {}
