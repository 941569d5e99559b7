//! Virtio devices, driven by a test in plain memory: no KVM, no guest.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod block;
mod driver;
mod hostile;
mod indirect;
mod transport;
