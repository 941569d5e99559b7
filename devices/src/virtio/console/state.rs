//! What is saved of a console.

use serde::{Deserialize, Serialize};

/// A console's state. What has been typed and not read goes with the parent: a child is not typed at by its parent's terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {}
