//! Packets over a stream that is cut anywhere, with invalid lengths: input and output match the
//! model, a queue of bytes.
#![no_main]

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use clade_host_io::{AlignedBuf, Fragment, PacketStream, VNET_HEADER};
use libfuzzer_sys::{arbitrary, fuzz_target};
use vm_memory::Bytes;

const LENGTH: usize = 4;
const MIN: usize = 14;
const MAX: usize = MIN + 65_536;
/// Contents of buffers before a receive.
const BEFORE: u8 = 0x55;

#[derive(arbitrary::Arbitrary, Debug)]
enum Step {
    /// The program writes a packet, and arbitrary bytes.
    Packet(Length, u8),
    Bytes(Vec<u8>),
    /// Only a length.
    Lie(u32),
    /// As many bytes arrive.
    Deliver(u16),
    Shut,
    Receive(u16, u8),
    /// Receive with room for the largest packet.
    ReceiveAll,
    Discard,
    Send(Length, u8, u8),
    Flush,
    /// The program reads as many bytes.
    Read(u16),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Length {
    Usual(u16),
    Edge(u8),
    Large(u16),
}

impl Length {
    fn get(&self) -> usize {
        match self {
            Self::Usual(len) => usize::from(len % 2000),
            Self::Edge(n) => [0, 13, 14, 15, MAX - 1, MAX, MAX + 1, 4096][usize::from(n % 8)],
            Self::Large(len) => usize::from(*len),
        }
    }
}

fn is_packet(len: usize) -> bool {
    (MIN..=MAX).contains(&len)
}

/// Splits memory of `bytes` into pieces of `size`.
fn pieces(bytes: &[u8], size: u8) -> Vec<Fragment> {
    if bytes.is_empty() {
        return Vec::new();
    }
    let whole = Arc::new(AlignedBuf::new(bytes.len()));
    whole.slice().write_slice(bytes, 0).expect("its own length");
    let size = usize::from(size).max(1 + bytes.len() / 64);
    let starts = (0..bytes.len()).step_by(size);
    starts.map(|at| Fragment::owned(&whole, at, size.min(bytes.len() - at)).expect("a part")).collect()
}

fn bytes_of(fragments: &[Fragment]) -> Vec<u8> {
    let mut all = Vec::new();
    for part in fragments {
        let mut bytes = vec![0; part.len()];
        part.slice().read_slice(&mut bytes, 0).expect("its own length");
        all.extend(bytes);
    }
    all
}

struct World {
    stream: PacketStream,
    program: UnixStream,
    /// Bytes that the program has written, and those that have arrived.
    written: VecDeque<u8>,
    come: VecDeque<u8>,
    is_shut: bool,
    ended: bool,
    /// Bytes that the stream has taken, and those that the program has read.
    taken: Vec<u8>,
    read: Vec<u8>,
}

/// The expected next packet.
enum Next {
    Packet(Vec<u8>),
    Nothing,
    End,
}

impl World {
    fn new() -> Self {
        let (ours, program) = UnixStream::pair().expect("sockets");
        program.set_nonblocking(true).expect("a socket");
        // As small as possible: packets are taken in part.
        rustix::net::sockopt::set_socket_send_buffer_size(&ours, 1).expect("a socket");
        let stream = PacketStream::new(ours.into());
        let (written, come) = (VecDeque::new(), VecDeque::new());
        Self { stream, program, written, come, is_shut: false, ended: false, taken: Vec::new(), read: Vec::new() }
    }

