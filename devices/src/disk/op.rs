//! What a disk is asked for, and how that ended.

use clade_io::Fragment;

use super::DiskError;

/// A request to a disk. Offsets and lengths are in bytes, and multiples of a sector.
#[derive(Debug)]
pub enum DiskOp {
    /// Fill the buffers from `offset` on.
    Read {
        /// First byte.
        offset: u64,
        /// To where.
        buffers: Vec<Fragment>,
    },
    /// Write the buffers from `offset` on.
    Write {
        /// First byte.
        offset: u64,
        /// From where.
        buffers: Vec<Fragment>,
    },
    /// The range reads as zeros from now on.
    Zero {
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
        /// Whether its room may be given back.
        unmap: bool,
    },
    /// Nobody needs the range any more. What is no whole cluster may stay.
    Discard {
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Makes all writes that are done durable: in the image, or in the journal beside it once the disk has been forked. What a child writes, or a disk made
    /// of a snapshot's files, does not outlive the process, and nothing is done for it.
    Flush,
}

/// A request that is over.
#[derive(Debug)]
pub struct DiskDone {
    /// What it was submitted with.
    pub token: u64,
    /// How it ended.
    pub result: Result<(), DiskError>,
}

/// What has gone wrong with a disk on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskHealth {
    /// Requests that failed because the image's or the overlays' file system has no room.
    pub no_room: u64,
    /// Whether the system has failed to make something durable: all flushes fail from then on.
    pub lost: bool,
}
