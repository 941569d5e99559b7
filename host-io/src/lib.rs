//! Asynchronous file I/O of Clade: an io_uring whose operations **own** everything that the kernel
//! accesses.
//!
//! A [`Request`] holds its file and its memory, as [`Fragment`]s: parts of
//! [`DmaPin`](clade_memory::DmaPin)s, or of [`AlignedBuf`]s. An [`Engine`] takes the request by
//! value, and returns it in a [`Completion`] only after the kernel has finished with it. So the
//! submitter cannot unpin, unmap or free memory under a transfer. A dropped engine cancels
//! operations where possible, and waits for the rest.
//!
//! | topic | place |
//! |---|---|
//! | memory of an operation | `buffer.rs` |
//! | files, with and without the page cache | `file.rs`, `handles.rs` |
//! | files by their directory's descriptor | `at.rs` |
//! | writes that the system has lost | `lost_writes.rs` |
//! | reused files | `overlay_pool.rs` |
//! | submitting, continuing, reaping | `engine.rs` |
//! | eventfds for this process alone | `eventfd.rs` |
//! | backends of network devices | `net_backend.rs`, `tap.rs`, `packet_stream.rs` |
//! | taking interfaces up and down | [`link`] |
//! | messages with descriptors to other processes | [`seqpacket`] |
//! | a hook on threads that serve a guest, for sandboxing | [`thread`] |
//! | threads that run soon after they wake | [`sched`] |
//!
//! Limits: the crate does not know guests, disks or their formats, and it starts no threads.

#![deny(missing_docs)]

mod at;
mod buffer;
mod engine;
mod eventfd;
mod file;
#[cfg(feature = "gate")]
mod gate;
mod handles;
pub mod link;
mod listener;
mod lost_writes;
mod net_backend;
mod op;
mod overlay_pool;
mod packet_stream;
pub mod realtime;
pub mod sched;
pub mod seqpacket;
mod tap;
pub mod thread;

pub use at::UnnamedCopy;
pub use buffer::{AlignedBuf, BufferError, Fragment, total_len, window};
pub use engine::{Completion, Engine, EngineError, Stats};
pub use eventfd::eventfd;
pub use file::{FileError, IoFile, OpenError};
#[cfg(feature = "gate")]
pub use gate::Gate;
pub use handles::CachePolicy;
pub use listener::private_listener;
pub use net_backend::NetBackend;
pub use op::{OpError, Request};
pub use overlay_pool::OverlayPool;
pub use packet_stream::PacketStream;
pub use tap::{Offload, Tap, TapError, VNET_HEADER};
