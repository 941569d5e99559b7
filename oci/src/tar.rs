//! Tar archives, as far as layers use them: ustar, pax and GNU's long names. Every length is
//! checked before any data of that length is read.

use std::collections::BTreeMap;
use std::io::{self, Read};

use thiserror::Error;

use crate::limits::{LimitError, MAX_PATH, MAX_PAX};

const BLOCK: usize = 512;
/// Prefix of extended attributes in pax records.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// Why an archive is not read further.
#[derive(Debug, Error)]
pub enum TarError {
    /// The archive cannot be read.
    #[error("the archive cannot be read")]
    Read(#[source] io::Error),
    /// The archive exceeds a limit.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// The archive ends within an entry.
    #[error("the archive ends within {0}")]
    Truncated(String),
    /// A header has a wrong checksum.
    #[error("the header after {0} has a wrong checksum")]
    Checksum(String),
    /// A number is invalid, or out of range.
    #[error("the {field} of {path} is not a number in range: {value:?}")]
    Number {
        /// The entry's path.
        path: String,
        /// The field.
        field: &'static str,
        /// The field's content.
        value: String,
    },
    /// An extended header is malformed.
    #[error("an extended header before {0} is not well-formed")]
    Pax(String),
    /// A name, or a header of names, is too long.
    #[error("a {what} of {found} bytes after {after}; {limit} are allowed")]
    TooLong {
        /// The previous entry.
        after: String,
        /// The item.
        what: &'static str,
        /// Its length.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// An entry is a sparse file.
    #[error("{0} is a sparse file of GNU tar, which layers must not contain")]
    Sparse(String),
    /// An entry has an unknown kind.
    #[error("{path} is of the kind {kind:?}, which layers have not")]
    Kind {
        /// The entry's path.
        path: String,
        /// The kind.
        kind: char,
    },
}

impl From<io::Error> for TarError {
    fn from(error: io::Error) -> Self {
        match error.downcast::<LimitError>() {
            Ok(limit) => Self::Limit(limit),
            Err(error) => Self::Read(error),
        }
    }
}

/// Text of a name, for messages: at most 200 bytes.
pub(crate) fn shown(name: &[u8]) -> String {
    let text = name[..name.len().min(200)].escape_ascii().to_string();
    if name.len() > 200 { format!("\"{text}...\"") } else { format!("\"{text}\"") }
}

/// The kind of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TarKind {
    File,
    Dir,
    Symlink,
    HardLink,
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
}

/// A name and a value.
pub(crate) type Xattr = (Box<[u8]>, Box<[u8]>);

/// The header of one entry, with the extended headers before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TarHeader {
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: TarKind,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    /// Bytes of content. 0 for entries other than files.
    pub(crate) size: u64,
    pub(crate) xattrs: Vec<Xattr>,
}

/// The extended headers' values for the next entry.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<i64>,
    xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
    is_sparse: bool,
}