    fn deliver(&mut self, most: usize) {
        if self.is_shut || self.ended {
            return;
        }
        let most = most.min(self.written.len());
        match self.program.write(&self.written.make_contiguous()[..most]) {
            Ok(count) => self.come.extend(self.written.drain(..count)),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }

    /// Takes the next packet out of the model.
    fn next(&mut self) -> Next {
        if self.ended {
            return Next::End;
        }
        if self.come.len() >= LENGTH {
            let length: Vec<u8> = self.come.iter().copied().take(LENGTH).collect();
            let len = u32::from_be_bytes(length.try_into().expect("4 bytes")) as usize;
            if !is_packet(len) {
                self.ended = true;
                return Next::End;
            }
            if self.come.len() >= LENGTH + len {
                self.come.drain(..LENGTH);
                return Next::Packet(self.come.drain(..len).collect());
            }
        }
        self.ended = self.is_shut;
        if self.ended { Next::End } else { Next::Nothing }
    }

    fn receive(&mut self, room: usize, size: u8) {
        let buffers = pieces(&vec![BEFORE; room], size);
        let got = self.stream.receive(&buffers);
        let bytes = bytes_of(&buffers);
        match (self.next(), got) {
            (Next::Packet(packet), Ok(Some(len))) => {
                let whole = [&[0; VNET_HEADER][..], &packet].concat();
                assert_eq!(len, whole.len().min(room));
                assert_eq!(bytes[..len], whole[..len]);
                assert!(bytes[len..].iter().all(|byte| *byte == BEFORE), "more was written than was said");
            }
            (Next::Nothing, Ok(None)) | (Next::End, Err(_)) => {
                assert!(bytes.iter().all(|byte| *byte == BEFORE), "something was written");
            }
            (_, got) => panic!("it has received {got:?}"),
        }
        assert_eq!(self.stream.has_ended(), self.ended);
    }

    fn send(&mut self, len: usize, byte: u8, size: u8) {
        let packet: Vec<u8> = (0..len).map(|n| byte.wrapping_add((n % 251) as u8)).collect();
        // The header must not be sent: the program would see it.
        let whole = [&[0xee; VNET_HEADER][..], &packet].concat();
        match self.stream.send(&pieces(&whole, size)) {
            Ok(Some(sent)) => {
                assert!(is_packet(len), "{len} bytes are no packet");
                assert_eq!(sent, whole.len());
                self.taken.extend((len as u32).to_be_bytes());
                self.taken.extend(packet);
            }
            Ok(None) => {}
            Err(error) => assert!(error.kind() == ErrorKind::InvalidInput && !is_packet(len), "{error}"),
        }
    }

    /// Returns whether the program had bytes to read.
    fn read(&mut self, most: usize) -> bool {
        let mut bytes = vec![0; most];
        let count = match self.program.read(&mut bytes) {
            Ok(count) => count,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                0
            }
        };
        let at = self.read.len();
        self.read.extend(&bytes[..count]);
        assert_eq!(self.taken.get(at..at + count), Some(&bytes[..count]), "bytes that were not sent");
        count > 0
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Packet(len, byte) => {
                let len = len.get();
                self.written.extend((len as u32).to_be_bytes());
                self.written.extend((0..len).map(|n| byte.wrapping_add((n % 251) as u8)));
            }
            Step::Bytes(bytes) => self.written.extend(bytes),
            Step::Lie(len) => self.written.extend(len.to_be_bytes()),
            Step::Deliver(most) => self.deliver(usize::from(*most)),
            Step::Shut => {
                self.program.shutdown(Shutdown::Write).expect("a socket");
                self.is_shut = true;
            }
            Step::Receive(room, size) => self.receive(usize::from(*room) % 3000, *size),
            Step::ReceiveAll => self.receive(VNET_HEADER + MAX, 255),
            Step::Discard => {
                let got = self.stream.discard();
                match (self.next(), got) {
                    (Next::Packet(_), Ok(true)) | (Next::Nothing, Ok(false)) | (Next::End, Err(_)) => {}
                    (_, got) => panic!("it has dropped {got:?}"),
                }
            }
            Step::Send(len, byte, size) => self.send(len.get(), *byte, *size),
            Step::Flush => drop(self.stream.flush().expect("the program is there")),
            Step::Read(most) => drop(self.read(usize::from(*most).max(1))),
        }
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let mut world = World::new();
    for step in steps.iter().take(200) {
        world.step(step);
    }
    // All bytes taken arrive, to the last one.
    while !world.stream.flush().expect("the program is there") | world.read(1 << 20) {}
    assert!(world.read == world.taken, "{} bytes for {}", world.read.len(), world.taken.len());
    // And all bytes written, up to the end.
    while !world.ended && (!world.written.is_empty() || !world.come.is_empty()) {
        let left = (world.written.len(), world.come.len());
        world.deliver(usize::MAX);
        world.receive(VNET_HEADER + MAX, 255);
        if left == (world.written.len(), world.come.len()) {
            break;
        }
    }
});
