//! Networks without an interface of the host's: [passt](https://passt.top) accepts the packets, and
//! turns them into connections of its own.
//!
//! passt needs no privileges, and neither does the user who starts the VM. Each VM has its own
//! passt process, which ends when its socket is closed. All guests see the same network:
//!
//! | address | role |
//! |---|---|
//! | [`GUEST`] | the guest |
//! | [`GATEWAY`] | passt, without access to the host's loopback address |
//! | [`RESOLVER`] | the host's first name server |
//!
//! A child has a passt of its own, which does not know the parent's connections.

use std::ffi::{CString, OsString};
use std::fs::{self, File, Permissions};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use clade_host_io::PacketStream;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use thiserror::Error;

use super::spawn;

/// The guest's address, assigned by DHCP.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// Length of its network prefix in bits.
pub const PREFIX: u8 = 24;
/// The guest's gateway.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The guest's name server.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// The gateway's Ethernet address, as in QEMU's user network. A guest draws the same one with a
/// probability of 1 in 2^46.
const GATEWAY_MAC: &str = "52:55:0a:00:02:02";
/// The program.
const PASST: &str = "passt";
/// The user that passt becomes if root starts it.
const NOBODY: u32 = 65_534;
/// Runs the program with standard input as descriptor 3: in the background it has no standard
/// input.
const AS_FD_3: &str = r#"exec passt "$@" 3<&0 </dev/null"#;
/// A shell's exit code if the program is missing.
const NOT_FOUND: i32 = 127;
/// Maximum number of the host's ports forwarded to one guest.
pub const MAX_FORWARDS: usize = 64;
/// Bytes of the program's output that are examined.
const MAX_SAID: usize = 300;

/// A network by passt, which needs no privileges: the guest is 10.0.2.15/24, its gateway 10.0.2.2, its
/// name server 10.0.2.3.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct UserNet {
    /// TCP ports forwarded to the guest. Not inherited by children, because a port belongs to one
    /// VM.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(max_items = 64))]
    pub forward: Vec<PortForward>,
}

/// A port of the host's loopback address that is forwarded to a TCP port of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PortForward {
    /// The host's port.
    #[cfg_attr(feature = "schema", schema(minimum = 1))]
    pub host: u16,
    /// The guest's port.
    #[cfg_attr(feature = "schema", schema(minimum = 1))]
    pub guest: u16,
}

/// Why a network by passt is impossible.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UserNetError {
    /// The program is missing.
    #[error("there is no passt: install it (Debian: passt), or give the network device a TAP interface")]
    Missing,
    /// The shell that starts it cannot be run.
    #[error("passt cannot be run")]
    Start(#[source] io::Error),
    /// The program ends at its start.
    #[error("passt has ended with {code}{}{said}", if said.is_empty() { "" } else { ": " })]
    Refused {
        /// Its exit code, or -1 if a signal ended it.
        code: i32,
        /// The end of its output.
        said: String,
    },
    /// The program's process is not known.
    #[error("passt has not written its process id to {}", path.display())]
    Unknown {
        /// The file that it is to write to.
        path: PathBuf,
        /// Why the file cannot be used. None if the program left it as it was.
        #[source]
        source: Option<io::Error>,
    },
    /// A port is 0 or repeated, or there are too many.
    #[error("port {host}:{guest}: ports are 1 to 65535, each of the host's once, {MAX_FORWARDS} at most")]
    Forward {
        /// The host's port.
        host: u16,
        /// The guest's port.
        guest: u16,
    },
}

impl UserNet {
    /// Refuses invalid ports.
    ///
    /// # Errors
    /// [`UserNetError::Forward`], with the first of them.
    pub fn check(&self) -> Result<(), UserNetError> {
        for (at, PortForward { host, guest }) in self.forward.iter().copied().enumerate() {
            let is_again = self.forward[..at].iter().any(|other| other.host == host);
            if host == 0 || guest == 0 || is_again || at >= MAX_FORWARDS {
                return Err(UserNetError::Forward { host, guest });
            }
        }
        Ok(())
    }

    /// The configuration of a child's network.
    #[must_use]
    pub fn of_child(&self) -> Self {
        Self::default()
    }

    /// Starts the program. Returns when it accepts packets, with its process id. The program ends
    /// when the result is dropped, in any process.
    ///
    /// # Errors
    /// When the program is missing, or refuses to start: a port may be in use.
    pub(crate) fn start(&self) -> Result<(PacketStream, u32), UserNetError> {
        self.check()?;
        let pid = PidFile::new()?;
        let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let (ours, theirs) = pair.map_err(|errno| UserNetError::Start(errno.into()))?;
        let mut args: Vec<OsString> = ["sh", "-c", AS_FD_3, PASST].map(OsString::from).into();
        args.extend(self.args().into_iter().map(OsString::from));
        args.extend(["--pid".into(), pid.path.clone().into_os_string()]);
        let args: Result<Vec<_>, _> = args.into_iter().map(|arg| CString::new(arg.into_vec())).collect();
        let args = args.map_err(|error| UserNetError::Start(error.into()))?;
        // The program continues in the background once it has started.
        let output = spawn::run(&args, theirs.as_fd()).map_err(UserNetError::Start)?;
        drop(theirs);
        match output.code {
            Some(0) => return Ok((PacketStream::new(ours), pid.read()?)),
            Some(NOT_FOUND) => return Err(UserNetError::Missing),
            _ => {}
        }
        let said = String::from_utf8_lossy(&output.said);
        // The system log is not available everywhere.
        let lines = said.lines().filter(|line| !line.is_empty() && !line.contains("syslog"));
        let said: String = lines.collect::<Vec<_>>().join("; ").chars().take(MAX_SAID).collect();
        Err(UserNetError::Refused { code: output.code.unwrap_or(-1), said })
    }

