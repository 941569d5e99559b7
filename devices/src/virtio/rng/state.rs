//! The saved state of an entropy device.

use serde::{Deserialize, Serialize};

/// An entropy device has nothing to save.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}
