//! An image over a Unix socket that keeps messages apart (`SOCK_SEQPACKET`).
//!
//! | message | bytes | descriptors |
//! |---|---|---|
//! | 1 | `CLADEIMG`, version, number of descriptors (u32 each, little-endian) | a sealed memory file with the image's bytes |
//! | 2.. | one byte | up to [`BATCH`] |
//!
//! The bytes go as a file because a message is as long as the socket's buffer at most, and sealed
//! so that they cannot change while they are read.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::parts::{MAX_BYTES, MAX_FILES};
use super::{ImageParts, TransferError};

const MAGIC: [u8; 8] = *b"CLADEIMG";
const VERSION: u32 = 1;
const HELLO: usize = 16;
/// Descriptors of a message. The kernel takes 253 at most.
const BATCH: usize = 128;
/// What may not happen to the bytes any more.
const SEALED: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

impl ImageParts {
    /// Sends them over `socket`, of type `SOCK_SEQPACKET`. It may block until the other side reads.
    ///
    /// # Errors
    /// When the other side has gone, or there is no memory for the bytes.
    pub fn send(&self, socket: impl AsFd) -> Result<(), TransferError> {
        let failed = TransferError::system("sent");
        let bytes = sealed(&self.bytes).map_err(&failed)?;
        let mut hello = Vec::with_capacity(HELLO);
        hello.extend_from_slice(&MAGIC);
        hello.extend_from_slice(&VERSION.to_le_bytes());
        hello.extend_from_slice(&(self.files.len() as u32).to_le_bytes());
        send(&socket, &hello, &[bytes]).map_err(&failed)?;
        self.files.chunks(BATCH).try_for_each(|batch| send(&socket, &[0], batch)).map_err(&failed)
    }

    /// Receives what another process sent.
    ///
    /// # Errors
    /// When the other side has gone, is of another version, or sends something else.
    pub fn receive(socket: impl AsFd) -> Result<Self, TransferError> {
        let (hello, mut first) = receive(&socket)?;
        let number = |at: usize| hello[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        if hello.len() != HELLO || hello[..8] != MAGIC {
            return Err(TransferError::malformed(format!("it begins with {} other bytes", hello.len())));
        }
        if number(8) != VERSION {
            return Err(TransferError::Version { found: number(8), wanted: VERSION });
        }
        let count = number(12) as usize;
        if count > MAX_FILES {
            return Err(TransferError::TooLarge { what: "descriptors", found: count as u64, most: MAX_FILES as u64 });
        }
        let (Some(bytes), true) = (first.pop(), first.is_empty()) else {
            return Err(TransferError::malformed("it begins without its bytes"));
        };
        let bytes = unsealed(&File::from(bytes))?;
        let mut files = Vec::new();
        while files.len() < count {
            let (_, batch) = receive(&socket)?;
            let wanted = (count - files.len()).min(BATCH);
            if batch.len() != wanted {
                return Err(TransferError::malformed(format!("{} descriptors of {wanted}", batch.len())));
            }
            files.extend(batch);
        }
        Ok(Self { bytes, files })
    }
}

fn sealed(bytes: &[u8]) -> io::Result<OwnedFd> {
    let file = memfd_create("clade-image", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let file = File::from(file);
    file.write_all_at(bytes, 0)?;
    fcntl_add_seals(&file, SEALED | SealFlags::SEAL)?;
    Ok(file.into())
}

/// The bytes of a file that cannot change any more.
fn unsealed(file: &File) -> Result<Vec<u8>, TransferError> {
    let failed = TransferError::system("read");
    let seals = fcntl_get_seals(file).unwrap_or(SealFlags::empty());
    if !seals.contains(SEALED) {
        return Err(TransferError::malformed("its bytes can still change"));
    }
    let len = file.metadata().map_err(&failed)?.len();
    if len > MAX_BYTES as u64 {
        return Err(TransferError::TooLarge { what: "bytes", found: len, most: MAX_BYTES as u64 });
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).map_err(&failed)?;
    Ok(bytes)
}

fn send(socket: &impl AsFd, bytes: &[u8], files: &[OwnedFd]) -> io::Result<()> {
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    // It has room for a batch.
    let fits = files.is_empty() || control.push(SendAncillaryMessage::ScmRights(&files));
    debug_assert!(fits, "{} descriptors in a message", files.len());
    loop {
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn receive(socket: &impl AsFd) -> Result<(Vec<u8>, Vec<OwnedFd>), TransferError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; HELLO + 1];
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(error) => return Err(TransferError::system("received")(error.into())),
        }
    };
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            files.extend(descriptors);
        }
    }
    if received.bytes == 0 {
        return Err(TransferError::malformed("the other side has gone"));
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(TransferError::malformed(
            "a message is longer than it may be, or its descriptors are not to be had",
        ));
    }
    Ok((bytes[..received.bytes].to_vec(), files))
}
