//! `--disk`: a path followed by options, each a `key=value` or a word.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clade_block::DiskConfig;
use clade_devices::virtio::block::{BlockOptions, MAX_QUEUES};
use clade_devices::virtio::limiter::Rate;
use clade_host_io::CachePolicy;
use thiserror::Error;

use crate::commands::units::parse_size;
use clade_vmm::vm::DiskSpec;

/// Reason why a `--disk` is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum DiskArgError {
    /// There is no path.
    #[error("{text:?} names no file: --disk PATH[,ro][,id=..][,..]")]
    NoPath { text: String },
    /// An option is unknown.
    #[error(
        "{option:?} is no option of a disk: ro, ephemeral, id=, cache=host|direct, overlays=, queues=, bytes=, bytes-burst=, ops=, ops-burst= and for tests latency-ms="
    )]
    Unknown { option: String },
    /// An option has a bad value.
    #[error("invalid value {value:?} for {key} of a disk: {wanted}")]
    Value { key: String, value: String, wanted: &'static str },
    /// A burst without a rate.
    #[error("{key} of a disk needs {needs}")]
    Burst { key: &'static str, needs: &'static str },
}

/// Parses a disk.
pub(crate) fn parse_disk(text: &str) -> Result<DiskSpec, DiskArgError> {
    let mut words = text.split(',');
    let path = words.next().filter(|path| !path.is_empty() && !path.contains('='));
    let path = path.ok_or_else(|| DiskArgError::NoPath { text: text.to_owned() })?;
    let mut disk = DiskConfig::new(Path::new(path));
    let mut device = BlockOptions::default();
    let (mut bytes_burst, mut ops_burst) = (None, None);
    for option in words {
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        let bad = |wanted| DiskArgError::Value { key: key.to_owned(), value: value.to_owned(), wanted };
        let amount = || parse_size(value).ok().filter(|n| *n > 0).ok_or_else(|| bad("a number above 0, as in 100M"));
        match key {
            "ro" if value.is_empty() => disk.read_only = true,
            "ephemeral" if value.is_empty() => disk.ephemeral = true,
            "id" if !value.is_empty() && value.len() <= 20 => disk.id = Some(value.to_owned()),
            "id" => return Err(bad("1 to 20 bytes")),
            "cache" => {
                disk.cache = match value {
                    "host" => CachePolicy::Host,
                    "direct" => CachePolicy::Direct,
                    _ => return Err(bad("host or direct")),
                }
            }
            "overlays" if !value.is_empty() => disk.overlays = Some(PathBuf::from(value)),
            "overlays" => return Err(bad("a directory")),
            "queues" => {
                let queues = value.parse().ok().filter(|n| (1..=MAX_QUEUES).contains(n));
                device.queues = queues.ok_or_else(|| bad("1 to 16"))?;
            }
            "bytes" => device.limits.bytes = Some(Rate::per_second(amount()?)),
            "ops" => device.limits.operations = Some(Rate::per_second(amount()?)),
            "bytes-burst" => bytes_burst = Some(amount()?),
            "ops-burst" => ops_burst = Some(amount()?),
            "latency-ms" => {
                let late = value.parse().ok().filter(|ms| *ms <= 60_000);
                disk.latency = Some(Duration::from_millis(late.ok_or_else(|| bad("0 to 60000"))?));
            }
            _ => return Err(DiskArgError::Unknown { option: option.to_owned() }),
        }
    }
    let bursts = [
        (&mut device.limits.bytes, bytes_burst, "bytes-burst=", "bytes="),
        (&mut device.limits.operations, ops_burst, "ops-burst=", "ops="),
    ];
    for (rate, burst, key, needs) in bursts {
        match (rate, burst) {
            (Some(rate), burst) => rate.burst = burst,
            (None, Some(_)) => return Err(DiskArgError::Burst { key, needs }),
            (None, None) => {}
        }
    }
    Ok(DiskSpec { disk, device })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_can_be_said() {
        let text =
            "/a/b.img,ro,id=root,cache=direct,overlays=/fast,queues=4,bytes=100M,bytes-burst=1G,ops=500,latency-ms=3";
        let DiskSpec { disk, device } = parse_disk(text).unwrap();
        assert_eq!(disk.path, Path::new("/a/b.img"));
        assert_eq!((disk.read_only, disk.id.as_deref(), disk.cache), (true, Some("root"), CachePolicy::Direct));
        assert_eq!(disk.overlays.as_deref(), Some(Path::new("/fast")));
        assert_eq!((device.queues, disk.latency), (4, Some(Duration::from_millis(3))));
        let bytes = device.limits.bytes.unwrap();
        assert_eq!((bytes.per_second, bytes.burst), (100 << 20, Some(1 << 30)));
        assert_eq!(device.limits.operations, Some(Rate::per_second(500)));
        assert_eq!(parse_disk("x").unwrap().disk, DiskConfig::new(Path::new("x")));
        let kept = parse_disk("x,ephemeral").unwrap().disk;
        assert!(kept.ephemeral && !kept.read_only);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let bad = [
            ("", "\"\""),
            ("ro=1", "ro=1"),
            ("x,rw", "rw"),
            ("x,ro=yes", "ro=yes"),
            ("x,cache=none", "none"),
            ("x,queues=0", "0"),
            ("x,queues=17", "17"),
            ("x,bytes=fast", "fast"),
            ("x,ops=0", "0"),
            ("x,ops-burst=5", "ops="),
            ("x,id=", "1 to 20"),
            ("x,id=123456789012345678901", "123456789012345678901"),
            ("x,overlays=", "a directory"),
            ("x,latency-ms=70000", "70000"),
        ];
        for (text, named) in bad {
            let error = parse_disk(text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