/// Reads entries one after the other.
#[derive(Debug)]
pub(crate) struct TarReader<R> {
    inner: R,
    /// Bytes left of the entry's content.
    left: u64,
    padding: u64,
    /// The last entry's name, for messages.
    last: String,
    is_over: bool,
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, left: 0, padding: 0, last: "its beginning".to_owned(), is_over: false }
    }

    pub(crate) fn get_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    pub(crate) fn into_inner(self) -> R {
        self.inner
    }

    /// The next entry, after skipping the rest of the one before. None at the end.
    pub(crate) fn next_entry(&mut self) -> Result<Option<TarHeader>, TarError> {
        let mut extended = Extended::default();
        let mut headers = 0;
        loop {
            self.skip_content()?;
            let Some(block) = self.block()? else { return Ok(None) };
            let kind = block[156];
            let size = number(&block[124..136], "size", &self.last)?;
            if !matches!(kind, b'x' | b'g' | b'L' | b'K') {
                return self.entry(&block, kind, size, extended).map(Some);
            }
            headers += 1;
            if headers > 8 {
                return Err(TarError::Pax(self.last.clone()));
            }
            match kind {
                b'L' => extended.path = Some(self.long("name", size)?),
                b'K' => extended.link = Some(self.long("link", size)?),
                b'x' => {
                    let records = self.content("extended header", size, MAX_PAX)?;
                    self.records(&records, &mut extended)?;
                }
                // Global: comments. Names or sizes in it do not apply to layers.
                _ => drop(self.content("global header", size, MAX_PAX)?),
            }
        }
    }

    /// Reads a part of the entry's content. Returns 0 at its end.
    pub(crate) fn read_content(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        let read = self.inner.read(&mut buffer[..want])?;
        if read == 0 {
            return Err(TarError::Truncated(self.last.clone()));
        }
        self.left -= read as u64;
        Ok(read)
    }

    /// Notes that the caller has moved the reader to the end of the content.
    pub(crate) fn content_was_skipped(&mut self) {
        self.left = 0;
    }

    fn skip_content(&mut self) -> Result<(), TarError> {
        let left = self.left + self.padding;
        (self.left, self.padding) = (0, 0);
        let skipped = io::copy(&mut self.inner.by_ref().take(left), &mut io::sink())?;
        if skipped < left { Err(TarError::Truncated(self.last.clone())) } else { Ok(()) }
    }

    /// A header's block. None at the end.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        if self.is_over {
            return Ok(None);
        }
        let mut block = [0; BLOCK];
        let mut read = 0;
        while read < BLOCK {
            match self.inner.read(&mut block[read..])? {
                // Some writers do not terminate an archive. A truncated layer has another digest.
                0 if read == 0 => {
                    self.is_over = true;
                    return Ok(None);
                }
                0 => return Err(TarError::Truncated(format!("the header after {}", self.last))),
                more => read += more,
            }
        }
        if block.iter().all(|byte| *byte == 0) {
            self.is_over = true;
            return Ok(None);
        }
        let sum = number(&block[148..156], "checksum", &self.last)?;
        let sum_of = |value: fn(u8) -> i64| -> i64 {
            block.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { 32 } else { value(*byte) }).sum()
        };
        let sums = [sum_of(i64::from), sum_of(|byte| i64::from(byte.cast_signed()))];
        if !sums.iter().any(|found| u64::try_from(*found) == Ok(sum)) {
            return Err(TarError::Checksum(self.last.clone()));
        }
        Ok(Some(block))
    }

    fn content(&mut self, what: &'static str, size: u64, limit: u64) -> Result<Vec<u8>, TarError> {
        if size > limit {
            return Err(TarError::TooLong { after: self.last.clone(), what, found: size, limit });
        }
        let mut bytes = Vec::new();
        self.inner.by_ref().take(size).read_to_end(&mut bytes)?;
        if (bytes.len() as u64) < size {
            return Err(TarError::Truncated(format!("the {what} after {}", self.last)));
        }
        (self.left, self.padding) = (0, size.next_multiple_of(BLOCK as u64) - size);
        Ok(bytes)
    }

    fn long(&mut self, what: &'static str, size: u64) -> Result<Vec<u8>, TarError> {
        // Up to the NUL, and in as much memory: the layer keeps it.
        Ok(until_nul(&self.content(what, size, MAX_PATH as u64 + 1)?).to_vec())
    }

    fn records(&self, mut bytes: &[u8], extended: &mut Extended) -> Result<(), TarError> {
        let bad = || TarError::Pax(self.last.clone());
        while !bytes.is_empty() {
            let blank = bytes.iter().take(20).position(|byte| *byte == b' ').ok_or_else(bad)?;
            let length = std::str::from_utf8(&bytes[..blank]).ok().filter(|text| !text.starts_with('+'));
            let length: usize = length.and_then(|text| text.parse().ok()).ok_or_else(bad)?;
            let record = bytes.get(blank + 1..length).and_then(|rest| rest.strip_suffix(b"\n")).ok_or_else(bad)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(bad)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            bytes = &bytes[length..];
            self.record(key, value, extended)?;
        }
        Ok(())
    }

    fn record(&self, key: &[u8], value: &[u8], extended: &mut Extended) -> Result<(), TarError> {
        let decimal = |field| -> Result<Option<u64>, TarError> {
            // An empty value cancels an earlier one.
            if value.is_empty() {
                return Ok(None);
            }
            let digits = value.iter().all(u8::is_ascii_digit).then(|| std::str::from_utf8(value).ok()).flatten();
            let bad =
                || TarError::Number { path: format!("the entry after {}", self.last), field, value: shown(value) };
            digits.and_then(|digits| digits.parse().ok()).ok_or_else(bad).map(Some)
        };
        let named = |what| -> Result<Option<Vec<u8>>, TarError> {
            if value.len() > MAX_PATH {
                let (found, limit) = (value.len() as u64, MAX_PATH as u64);
                return Err(TarError::TooLong { after: self.last.clone(), what, found, limit });
            }
            Ok((!value.is_empty()).then(|| value.to_vec()))
        };
        match key {
            b"path" => extended.path = named("name")?,
            b"linkpath" => extended.link = named("link")?,
            b"size" => extended.size = decimal("size")?,
            b"uid" => extended.uid = decimal("owner")?,
            b"gid" => extended.gid = decimal("group")?,
            b"mtime" => {
                let whole = value.split(|byte| *byte == b'.').next().unwrap_or_default();
                let text = std::str::from_utf8(whole).unwrap_or_default();
                let (path, value) = (format!("the entry after {}", self.last), shown(value));
                let number = text.parse().map_err(|_| TarError::Number { path, field: "time", value })?;
                extended.mtime = Some(number);
            }
            key if key.starts_with(b"GNU.sparse.") => extended.is_sparse = true,
            key => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    extended.xattrs.insert(name.into(), value.into());
                }
            }
        }
        Ok(())
    }

    fn entry(&mut self, block: &[u8; 512], kind: u8, size: u64, extended: Extended) -> Result<TarHeader, TarError> {
        let path = extended.path.unwrap_or_else(|| ustar_path(block));
        self.last = shown(&path);
        let path_shown = &self.last;
        let is_dir_name = path.ends_with(b"/");
        let of = |from: usize, to: usize, field| number(&block[from..to], field, path_shown);
        let small = |value: u64, field| {
            u32::try_from(value).map_err(|_| TarError::Number {
                path: path_shown.clone(),
                field,
                value: value.to_string(),
            })
        };
        if kind == b'S' || extended.is_sparse {
            return Err(TarError::Sparse(path_shown.clone()));
        }
        let device = || -> Result<(u32, u32), TarError> {
            let (major, minor) = (of(329, 337, "device")?, of(337, 345, "device")?);
            // Linux's ranges: 12 and 20 bits.
            let in_range = major < 1 << 12 && minor < 1 << 20;
            let number =
                || TarError::Number { path: path_shown.clone(), field: "device", value: format!("{major}:{minor}") };
            if in_range { Ok((major as u32, minor as u32)) } else { Err(number()) }
        };
        let kind = match kind {
            // As in the oldest archives.
            0 if is_dir_name => TarKind::Dir,
            b'0' | 0 | b'7' => TarKind::File,
            b'1' => TarKind::HardLink,
            b'2' => TarKind::Symlink,
            b'3' => device().map(|(major, minor)| TarKind::Char(major, minor))?,
            b'4' => device().map(|(major, minor)| TarKind::Block(major, minor))?,
            b'5' => TarKind::Dir,
            b'6' => TarKind::Fifo,
            other => return Err(TarError::Kind { path: path_shown.clone(), kind: char::from(other) }),
        };
        // Readers differ on the size of a directory or a link. Go's reader, used by most tools for
        // images, treats it as 0.
        let size = if kind == TarKind::File { extended.size.unwrap_or(size) } else { 0 };
        // The last block is padded, which overflows for a size near the maximum.
        let padded = size.checked_next_multiple_of(BLOCK as u64).ok_or_else(|| TarError::Number {
            path: path_shown.clone(),
            field: "size",
            value: size.to_string(),
        })?;
        let mtime = match extended.mtime {
            Some(mtime) => mtime,
            None => i64::try_from(of(136, 148, "time")?).unwrap_or_default(),
        };
        let mode = (of(100, 108, "mode")? & 0o7777) as u16;
        let uid = small(extended.uid.map_or_else(|| of(108, 116, "owner"), Ok)?, "owner")?;
        let gid = small(extended.gid.map_or_else(|| of(116, 124, "group"), Ok)?, "group")?;
        let link = extended.link.unwrap_or_else(|| until_nul(&block[157..257]).to_vec());
        (self.left, self.padding) = (size, padded - size);
        Ok(TarHeader { path, link, kind, mode, uid, gid, mtime, size, xattrs: extended.xattrs.into_iter().collect() })
    }
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn ustar_path(block: &[u8; 512]) -> Vec<u8> {
    let name = until_nul(&block[..100]);
    // GNU has other fields in place of the prefix of ustar.
    let prefix = if &block[257..263] == b"ustar\0" { until_nul(&block[345..500]) } else { &[] };
    if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
}

/// A number in octal digits, or in base 256.
fn number(field: &[u8], name: &'static str, path: &str) -> Result<u64, TarError> {
    let bad = || TarError::Number { path: path.to_owned(), field: name, value: shown(field) };
    match field.first() {
        // The bit below the highest is the sign. Times before 1970 are rare in archives, and become
        // 0 here.
        Some(first) if first & 0xc0 == 0xc0 && name == "time" => Ok(0),
        Some(first) if first & 0xc0 == 0x80 => {
            let mut value = u64::from(first & 0x3f);
            for byte in &field[1..] {
                value = value.checked_mul(256).ok_or_else(bad)? | u64::from(*byte);
            }
            Ok(value)
        }
        _ => {
            let text = std::str::from_utf8(until_nul(field)).map_err(|_| bad())?.trim_matches(' ');
            let is_octal = text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
            match text {
                "" => Ok(0),
                text if is_octal => u64::from_str_radix(text, 8).map_err(|_| bad()),
                _ => Err(bad()),
            }
        }
    }
}
