//! `clade memory`: a guest's memory by its physical addresses, as a dump or as bytes.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

use clade_api::{Client, MAX_MEMORY};
use clap::{Args, Subcommand};

use crate::commands::cp::partial;
use crate::commands::remote::ask;
use crate::commands::units::parse_size;
use crate::commands::{Failure, Outcome};

/// Bytes of a line of a dump.
const LINE: usize = 16;
/// Bytes read without a given length.
const DEFAULT_LENGTH: u64 = 256;
/// Standard input or output, as a file.
const STANDARD: &str = "-";

#[derive(Debug, Subcommand)]
pub(crate) enum MemoryCommand {
    /// Show memory as a hexadecimal dump, or write it to a file.
    Read(ReadArgs),
    /// Write bytes into memory, as the guest would.
    Write(WriteArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ReadArgs {
    /// The VM's name.
    #[arg(value_name = "VM")]
    name: String,
    /// Guest-physical address, as 4096 or 0x1000.
    #[arg(value_name = "ADDRESS", value_parser = parse_address)]
    address: u64,
    /// Number of bytes: decimal, 0x and digits, or with K, M, G, T.
    #[arg(value_name = "LENGTH", value_parser = parse_length, default_value_t = DEFAULT_LENGTH)]
    length: u64,
    /// Write the raw bytes to a file; `-` is standard output.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct WriteArgs {
    /// The VM's name.
    #[arg(value_name = "VM")]
    name: String,
    /// Guest-physical address, as 4096 or 0x1000.
    #[arg(value_name = "ADDRESS", value_parser = parse_address)]
    address: u64,
    /// The bytes as hexadecimal digits, two for each.
    #[arg(value_name = "BYTES", value_parser = parse_bytes, required_unless_present = "input")]
    bytes: Option<Bytes>,
    /// Take the bytes from a file; `-` is standard input.
    #[arg(long, short, value_name = "FILE", conflicts_with = "bytes")]
    input: Option<PathBuf>,
}

/// Bytes of the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bytes(Vec<u8>);

fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) if digits.bytes().all(|byte| byte.is_ascii_hexdigit()) => u64::from_str_radix(digits, 16).ok(),
        Some(_) => None,
        None => text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?,
    }
}

fn parse_address(text: &str) -> Result<u64, String> {
    parse_number(text).ok_or_else(|| format!("{text:?} is not an address such as 4096 or 0x1000"))
}

fn parse_length(text: &str) -> Result<u64, String> {
    let length = parse_number(text).map_or_else(|| parse_size(text), Ok)?;
    if length == 0 { Err("0 bytes are nothing to read".to_owned()) } else { Ok(length) }
}

fn parse_bytes(text: &str) -> Result<Bytes, String> {
    let wrong = || format!("{text:?} is not bytes as hexadecimal digits, such as 00ff or \"de ad\"");
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let (pairs, odd) = digits.as_chunks::<2>();
    if pairs.is_empty() || !odd.is_empty() {
        return Err(wrong());
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let byte = |[high, low]: &[u8; 2]| Some((digit(*high)? << 4 | digit(*low)?) as u8);
    pairs.iter().map(byte).collect::<Option<_>>().map(Bytes).ok_or_else(wrong)
}

/// Formats one line of a dump: the address, the bytes, and their printable ASCII.
fn line(address: u64, bytes: &[u8]) -> String {
    let mut text = format!("{address:012x} ");
    for at in 0..LINE {
        if at % 8 == 0 {
            text.push(' ');
        }
        text.push_str(&bytes.get(at).map_or("   ".to_owned(), |byte| format!("{byte:02x} ")));
    }
    let shown = |byte: &u8| if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '.' };
    text.push_str(&format!(" |{}|", bytes.iter().map(shown).collect::<String>()));
    text
}

/// Prints lines; repeated ones become a `*`.
struct Dump {
    last: Option<Vec<u8>>,
    is_starred: bool,
}

impl Dump {
    fn print(&mut self, to: &mut impl Write, address: u64, bytes: &[u8]) -> io::Result<()> {
        for (at, bytes) in (address..).step_by(LINE).zip(bytes.chunks(LINE)) {
            if self.last.as_deref() == Some(bytes) {
                if !std::mem::replace(&mut self.is_starred, true) {
                    writeln!(to, "*")?;
                }
                continue;
            }
            (self.last, self.is_starred) = (Some(bytes.to_vec()), false);
            writeln!(to, "{}", line(at, bytes))?;
        }
        Ok(())
    }

    /// Prints the address after the last byte, if that is not obvious.
    fn finish(&self, to: &mut impl Write, end: u64) -> io::Result<()> {
        if self.is_starred { writeln!(to, "{end:012x}") } else { Ok(()) }
    }
}

/// Calls `part` with the address and length of each request that a range takes. All but the first
/// and the last begin and end at a multiple of the largest.
fn in_parts(address: u64, length: u64, mut part: impl FnMut(u64, usize) -> Outcome) -> Outcome {
    let too_far = || Failure::Input(anyhow::anyhow!("{length:#x} bytes at {address:#x} end beyond 64 bits"));
    let end = address.checked_add(length).ok_or_else(too_far)?;
    let (mut at, most) = (address, MAX_MEMORY as u64);
    while at < end {
        let next = (at - at % most + most).min(end);
        part(at, (next - at) as usize)?;
        at = next;
    }
    Ok(())
}

