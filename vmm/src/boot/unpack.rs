//! Decompressing a kernel on the host, up to a size limit.
//!
//! The kernel's build appends the unpacked size to every format but gzip, so each decoder reads one
//! stream and ignores the bytes after it.

use std::io::{self, Read};

/// The compression format of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// `CONFIG_KERNEL_GZIP`
    Gzip,
    /// `CONFIG_KERNEL_LZ4`: the legacy frame format
    Lz4,
    /// `CONFIG_KERNEL_ZSTD`
    Zstd,
    /// `CONFIG_KERNEL_XZ`, with the x86 filter
    Xz,
    /// `CONFIG_KERNEL_LZMA`
    Lzma,
    /// `CONFIG_KERNEL_BZIP2`
    Bzip2,
    /// `CONFIG_KERNEL_LZO`: recognised, not supported
    Lzo,
}

/// Why a payload could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// The format is unknown.
    #[error("the kernel's payload is in no known format: it starts with {found:02x?}")]
    UnknownFormat {
        /// The payload's first bytes.
        found: Vec<u8>,
    },
    /// The format is known, but not supported.
    #[error("the kernel is compressed with {codec}, which is not supported: recompress it, or pass its vmlinux")]
    Unsupported {
        /// The format.
        codec: Codec,
    },
    /// The unpacked payload is larger than the limit.
    #[error("the {codec} payload unpacks to more than {limit} bytes")]
    TooLarge {
        /// The format.
        codec: Codec,
        /// The limit in bytes.
        limit: usize,
    },
    /// The decoder reports an error.
    #[error("the {codec} payload of {len} bytes is damaged")]
    Corrupt {
        /// The format.
        codec: Codec,
        /// The payload's length in bytes.
        len: usize,
        /// The decoder's error.
        #[source]
        source: io::Error,
    },
}

/// Memory limit of an XZ or LZMA decoder's dictionary in bytes: four times that of the kernel's
/// build.
const LZMA_MEMORY: u64 = 256 << 20;
const LZ4_MAGIC: u32 = 0x184c_2102;
/// Largest unpacked size of a block in the legacy LZ4 frame.
const LZ4_BLOCK: usize = 8 << 20;

impl Codec {
    const MAGICS: [(Self, &'static [u8]); 7] = [
        (Self::Gzip, b"\x1f\x8b"),
        (Self::Lz4, b"\x02\x21\x4c\x18"),
        (Self::Zstd, b"\x28\xb5\x2f\xfd"),
        (Self::Xz, b"\xfd7zXZ\0"),
        (Self::Lzma, b"\x5d\0\0"),
        (Self::Bzip2, b"BZh"),
        (Self::Lzo, b"\x89LZO"),
    ];

    /// The format of `bytes`, by their magic.
    #[must_use]
    pub(crate) fn detect(bytes: &[u8]) -> Option<Self> {
        Self::MAGICS.iter().find(|(_, magic)| bytes.starts_with(magic)).map(|(codec, _)| *codec)
    }
}

impl std::fmt::Display for Codec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Bzip2 => "bzip2",
            Self::Lzo => "lzo",
        })
    }
}

/// Unpacks `payload` to at most `limit` bytes. Its magic selects the format.
pub(crate) fn unpack(payload: &[u8], limit: usize) -> Result<Vec<u8>, UnpackError> {
    let codec = Codec::detect(payload)
        .ok_or_else(|| UnpackError::UnknownFormat { found: payload.iter().take(6).copied().collect() })?;
    let unpacked = match codec {
        Codec::Gzip => read_bounded(flate2::bufread::GzDecoder::new(payload), limit),
        Codec::Lz4 => unpack_lz4(payload, limit),
        Codec::Zstd => {
            zstd::stream::read::Decoder::with_buffer(payload).and_then(|d| read_bounded(d.single_frame(), limit))
        }
        Codec::Xz => unpack_lzma(payload, liblzma::stream::Stream::new_stream_decoder(LZMA_MEMORY, 0), limit),
        Codec::Lzma => unpack_lzma(payload, liblzma::stream::Stream::new_lzma_decoder(LZMA_MEMORY), limit),
        Codec::Bzip2 => read_bounded(bzip2::bufread::BzDecoder::new(payload), limit),
        Codec::Lzo => return Err(UnpackError::Unsupported { codec }),
    };
    match unpacked {
        Ok(Some(bytes)) => Ok(bytes),
        Ok(None) => Err(UnpackError::TooLarge { codec, limit }),
        Err(source) => Err(UnpackError::Corrupt { codec, len: payload.len(), source }),
    }
}