    fn args(&self) -> Vec<String> {
        let forward = |PortForward { host, guest }: &PortForward| format!("127.0.0.1/{host}:{guest}");
        let mut args = vec!["--quiet".to_owned(), "--ipv4-only".to_owned()];
        let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
        add("--fd", "3".to_owned());
        add("--address", GUEST.to_string());
        add("--netmask", PREFIX.to_string());
        add("--gateway", GATEWAY.to_string());
        add("--mac-addr", GATEWAY_MAC.to_owned());
        add("--dns-forward", RESOLVER.to_string());
        add("--search", "none".to_owned());
        add("--udp-ports", "none".to_owned());
        for port in &self.forward {
            add("--tcp-ports", forward(port));
        }
        if self.forward.is_empty() {
            add("--tcp-ports", "none".to_owned());
        }
        // The gateway would lead to listeners on the host's loopback address.
        args.push("--no-map-gw".to_owned());
        args
    }
}

/// A file for the program's process id, in a directory that only its owner can list. The program of a supervisor
/// of root's writes it as another user.
struct PidFile {
    file: File,
    path: PathBuf,
    _dir: TempDir,
}

impl PidFile {
    fn new() -> Result<Self, UserNetError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| UserNetError::Unknown { path, source: Some(source) }
        };
        let dir = tempfile::Builder::new().prefix("clade-passt-").tempdir().map_err(failed(&std::env::temp_dir()))?;
        let path = dir.path().join("pid");
        let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode));
        // Of root's passt, which becomes `nobody` before it writes. Anybody else who could write would choose the
        // process that is stopped with the VM's network.
        let owned = |file: File| match rustix::process::geteuid().is_root() {
            true => fchown(&file, Some(NOBODY), None).map(|()| file),
            false => Ok(file),
        };
        let created = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let made = created.and_then(owned).and_then(|file| mode(dir.path(), 0o711).map(|()| file));
        let file = made.map_err(failed(&path))?;
        Ok(Self { file, path, _dir: dir })
    }

    fn read(&self) -> Result<u32, UserNetError> {
        let failed = |source| UserNetError::Unknown { path: self.path.clone(), source };
        let text = io::read_to_string(&self.file).map_err(|source| failed(Some(source)))?;
        text.trim().parse().map_err(|_| failed(None))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;

    use clade_test_support::write_program;

    use super::*;

    #[test]
    fn passt_has_default_signals_and_no_variables_that_may_be_secret() {
        // `env` starts this program again, ignoring and blocking signals, which starts a program in the place of passt.
        const STATUS: &str = "CLADE_TEST_PASST_STATUS";
        if std::env::var_os(STATUS).is_some() {
            let (_stream, pid) = UserNet::default().start().unwrap();
            return assert_ne!(pid, std::process::id());
        }
        let dir = tempfile::tempdir().unwrap();
        let status = dir.path().join("status");
        // The file for the process id is the last argument.
        let script = format!(
            "#!/bin/sh\nfor file; do :; done\necho $$ >$file\nexec cat /proc/self/status /proc/self/environ >{}\n",
            status.display()
        );
        write_program(dir.path().join(PASST), &script, 0o755);
        let mut command = Command::new("env");
        command.args(["--ignore-signal=HUP,TERM", "--block-signal=USR1"]).arg(std::env::current_exe().unwrap());
        let name = "vm::identity::user_net::tests::\
                    passt_has_default_signals_and_no_variables_that_may_be_secret";
        let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
        let done = command.args(["--exact", name]).env(STATUS, &status).env("PATH", path).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
        let status = fs::read_to_string(status).unwrap();
        for signals in ["SigIgn:\t0000000000000000", "SigBlk:\t0000000000000000"] {
            assert!(status.contains(signals), "{signals} in {status}");
        }
        assert!(status.contains("PATH=") && !status.contains(STATUS), "{status}");
    }

    #[test]
    fn the_file_for_the_process_id_is_passts_alone() {
        let file = PidFile::new().unwrap();
        let meta = fs::metadata(&file.path).unwrap();
        let owner = if rustix::process::geteuid().is_root() { NOBODY } else { rustix::process::geteuid().as_raw() };
        assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o600, owner));
    }

    #[test]
    fn ports_that_cannot_be_are_named() {
        let of = |ports: &[(u16, u16)]| UserNet {
            forward: ports.iter().map(|(host, guest)| PortForward { host: *host, guest: *guest }).collect(),
        };
        of(&[(8080, 80), (8081, 80)]).check().unwrap();
        let many: Vec<(u16, u16)> = (1..=MAX_FORWARDS as u16 + 1).map(|port| (port, 80)).collect();
        of(&many[1..]).check().unwrap();
        for (ports, named) in
            [(&[(0, 80)][..], "0:80"), (&[(80, 0)], "80:0"), (&[(9, 1), (9, 2)], "9:2"), (&many, "65:80")]
        {
            let refused = of(ports).start().unwrap_err().to_string();
            assert!(refused.contains(named), "{refused}");
        }
    }
}
