//! What is saved of an entropy device.

use serde::{Deserialize, Serialize};

/// Nothing: what it has to give is not to be saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}
