//! The saved state of an entropy device.

use serde::{Deserialize, Serialize};

/// The saved state of an entropy device: empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}
