//! Any archives, as layers on each other: each is refused, or becomes part of a file system.
#![no_main]

use std::fs::File;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};

/// The parts of an archive.
#[derive(Arbitrary, Debug)]
enum Piece<'a> {
    /// A header with a right checksum, and its content.
    Entry { kind: u8, name: Name<'a>, link: Name<'a>, mode: u16, device: [u8; 4], content: &'a [u8] },
    /// Records of pax, with right lengths.
    Pax(Vec<(Key, &'a [u8])>),
    /// Entries with names that are likely to collide.
    Link { name: Short, target: Short, kind: bool },
    /// Any bytes.
    Raw(&'a [u8]),
}

#[derive(Arbitrary, Debug)]
enum Name<'a> {
    Any(&'a [u8]),
    Short(Short),
    Hidden(Short),
    Opaque(Short),
}

#[derive(Arbitrary, Debug)]
struct Short([u8; 3]);

#[derive(Arbitrary, Debug)]
enum Key {
    Path,
    Link,
    Size,
    Uid,
    Mtime,
    User,
    Capability,
}

impl Short {
    fn text(&self) -> String {
        let part = |byte: &u8| ["a", "b", "c", ".", "..", "/"][usize::from(*byte) % 6];
        self.0.iter().map(part).collect::<Vec<_>>().join("/")
    }
}

impl Name<'_> {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Any(bytes) => bytes.to_vec(),
            Self::Short(short) => short.text().into(),
            Self::Hidden(short) => format!("{}/.wh.a", short.text()).into(),
            Self::Opaque(short) => format!("{}/.wh..wh..opq", short.text()).into(),
        }
    }
}

fn entry(kind: u8, name: &[u8], link: &[u8], mode: u16, device: [u8; 4], content: &[u8]) -> Vec<u8> {
    let mut block = vec![0; 512];
    let mut put = |at: usize, bytes: &[u8], most: usize| {
        let length = bytes.len().min(most);
        block[at..at + length].copy_from_slice(&bytes[..length]);
    };
    put(0, name, 100);
    put(100, format!("{mode:07o}").as_bytes(), 8);
    put(124, format!("{:011o}", content.len()).as_bytes(), 12);
    put(156, &[kind], 1);
    put(157, link, 100);
    put(257, b"ustar\x0000", 8);
    put(329, format!("{:07o}", u16::from_le_bytes([device[0], device[1]])).as_bytes(), 8);
    put(337, format!("{:07o}", u16::from_le_bytes([device[2], device[3]])).as_bytes(), 8);
    put(148, b"        ", 8);
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block.extend(content);
    block.resize(block.len().next_multiple_of(512), 0);
    block
}

impl Piece<'_> {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Entry { kind, name, link, mode, device, content } => {
                let kind = *b"0123456xgLK".get(usize::from(*kind)).unwrap_or(kind);
                entry(kind, &name.bytes(), &link.bytes(), *mode, *device, content)
            }
            Self::Pax(records) => {
                let mut all = Vec::new();
                for (key, value) in records {
                    let key: &[u8] = match key {
                        Key::Path => b"path",
                        Key::Link => b"linkpath",
                        Key::Size => b"size",
                        Key::Uid => b"uid",
                        Key::Mtime => b"mtime",
                        Key::User => b"SCHILY.xattr.user.a",
                        Key::Capability => b"SCHILY.xattr.security.capability",
                    };
                    let rest = 3 + key.len() + value.len();
                    let length = rest + (rest + rest.to_string().len()).to_string().len();
                    all.extend([length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat());
                }
                entry(b'x', b"x", b"", 0, [0; 4], &all)
            }
            Self::Link { name, target, kind } => {
                let kind = if *kind { b'1' } else { b'2' };
                entry(kind, name.text().as_bytes(), target.text().as_bytes(), 0o777, [0; 4], b"")
            }
            Self::Raw(bytes) => bytes.to_vec(),
        }
    }
}

fn file() -> File {
    File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file in memory"))
}

fuzz_target!(|archives: Vec<Vec<Piece<'_>>>| {
    let archives: Vec<Vec<u8>> =
        archives.iter().take(4).map(|pieces| pieces.iter().flat_map(Piece::bytes).collect()).collect();
    let archives: Vec<&[u8]> = archives.iter().map(Vec::as_slice).collect();
    let disk = file();
    if let Ok(bytes) = clade_oci::fuzzing::unpack(&archives, file(), &disk) {
        assert_eq!(disk.metadata().expect("its length").len(), bytes);
    }
});
