//! A bzImage: the setup header, and the compressed kernel as its payload.
//!
//! The image's decompressor, real-mode code and relocation table are not used. The payload is
//! unpacked on the host and runs at its link address.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

const HEADER: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const JUMP_LEN: usize = 0x201;
const MAGIC: usize = 0x202;
/// The first boot protocol with `payload_offset` and `payload_length`: 2.08 (Linux 2.6.26).
const PAYLOAD_PROTOCOL: u16 = 0x0208;
const SECTOR: usize = 512;

/// Why a bzImage could not be parsed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BzImageError {
    /// The boot protocol is too old.
    #[error("the bzImage speaks boot protocol {}.{:02}, at least 2.08 is needed", version >> 8, version & 0xff)]
    Protocol {
        /// The protocol's version.
        version: u16,
    },
    /// The payload lies outside the file.
    #[error("the bzImage is truncated: its payload of {len} bytes at {offset:#x} does not fit {file} bytes")]
    Truncated {
        /// The payload's offset in bytes.
        offset: u64,
        /// The payload's length in bytes.
        len: u32,
        /// The file's length in bytes.
        file: usize,
    },
    /// The payload is empty.
    #[error("the bzImage has an empty payload")]
    NoPayload,
}

/// A checked bzImage.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BzImage<'a> {
    header: setup_header,
    payload: &'a [u8],
}

/// Whether `bytes` have the magics of a bzImage.
pub(super) fn looks_like_bzimage(bytes: &[u8]) -> bool {
    bytes.get(BOOT_FLAG..BOOT_FLAG + 2) == Some(b"\x55\xaa") && bytes.get(MAGIC..MAGIC + 4) == Some(b"HdrS")
}

impl<'a> BzImage<'a> {
    /// Checks `bytes`, for which [`looks_like_bzimage`] is true, and finds the payload.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, BzImageError> {
        // The jump instruction skips the header, so its operand gives the header's end.
        let jump = bytes.get(JUMP_LEN).copied().unwrap_or(0);
        let mut header = setup_header::default();
        let known = header.as_mut_slice();
        let end = (MAGIC + usize::from(jump)).max(0x250).min(bytes.len());
        let found = bytes.get(HEADER..end).unwrap_or(&[]);
        let len = found.len().min(known.len());
        known[..len].copy_from_slice(&found[..len]);

        let version = header.version;
        if version < PAYLOAD_PROTOCOL {
            return Err(BzImageError::Protocol { version });
        }
        // 0 means 4, for backward compatibility.
        let sectors = if header.setup_sects == 0 { 4 } else { usize::from(header.setup_sects) };
        let offset = ((sectors + 1) * SECTOR) as u64 + u64::from(header.payload_offset);
        let len = header.payload_length;
        if len == 0 {
            return Err(BzImageError::NoPayload);
        }
        let payload = usize::try_from(offset)
            .ok()
            .and_then(|start| bytes.get(start..))
            .and_then(|rest| rest.get(..usize::try_from(len).ok()?))
            .ok_or(BzImageError::Truncated { offset, len, file: bytes.len() })?;
        Ok(Self { header, payload })
    }

    /// The compressed kernel.
    #[must_use]
    pub(crate) fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// The setup header, for the zero page.
    #[must_use]
    pub(super) fn header(&self) -> setup_header {
        self.header
    }
}

#[cfg(test)]
mod tests {
    use super::super::testutil::bzimage;
    use super::*;

    #[test]
    fn finds_header_and_payload() {
        let file = bzimage(b"payload");
        assert!(looks_like_bzimage(&file));
        let image = BzImage::parse(&file).unwrap();
        assert_eq!(image.payload(), b"payload");
        assert_eq!({ image.header().initrd_addr_max }, 0x7fff_ffff);
        assert_eq!({ image.header().cmdline_size }, 2047);
    }

    #[test]
    fn refusals_name_their_values() {
        let file = bzimage(b"payload");
        let cut = file.len() - 1;
        let error = BzImage::parse(&file[..cut]).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("the bzImage is truncated: its payload of 7 bytes at 0xac0 does not fit {cut} bytes")
        );
        let mut old = file.clone();
        old[0x206] = 7;
        assert_eq!(
            BzImage::parse(&old).unwrap_err().to_string(),
            "the bzImage speaks boot protocol 2.07, at least 2.08 is needed"
        );
        assert_eq!(BzImage::parse(&bzimage(b"")).unwrap_err(), BzImageError::NoPayload);
        assert!(!looks_like_bzimage(&file[..0x205]));
    }
}
