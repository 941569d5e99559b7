//! Hand-made kernels for the tests of this module.

use std::io::Write;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::layout::GuestRamRanges;
use super::unpack::Codec;

/// `bytes` of guest memory from address 0.
pub(super) fn memory(bytes: u64) -> (GuestMemoryMmap<()>, GuestRamRanges) {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), usize::try_from(bytes).unwrap())]).unwrap();
    let ram = GuestRamRanges::of_memory(&mem).unwrap();
    (mem, ram)
}

/// `len` bytes of `mem` at `addr`.
pub(super) fn bytes_at(mem: &GuestMemoryMmap<()>, addr: GuestAddress, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    mem.read_slice(&mut out, addr).unwrap();
    out
}

/// The sum of the bytes of a firmware table, modulo 256.
pub(super) fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Builds a 64-bit x86 ELF file: header, program headers, notes, segments.
pub(super) struct ElfBuilder {
    entry: u64,
    notes: Vec<u8>,
    segments: Vec<(u64, Vec<u8>, u64)>,
}

impl ElfBuilder {
    pub(super) fn new(entry: u64) -> Self {
        Self { entry, notes: Vec::new(), segments: Vec::new() }
    }

    pub(super) fn note(mut self, name: &[u8], kind: u32, desc: &[u8]) -> Self {
        for field in [name.len() as u32, desc.len() as u32, kind] {
            self.notes.extend(field.to_le_bytes());
        }
        for part in [name, desc] {
            self.notes.extend(part);
            self.notes.resize(self.notes.len().next_multiple_of(4), 0);
        }
        self
    }

    pub(super) fn pvh(self, entry: u32) -> Self {
        self.note(b"Xen\0", 18, &entry.to_le_bytes())
    }

    pub(super) fn segment(mut self, addr: u64, bytes: &[u8], mem_len: u64) -> Self {
        self.segments.push((addr, bytes.to_vec(), mem_len));
        self
    }

    pub(super) fn build(self) -> Vec<u8> {
        let mut blobs = Vec::new();
        if !self.notes.is_empty() {
            blobs.push((4_u32, 0, self.notes.clone(), self.notes.len() as u64));
        }
        blobs.extend(self.segments.into_iter().map(|(addr, bytes, mem)| (1, addr, bytes, mem)));

        let mut out = vec![0; 64];
        out[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        out[16..20].copy_from_slice(&[2, 0, 62, 0]);
        out[24..32].copy_from_slice(&self.entry.to_le_bytes());
        out[32] = 64;
        out[54] = 56;
        out[56] = blobs.len() as u8;
        let mut offset = (64 + 56 * blobs.len()) as u64;
        for (kind, addr, bytes, mem_len) in &blobs {
            out.extend(kind.to_le_bytes());
            out.extend(7_u32.to_le_bytes());
            for field in [offset, *addr, *addr, bytes.len() as u64, *mem_len, 4] {
                out.extend(field.to_le_bytes());
            }
            offset += bytes.len() as u64;
        }
        out.extend(blobs.into_iter().flat_map(|(_, _, bytes, _)| bytes));
        out
    }
}

/// Compresses as the kernel's build does, with the unpacked size appended to every format but gzip.
pub(super) fn compress(codec: Codec, data: &[u8]) -> Vec<u8> {
    let mut out = match codec {
        Codec::Gzip => {
            let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            gz.write_all(data).unwrap();
            return gz.finish().unwrap();
        }
        Codec::Lz4 => {
            let mut out = 0x184c_2102_u32.to_le_bytes().to_vec();
            for chunk in data.chunks(8 << 20) {
                let block = lz4_flex::block::compress(chunk);
                out.extend((block.len() as u32).to_le_bytes());
                out.extend(block);
            }
            out
        }
        Codec::Zstd => zstd::stream::encode_all(data, 3).unwrap(),
        Codec::Xz => {
            let mut filters = liblzma::stream::Filters::new();
            filters.x86();
            filters.lzma2(&liblzma::stream::LzmaOptions::new_preset(6).unwrap());
            let stream = liblzma::stream::Stream::new_stream_encoder(&filters, liblzma::stream::Check::Crc32).unwrap();
            let mut xz = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
            xz.write_all(data).unwrap();
            xz.finish().unwrap()
        }
        Codec::Lzma => {
            let options = liblzma::stream::LzmaOptions::new_preset(6).unwrap();
            let stream = liblzma::stream::Stream::new_lzma_encoder(&options).unwrap();
            let mut lzma = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
            lzma.write_all(data).unwrap();
            lzma.finish().unwrap()
        }
        Codec::Bzip2 => {
            let mut bz = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
            bz.write_all(data).unwrap();
            bz.finish().unwrap()
        }
        Codec::Lzo => b"\x89LZO\x00\x0d\x0a\x1a\x0a".to_vec(),
    };
    out.extend((data.len() as u32).to_le_bytes());
    out
}

/// A bzImage of protocol 2.15 around `payload`, with three setup sectors.
pub(super) fn bzimage(payload: &[u8]) -> Vec<u8> {
    const SETUP_SECTS: usize = 3;
    const PAYLOAD_OFFSET: u32 = 0x2c0;
    let mut out = vec![0; (SETUP_SECTS + 1) * 512 + PAYLOAD_OFFSET as usize];
    out[0x1f1] = SETUP_SECTS as u8;
    out[0x1fe..0x202].copy_from_slice(&[0x55, 0xaa, 0xeb, 0x6a]);
    out[0x202..0x206].copy_from_slice(b"HdrS");
    out[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    out[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    out[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes());
    out[0x248..0x24c].copy_from_slice(&PAYLOAD_OFFSET.to_le_bytes());
    out[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend(payload);
    out
}
