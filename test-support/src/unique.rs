//! Numbers and names that only one test of the host may use at a time: TCP ports, CIDs, subnets and
//! names of TAP interfaces.
//!
//! Each number has a file in a directory of the host. Its holder has the file locked, so that the
//! kernel gives the number back when the process ends, however it ends.

use std::env;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process;

/// A number that no other test has while this value lives.
#[derive(Debug)]
pub struct Claim {
    number: u32,
    _lock: File,
}

impl Claim {
    /// Takes a free number of `kind` from `range` that `usable` accepts.
    fn take(kind: &str, range: std::ops::Range<u32>, usable: impl Fn(u32) -> bool) -> Self {
        let dir = directory();
        // Processes that start together do not all try the same numbers first.
        let length = range.end - range.start;
        let first = process::id().wrapping_mul(7) % length;
        for step in 0..length {
            let number = range.start + (first + step) % length;
            let file =
                File::options().write(true).create(true).truncate(false).open(dir.join(format!("{kind}-{number}")));
            let file = file.unwrap_or_else(|error| panic!("a lock in {}: {error}", dir.display()));
            if file.try_lock().is_ok() && usable(number) {
                return Self { number, _lock: file };
            }
        }
        panic!("no free {kind} from {} to {}", range.start, range.end - 1)
    }

    /// The number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }
}

/// The directory of the locks.
fn directory() -> PathBuf {
    // Per user: a lock file of another user cannot be opened.
    let user = env::var("USER").unwrap_or_default();
    let dir = env::temp_dir().join(format!("clade-test-numbers-{user}"));
    fs::create_dir_all(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    dir
}

/// A TCP port of the loopback interface.
#[derive(Debug)]
pub struct Port(Claim);

impl Port {
    /// Takes a port below the range from which the kernel takes ports by itself, so that no other
    /// process gets it between this call and its use.
    #[must_use]
    pub fn take() -> Self {
        Self(Claim::take("port", 20_000..28_000, |port| {
            u16::try_from(port).is_ok_and(|port| TcpListener::bind(("127.0.0.1", port)).is_ok())
        }))
    }

    /// Takes this port, or waits until its holder gives it back.
    #[must_use]
    pub fn wait_for(port: u16) -> Self {
        let path = directory().join(format!("port-{port}"));
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        let file = file.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        file.lock().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self(Claim { number: u32::from(port), _lock: file })
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u16 {
        u16::try_from(self.0.number()).unwrap_or_default()
    }
}

/// A vsock CID, and those of the children of its VM: [`Cid::COUNT`] in a row.
#[derive(Debug)]
pub struct Cid(Claim);

impl Cid {
    /// Number of these CIDs.
    pub const COUNT: u32 = 256;

    /// Takes a CID.
    #[must_use]
    pub fn take() -> Self {
        Self(Claim::take("cid", 0x4000..0x8000, |_| true))
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.0.number() * Self::COUNT
    }
}

/// A subnet 10.213.N.0/24.
#[derive(Debug)]
pub struct Subnet(Claim);

impl Subnet {
    /// Takes a subnet.
    #[must_use]
    pub fn take() -> Self {
        Self(Claim::take("subnet", 1..255, |_| true))
    }

    /// Address `host` in it.
    #[must_use]
    pub fn address(&self, host: u8) -> [u8; 4] {
        [10, 213, u8::try_from(self.0.number()).unwrap_or_default(), host]
    }
}

/// A name for TAP interfaces.
#[derive(Debug)]
pub struct TapName(Claim);

impl TapName {
    /// Takes a name.
    #[must_use]
    pub fn take() -> Self {
        Self(Claim::take("tap", 0..10_000, |_| true))
    }

    /// The name: at most 15 characters with two of the caller's behind it.
    #[must_use]
    pub fn name(&self) -> String {
        format!("cladet{}", self.0.number())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_has_one_holder() {
        let (one, two) = (Port::take(), Port::take());
        assert_ne!(one.number(), two.number());
        let (number, path) = (one.number(), directory().join(format!("port-{}", one.number())));
        let again = File::options().write(true).open(path).unwrap_or_else(|error| panic!("{error}"));
        assert!(again.try_lock().is_err(), "the port is held");
        drop(one);
        assert_eq!(Port::wait_for(number).number(), number);
    }

    #[test]
    fn children_have_room_for_their_cids() {
        let (one, two) = (Cid::take(), Cid::take());
        assert!(one.number().abs_diff(two.number()) >= Cid::COUNT);
    }

    #[test]
    fn subnets_differ() {
        let (one, two) = (Subnet::take(), Subnet::take());
        assert_ne!(one.address(1), two.address(1));
    }

    #[test]
    fn names_of_interfaces_fit() {
        assert!(TapName::take().name().len() <= 13);
    }
}
