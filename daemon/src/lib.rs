//! VMs by name, with control sockets (HTTP) and console sockets.
//!
//! | to learn about | read |
//! |---|---|
//! | the VMs of a process | [`fleet`] |
//! | the HTTP API and its client | [`control`] |
//! | consoles on sockets | [`console`] |
//! | VMs in processes of their own | [`worker`] |

#![deny(missing_docs)]

pub mod console;
pub mod control;
pub mod fleet;
pub mod worker;
