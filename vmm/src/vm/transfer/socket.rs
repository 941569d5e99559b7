//! An image over a Unix socket that preserves message boundaries (`SOCK_SEQPACKET`).
//!
//! | message | bytes | descriptors |
//! |---|---|---|
//! | 1 | `CLADEIMG`, version, descriptor count (u32 each, little-endian) | a sealed memory file |
//! | 2.. | one byte | up to [`BATCH`] |
//!
//! The image's bytes are in the file because the socket's buffer limits the length of a message.
//! The file is sealed so that they cannot change while they are read.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use clade_host_io::seqpacket::{self, MAX_DESCRIPTORS as BATCH, Message};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};

use super::parts::{MAX_BYTES, MAX_FILES};
use super::{ImageParts, TransferError};

const MAGIC: [u8; 8] = *b"CLADEIMG";
const VERSION: u32 = 1;
const HELLO: usize = 16;
/// Seals: the bytes can no longer change.
const SEALED: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

/// An image to be sent: [`ImageParts`] whose bytes are in a sealed memory file. The same parts can
/// be sent to any number of processes.
#[derive(Debug)]
pub struct SealedParts {
    bytes: OwnedFd,
    files: Vec<OwnedFd>,
}

impl SealedParts {
    /// Receives an image from another process, without reading it.
    ///
    /// # Errors
    /// When the other side has gone, has another version, or sends other data.
    pub fn receive(socket: impl AsFd) -> Result<Self, TransferError> {
        Self::receive_while(socket, &|| false)
    }

    /// The same, from a process that may be slow on purpose: after each timeout of the socket
    /// without data, `go_on` decides whether to wait on.
    ///
    /// # Errors
    /// As for [`Self::receive`].
    pub fn receive_while(socket: impl AsFd, go_on: &dyn Fn() -> bool) -> Result<Self, TransferError> {
        let hello = receive(&socket, HELLO + 1, go_on)?;
        Self::receive_after(hello, socket, go_on)
    }

    /// The same, from a process that may send a message of `limit` bytes at most in place of the image.
    /// Returns that message as the inner error.
    ///
    /// # Errors
    /// As for [`Self::receive`].
    pub fn receive_or_message(
        socket: impl AsFd,
        limit: usize,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Result<Self, Vec<u8>>, TransferError> {
        let first = receive(&socket, limit.max(HELLO + 1), go_on)?;
        if !first.bytes.starts_with(&MAGIC) {
            return Ok(Err(first.bytes));
        }
        Self::receive_after(first, socket, go_on).map(Ok)
    }

    fn receive_after(hello: Message, socket: impl AsFd, go_on: &dyn Fn() -> bool) -> Result<Self, TransferError> {
        let Message { bytes: hello, files: mut first } = hello;
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
        let mut files = Vec::new();
        while files.len() < count {
            let batch = receive(&socket, HELLO + 1, go_on)?.files;
            let wanted = (count - files.len()).min(BATCH);
            if batch.len() != wanted {
                return Err(TransferError::malformed(format!("{} descriptors of {wanted}", batch.len())));
            }
            files.extend(batch);
        }
        Ok(Self { bytes, files })
    }

    /// Sends the image over `socket`, of type `SOCK_SEQPACKET`. May block until the other side
    /// reads.
    ///
    /// # Errors
    /// When the other side has gone.
    pub fn send(&self, socket: impl AsFd) -> Result<(), TransferError> {
        let failed = TransferError::system("sent");
        let mut hello = Vec::with_capacity(HELLO);
        hello.extend_from_slice(&MAGIC);
        hello.extend_from_slice(&VERSION.to_le_bytes());
        hello.extend_from_slice(&(self.files.len() as u32).to_le_bytes());
        seqpacket::send(&socket, &hello, &[self.bytes.as_fd()]).map_err(&failed)?;
        for batch in self.files.chunks(BATCH) {
            let batch: Vec<_> = batch.iter().map(AsFd::as_fd).collect();
            seqpacket::send(&socket, &[0], &batch).map_err(&failed)?;
        }
        Ok(())
    }

    /// Number of descriptors, including that of the bytes.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        self.files.len() + 1
    }

    pub(super) fn files(&self) -> &[OwnedFd] {
        &self.files
    }

    /// Reads the bytes.
    ///
    /// # Errors
    /// When they can still change, or are too many.
    pub fn open(self) -> Result<ImageParts, TransferError> {
        Ok(ImageParts { bytes: unsealed(&File::from(self.bytes))?, files: self.files })
    }
}

impl ImageParts {
    /// Any bytes and descriptors, to be sent as an image is.
    #[must_use]
    pub fn from_raw(bytes: Vec<u8>, files: Vec<OwnedFd>) -> Self {
        Self { bytes, files }
    }

    /// The bytes and the descriptors.
    #[must_use]
    pub fn into_raw(self) -> (Vec<u8>, Vec<OwnedFd>) {
        (self.bytes, self.files)
    }

    /// The same in sealed form, for sending.
    ///
    /// # Errors
    /// When there is no memory for the bytes.
    pub fn seal(self) -> Result<SealedParts, TransferError> {
        let bytes = sealed(&self.bytes).map_err(TransferError::system("sent"))?;
        Ok(SealedParts { bytes, files: self.files })
    }
}

fn receive(socket: impl AsFd, limit: usize, go_on: &dyn Fn() -> bool) -> Result<Message, TransferError> {
    let received = loop {
        match seqpacket::receive(&socket, limit) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && go_on() => {}
            received => break received,
        }
    };
    received.map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => TransferError::malformed(error.to_string()),
        _ => TransferError::system("received")(error),
    })
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