/// All bytes of `reader`, or `None` if they are more than `limit`.
fn read_bounded(reader: impl Read, limit: usize) -> io::Result<Option<Vec<u8>>> {
    let mut out = Vec::new();
    reader.take((limit as u64).saturating_add(1)).read_to_end(&mut out)?;
    Ok((out.len() <= limit).then_some(out))
}

type LzmaStream = Result<liblzma::stream::Stream, liblzma::stream::Error>;

fn unpack_lzma(payload: &[u8], stream: LzmaStream, limit: usize) -> io::Result<Option<Vec<u8>>> {
    read_bounded(liblzma::bufread::XzDecoder::new_stream(payload, stream?), limit)
}

/// Unpacks the legacy frame: a magic, then blocks of (length, data) that each unpack to at most 8
/// MiB. A length without data after it is the appended size.
fn unpack_lz4(payload: &[u8], limit: usize) -> io::Result<Option<Vec<u8>>> {
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let mut out = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    let mut rest = &payload[4..];
    while let Some((len, after)) = rest.split_first_chunk::<4>() {
        let len = u32::from_le_bytes(*len);
        if after.is_empty() || len == 0 {
            break;
        }
        if len == LZ4_MAGIC {
            rest = after;
            continue;
        }
        let data = usize::try_from(len).ok().and_then(|len| after.split_at_checked(len));
        let Some((data, next)) = data else {
            return Err(invalid(format!("a block of {len} bytes is announced, {} are there", after.len())));
        };
        let size = lz4_flex::block::decompress_into(data, &mut block)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        if out.len() + size > limit {
            return Ok(None);
        }
        out.extend_from_slice(&block[..size]);
        rest = next;
    }
    Ok(Some(out))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testutil::compress;
    use super::*;

    const CODECS: [Codec; 6] = [Codec::Gzip, Codec::Lz4, Codec::Zstd, Codec::Xz, Codec::Lzma, Codec::Bzip2];

    fn sample(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i / 7 * 31 % 251) as u8).collect()
    }

    #[test]
    fn every_codec_round_trips_with_its_trailer() {
        let data = sample(300_000);
        for codec in CODECS {
            let packed = compress(codec, &data);
            assert_eq!(Codec::detect(&packed), Some(codec));
            assert!(unpack(&packed, data.len()).unwrap() == data, "{codec}");
        }
    }

    #[test]
    fn lz4_of_many_blocks_round_trips() {
        let data = sample((8 << 20) + 12_345);
        assert!(unpack(&compress(Codec::Lz4, &data), data.len()).unwrap() == data);
    }

    #[test]
    fn the_bound_is_exact_and_bombs_are_refused() {
        let data = vec![0; 1 << 20];
        for codec in CODECS {
            let packed = compress(codec, &data);
            assert!(unpack(&packed, data.len()).is_ok(), "{codec}");
            let error = unpack(&packed, data.len() - 1).unwrap_err().to_string();
            assert_eq!(error, format!("the {codec} payload unpacks to more than 1048575 bytes"));
        }
    }

    #[test]
    fn lzo_and_unknown_formats_are_named() {
        let error = unpack(&compress(Codec::Lzo, b""), 100).unwrap_err().to_string();
        assert_eq!(
            error,
            "the kernel is compressed with lzo, which is not supported: recompress it, or pass its vmlinux"
        );
        let error = unpack(b"MZ\x90\0abcdef", 100).unwrap_err().to_string();
        assert_eq!(error, "the kernel's payload is in no known format: it starts with [4d, 5a, 90, 00, 61, 62]");
        assert!(matches!(unpack(b"", 100), Err(UnpackError::UnknownFormat { .. })));
    }

    #[test]
    fn a_truncated_payload_is_damaged_not_short() {
        let data = sample(100_000);
        for codec in CODECS {
            let packed = compress(codec, &data);
            let half = unpack(&packed[..packed.len() / 2], data.len());
            assert!(matches!(half, Err(UnpackError::Corrupt { .. })), "{codec}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn damage_never_panics(codec in 0..CODECS.len(), cut in 0..2000_usize, flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)) {
            let mut packed = compress(CODECS[codec], &sample(5000));
            packed.truncate(cut.max(8));
            for (at, with) in flips {
                let at = at.index(packed.len());
                packed[at] ^= with;
            }
            if let Ok(out) = unpack(&packed, 10_000) {
                prop_assert!(out.len() <= 10_000);
            }
        }

        #[test]
        fn random_bytes_never_panic(codec in 0..CODECS.len(), tail in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = compress(CODECS[codec], b"")[..6].to_vec();
            bytes.extend(tail);
            let _ = unpack(&bytes, 10_000);
        }
    }
}