fn read(args: &ReadArgs) -> Outcome {
    let client = Client::default();
    let get = |at, length| {
        let mut bytes = vec![0; length];
        ask(client.read_memory(&args.name, at, &mut bytes)).map(|()| bytes)
    };
    let Some(path) = &args.output else {
        let mut stdout = io::stdout().lock();
        let mut dump = Dump { last: None, is_starred: false };
        in_parts(args.address, args.length, |at, length| {
            dump.print(&mut stdout, at, &get(at, length)?).map_err(Failure::run)
        })?;
        return dump.finish(&mut stdout, args.address + args.length).map_err(Failure::run);
    };
    if path == Path::new(STANDARD) {
        let mut stdout = io::stdout().lock();
        if stdout.is_terminal() {
            return Err(Failure::Input(anyhow::anyhow!(
                "standard output is a terminal: leave --output out for a dump"
            )));
        }
        in_parts(args.address, args.length, |at, length| stdout.write_all(&get(at, length)?).map_err(Failure::run))?;
        return stdout.flush().map_err(Failure::run);
    }
    let failed = |error| Failure::Input(anyhow::Error::new(error).context(path.display().to_string()));
    if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        let mut file = File::options().write(true).open(path).map_err(failed)?;
        return in_parts(args.address, args.length, |at, length| file.write_all(&get(at, length)?).map_err(failed));
    }
    // An existing file stays as it is until all bytes are there.
    let place = path.canonicalize().unwrap_or_else(|_| path.clone());
    let own = fs::metadata(&place).map(|found| found.permissions()).ok();
    let mut file = partial(&place, if own.is_some() { 0o600 } else { 0o666 })?;
    own.map_or(Ok(()), |own| file.as_file().set_permissions(own)).map_err(failed)?;
    in_parts(args.address, args.length, |at, length| file.write_all(&get(at, length)?).map_err(failed))?;
    file.persist(place).map(drop).map_err(|error| failed(error.error))
}

fn write(args: &WriteArgs) -> Outcome {
    let bytes = match (&args.bytes, &args.input) {
        (Some(bytes), _) => bytes.0.clone(),
        (None, Some(path)) if path == Path::new(STANDARD) => {
            let mut bytes = Vec::new();
            io::stdin().lock().read_to_end(&mut bytes).map_err(Failure::input)?;
            bytes
        }
        (None, Some(path)) => fs::read(path)
            .map_err(|error| Failure::Input(anyhow::Error::new(error).context(path.display().to_string())))?,
        (None, None) => Vec::new(),
    };
    if bytes.is_empty() {
        return Err(Failure::Input(anyhow::anyhow!("there are no bytes to write")));
    }
    let client = Client::default();
    let bytes = bytes::Bytes::from(bytes);
    in_parts(args.address, bytes.len() as u64, |at, length| {
        let from = (at - args.address) as usize;
        ask(client.write_memory(&args.name, at, bytes.slice(from..from + length))).map(drop)
    })
}

pub(super) fn main(command: &MemoryCommand) -> Outcome {
    match command {
        MemoryCommand::Read(args) => read(args),
        MemoryCommand::Write(args) => write(args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_lengths_and_bytes_are_read_or_refused_by_name() {
        assert_eq!((parse_address("0x1000"), parse_address("4096")), (Ok(4096), Ok(4096)));
        assert_eq!((parse_length("0x10"), parse_length("4K"), parse_length("7")), (Ok(16), Ok(4096), Ok(7)));

        assert_eq!(parse_bytes("00fF 1a"), Ok(Bytes(vec![0, 255, 26])));
        for text in ["", "0x", "-1", "0x+1", "1000h", "0x1_0", "99999999999999999999"] {
            assert!(parse_address(text).unwrap_err().contains(&format!("{text:?}")), "{text}");
        }
        for text in ["", "0", "0g1", "é0", "00fF 1"] {
            assert!(parse_bytes(text).unwrap_err().contains(&format!("{text:?}")), "{text}");
        }
        assert!(parse_length("0").is_err());
    }

    #[test]
    fn a_dump_has_every_byte_and_repeats_no_line() {
        let mut out = Vec::new();
        let mut dump = Dump { last: None, is_starred: false };
        let bytes = [b"0123456789abc\x00\x7f\xff".as_slice(), &[0; 48], b"end"].concat();
        dump.print(&mut out, 0x1000, &bytes[..32]).unwrap();
        dump.print(&mut out, 0x1020, &bytes[32..]).unwrap();
        dump.finish(&mut out, 0x1043).unwrap();
        let expected = "\
000000001000  30 31 32 33 34 35 36 37  38 39 61 62 63 00 7f ff  |0123456789abc...|
000000001010  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|
*
000000001040  65 6e 64                                          |end|
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn parts_are_as_large_as_may_be_and_in_order() {
        let mut parts = Vec::new();
        let most = MAX_MEMORY as u64;
        let outcome = in_parts(most - 5, 2 * most, |at, length| {
            parts.push((at, length));
            Ok(())
        });
        assert!(outcome.is_ok());
        assert_eq!(parts, [(most - 5, 5), (most, MAX_MEMORY), (2 * most, MAX_MEMORY - 5)]);
        assert!(in_parts(u64::MAX, 2, |_, _| Ok(())).is_err());
    }
}
