use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::AlignedBuf;

fn pair() -> (PacketStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (PacketStream::new(ours.into()), theirs)
}

/// A packet with its header, in pieces of `size` bytes.
fn pieces(packet: &[u8], size: usize) -> Vec<Fragment> {
    let whole = Arc::new(AlignedBuf::new(VNET_HEADER + packet.len()));
    // A header with content would be noticed if it were sent.
    whole.slice().write_slice(&[0xee; VNET_HEADER], 0).unwrap();
    whole.slice().write_slice(packet, VNET_HEADER).unwrap();
    let starts = (0..whole.len()).step_by(size);
    starts.map(|at| Fragment::owned(&whole, at, size.min(whole.len() - at)).unwrap()).collect()
}

fn framed(packet: &[u8]) -> Vec<u8> {
    [&(packet.len() as u32).to_be_bytes(), packet].concat()
}

fn bytes_of(fragments: &[Fragment]) -> Vec<u8> {
    let mut all = Vec::new();
    for part in fragments {
        let mut bytes = vec![0; part.len()];
        part.slice().read_slice(&mut bytes, 0).unwrap();
        all.extend(bytes);
    }
    all
}

fn received(stream: &mut PacketStream, room: usize) -> io::Result<Option<Vec<u8>>> {
    let buffers = pieces(&vec![0x55; room], 100);
    let got = stream.receive(&buffers)?;
    Ok(got.map(|len| bytes_of(&buffers)[..len].to_vec()))
}

