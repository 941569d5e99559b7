//! Messages with descriptors over Unix sockets that keep messages apart (`SOCK_SEQPACKET`).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, sendmsg, socketpair,
};

/// Most descriptors of a message. The kernel takes 253.
pub const MAX_DESCRIPTORS: usize = 128;

/// A received message.
#[derive(Debug, Default)]
pub struct Message {
    /// Its bytes, one at least.
    pub bytes: Vec<u8>,
    /// Its descriptors, which are closed when a program is executed.
    pub files: Vec<OwnedFd>,
}

/// Two connected sockets, closed when a program is executed.
///
/// # Errors
/// When there are no descriptors to be had.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends a message of one byte or more and at most [`MAX_DESCRIPTORS`] descriptors. May block until
/// the other side reads.
///
/// # Errors
/// `BrokenPipe` when the other side has gone. `InvalidInput` for too many descriptors.
pub fn send(socket: impl AsFd, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fits = files.len() <= MAX_DESCRIPTORS;
    if !fits || !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        let error = format!("{} descriptors in a message, {MAX_DESCRIPTORS} at most", files.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
    }
    loop {
        match sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Most bytes of a message whose length is not asked for first.
const SHORT: usize = 64;

/// Receives a message of at most `most` bytes.
///
/// # Errors
/// `UnexpectedEof` when the other side has gone. `InvalidData` for a longer message, or one whose
/// descriptors this process has no room for: then they are closed.
pub fn receive(socket: impl AsFd, most: usize) -> io::Result<Message> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    // As long as the message: a buffer for the longest would be memory that is touched for nothing. A short one costs
    // less than the question.
    let mut bytes = vec![0; if most <= SHORT { most } else { length(&socket)?.min(most) }];
    let received = loop {
        match recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            files.extend(descriptors);
        }
    }
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        let error = "a message is longer than it may be, or its descriptors are not to be had";
        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
    }
    bytes.truncate(received.bytes);
    Ok(Message { bytes, files })
}

/// Waits for a message, and returns its length.
fn length(socket: impl AsFd) -> io::Result<usize> {
    let mut nothing: [u8; 0] = [];
    loop {
        match recv(&socket, &mut nothing, RecvFlags::PEEK | RecvFlags::TRUNC) {
            Ok((_, length)) => return Ok(length),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn bytes_and_descriptors_arrive_together() {
        let (ours, theirs) = pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        send(&ours, b"one", &[file.as_fd(); 3]).unwrap();
        send(&ours, b"two", &[]).unwrap();
        let message = receive(&theirs, 3).unwrap();
        assert_eq!((message.bytes.as_slice(), message.files.len()), (b"one".as_slice(), 3));
        for file in &message.files {
            let flags = rustix::io::fcntl_getfd(file).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
        assert_eq!(receive(&theirs, 8).unwrap().bytes, b"two");
        drop(ours);
        assert_eq!(receive(&theirs, 8).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(send(&theirs, b"x", &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn what_is_too_long_or_too_much_is_refused() {
        let (ours, theirs) = pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        send(&ours, b"longer", &[file.as_fd()]).unwrap();
        assert_eq!(receive(&theirs, 5).unwrap_err().kind(), io::ErrorKind::InvalidData);
        let many = vec![file.as_fd(); MAX_DESCRIPTORS + 1];
        assert_eq!(send(&ours, b"x", &many).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        send(&ours, b"x", &many[1..]).unwrap();
        assert_eq!(receive(&theirs, 1).unwrap().files.len(), MAX_DESCRIPTORS);
    }
}
