//! Asynchronous file I/O of Clade: an io_uring whose operations **own** everything the kernel works
//! on.
//!
//! A [`Request`] holds its file and its memory, as [`Fragment`]s: parts of
//! [`DmaPin`](clade_memory::DmaPin)s, or of [`AlignedBuf`]s. An [`Engine`] takes it by value. It
//! comes back in a [`Completion`] when the kernel has let go of it, and not before. So the
//! submitter cannot unpin, unmap or free memory under a transfer. An engine that is dropped cancels
//! what it can, and waits for the rest.
//!
//! | to learn about | read |
//! |---|---|
//! | memory of an operation | `buffer.rs` |
//! | files, and whether the page cache is used | `file.rs` |
//! | files by their directory's descriptor | `at.rs` |
//! | files that are used again | `overlay_pool.rs` |
//! | submitting, continuing, reaping | `engine.rs` |
//! | what a network device is connected to | `net_backend.rs`, `tap.rs`, `packet_stream.rs` |
//! | messages with descriptors to other processes | [`seqpacket`] |
//! | threads that serve a guest, to be restricted | [`thread`] |
//!
//! What it does not do: it does not know guests, disks or their formats, and it starts no threads.

#![deny(missing_docs)]

mod at;
mod buffer;
mod engine;
mod file;
#[cfg(feature = "gate")]
mod gate;
mod net_backend;
mod op;
mod overlay_pool;
mod packet_stream;
pub mod seqpacket;
mod tap;
pub mod thread;

pub use buffer::{AlignedBuf, BufferError, Fragment, total_len, window};
pub use engine::{Completion, Engine, EngineError, Stats};
pub use file::{CachePolicy, FileError, IoFile, OpenError};
#[cfg(feature = "gate")]
pub use gate::Gate;
pub use net_backend::NetBackend;
pub use op::{Failure, Request};
pub use overlay_pool::OverlayPool;
pub use packet_stream::PacketStream;
pub use tap::{Offload, Tap, TapError, VNET_HEADER};