#[test]
fn a_packet_is_sent_behind_its_length_and_without_its_header() {
    let (mut stream, mut theirs) = pair();
    for size in [1, 5, 12, 13, 4096] {
        let packet: Vec<u8> = (0..200).collect();
        assert_eq!(stream.send(&pieces(&packet, size)).unwrap(), Some(VNET_HEADER + 200));
        let mut got = vec![0; 204];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(got, framed(&packet), "in pieces of {size}");
    }
    for len in [0, 13, MAX_FRAME + 1] {
        assert_eq!(stream.send(&pieces(&vec![0; len], 4096)).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    assert!(stream.flush().unwrap());
}

#[test]
fn what_the_socket_does_not_take_at_once_comes_in_order_and_whole() {
    let (mut stream, mut theirs) = pair();
    let packet = |number: u8| vec![number; MAX_FRAME - usize::from(number)];
    let (mut given, mut taken, mut expected) = (0, Vec::<u8>::new(), Vec::<u8>::new());
    let mut refused = 0;
    while given < 40 {
        match stream.send(&pieces(&packet(given), 4096)).unwrap() {
            Some(_) => {
                expected.extend(framed(&packet(given)));
                given += 1;
            }
            None => {
                refused += 1;
                // A little: the rest of a packet, or a part of it.
                let mut some = vec![0; 10_000];
                let got = theirs.read(&mut some).unwrap();
                taken.extend(&some[..got]);
            }
        }
    }
    assert!(refused > 10, "the socket took all at once");
    while taken.len() < expected.len() {
        stream.flush().unwrap();
        let mut some = vec![0; 1 << 20];
        let got = theirs.read(&mut some).unwrap();
        taken.extend(&some[..got]);
    }
    assert!(taken == expected, "{} bytes for {}", taken.len(), expected.len());
    assert!(stream.flush().unwrap());
}

#[test]
fn a_packet_that_does_not_fit_is_cut_off_and_the_next_is_whole() {
    let (mut stream, mut theirs) = pair();
    let (long, next): (Vec<u8>, Vec<u8>) = ((0..250).collect(), vec![9; 60]);
    theirs.write_all(&[framed(&long), framed(&next), framed(&long)].concat()).unwrap();
    let got = received(&mut stream, 100).unwrap().unwrap();
    assert_eq!((&got[..VNET_HEADER], &got[VNET_HEADER..]), (&[0; VNET_HEADER][..], &long[..100]));
    assert_eq!(received(&mut stream, 60).unwrap().unwrap()[VNET_HEADER..], next);
    assert!(stream.discard().unwrap());
    assert!(!stream.discard().unwrap() && received(&mut stream, 60).unwrap().is_none());
}

#[test]
fn a_length_that_no_packet_has_ends_the_stream() {
    for len in [0, 13, MAX_FRAME as u32 + 1, u32::MAX] {
        let (mut stream, mut theirs) = pair();
        theirs.write_all(&[&framed(&[7; 14])[..], &len.to_be_bytes(), &[1; 100]].concat()).unwrap();
        assert_eq!(received(&mut stream, 60).unwrap().unwrap().len(), VNET_HEADER + 14);
        for _ in 0..2 {
            assert_eq!(received(&mut stream, 60).unwrap_err().kind(), io::ErrorKind::InvalidData, "{len}");
        }
        // Later bytes are not taken for a packet either.
        theirs.write_all(&framed(&[8; 20])).unwrap();
        stream.discard().unwrap_err();
    }
}

#[test]
fn an_end_is_said_after_the_last_packet() {
    let (mut stream, mut theirs) = pair();
    theirs.write_all(&[&framed(&[7; 20])[..], &[0, 0, 0]].concat()).unwrap();
    drop(theirs);
    assert!(received(&mut stream, 60).unwrap().is_some());
    for _ in 0..2 {
        assert_eq!(received(&mut stream, 60).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
    // Not by a signal.
    assert_eq!(stream.send(&pieces(&[1; 60], 100)).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    assert!(stream.flush().unwrap(), "nothing is left");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// However the stream is cut, the packets are those that were sent.
    #[test]
    fn packets_come_as_they_were_sent_however_the_stream_is_cut(
        packets in prop::collection::vec((14usize..3000, any::<u8>()), 1..20),
        cuts in prop::collection::vec(1usize..2000, 1..40),
        room in 60usize..4000,
    ) {
        let (mut stream, mut theirs) = pair();
        let packets: Vec<Vec<u8>> = packets.into_iter().map(|(len, byte)| vec![byte; len]).collect();
        let all: Vec<u8> = packets.iter().flat_map(|packet| framed(packet)).collect();
        let mut got = Vec::new();
        let mut rest = all.as_slice();
        for cut in cuts.iter().cycle() {
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            theirs.write_all(now).unwrap();
            rest = later;
            while let Some(packet) = received(&mut stream, room).unwrap() {
                got.push(packet[VNET_HEADER..].to_vec());
            }
            if rest.is_empty() {
                break;
            }
        }
        let expected: Vec<Vec<u8>> = packets.iter().map(|packet| packet[..packet.len().min(room)].to_vec()).collect();
        prop_assert_eq!(got, expected);
    }
}

/// The other end would take the bytes of the next packet for the rest of this one.
#[test]
fn a_packet_that_is_sent_in_part_is_sent_whole_or_is_the_last() {
    let (mut stream, mut theirs) = pair();
    let packet = framed(&[7; 60]);
    (stream.sent, stream.unsent) = (10, packet.clone());
    // The system has no memory for now.
    for error in [Errno::NOBUFS, Errno::NOMEM, Errno::AGAIN] {
        assert!(!stream.not_sent(error).unwrap());
    }
    assert!(stream.flush().unwrap());
    let mut got = vec![0; packet.len() - 10];
    theirs.read_exact(&mut got).unwrap();
    assert_eq!(got, packet[10..]);
    // None of it was sent: the next one may be.
    (stream.sent, stream.unsent) = (0, packet.clone());
    assert!(stream.not_sent(Errno::ACCESS).is_err() && !stream.has_ended());
    assert!(stream.send(&pieces(&[1; 60], 4096)).unwrap().is_some());
    (stream.sent, stream.unsent) = (10, packet);
    assert!(stream.not_sent(Errno::ACCESS).is_err() && stream.has_ended());
    assert!(stream.send(&pieces(&[2; 60], 4096)).is_err());
    drop(stream);
    let mut rest = Vec::new();
    theirs.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, framed(&[1; 60]));
}
