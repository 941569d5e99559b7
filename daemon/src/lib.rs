//! VMs by name, with control sockets (HTTP) and console sockets.
//!
//! | topic | module |
//! |---|---|
//! | the VMs of a process | [`vm_host`] |
//! | the HTTP API and its client | [`control`] |
//! | consoles on sockets | [`console`] |
//! | processes with one VM each | [`worker`] |
//! | forking of workers | [`zygote`] |
//! | confinement of workers | [`jail`] |
//! | secrets that children are made without | [`secrets`] |
//! | checkpoints, forks and names for all processes of a directory | [`supervisor`] |

#![deny(missing_docs)]

pub mod ahead;
pub mod console;
pub mod control;
pub mod flight;
mod heap;
mod image;
pub mod jail;
mod rollback;
pub mod secrets;
mod signals;
pub mod supervisor;
mod suspend;
mod text;
pub mod vm_host;
pub mod worker;
pub mod zygote;
