//! Commands of a network device's control queue.

use super::super::dma;
use crate::virtio::sync_device::{FatalError, QueueCtx};
use crate::virtio::{Chain, QueueError};

/// A command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ControlCommand {
    /// Use this many pairs of queues.
    Pairs(u16),
    /// The driver has announced the guest.
    Announced,
    /// Use this Ethernet address.
    Address([u8; 6]),
    /// Set a receive filter. Accepted and ignored: the driver gets every packet.
    Filter,
    /// An unknown command.
    Unknown,
}

/// Parses the chain's readable part: a class, a command, and its data.
pub(super) fn parse(io: &QueueCtx, chain: &Chain) -> Result<ControlCommand, FatalError> {
    if chain.readable.is_empty() || chain.writable.is_empty() || dma::len_of(&chain.readable) < 2 {
        let (head, what) = (chain.head, "is no command");
        return Err(QueueError::Content { head, what }.into());
    }
    let mut bytes = [0; 8];
    let len = (dma::len_of(&chain.readable) as usize).min(bytes.len());
    dma::copy_in(&io.ram, &chain.readable, &mut bytes[..len])?;
    let address = || {
        let mut address = [0; 6];
        address.copy_from_slice(&bytes[2..8]);
        ControlCommand::Address(address)
    };
    Ok(match (bytes[0], bytes[1], len) {
        (4, 0, 4..) => ControlCommand::Pairs(u16::from_le_bytes([bytes[2], bytes[3]])),
        (3, 0, _) => ControlCommand::Announced,
        (1, 1, 8) => address(),
        (0 | 2, _, _) | (1, 0, _) => ControlCommand::Filter,
        _ => ControlCommand::Unknown,
    })
}
