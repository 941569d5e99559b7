//! The steps of PID 1 before anything else.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use clade_agent_proto::{ENTRYPOINT_PATH, Entrypoint};
use rustix::fs::Mode;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socket_with};
use rustix::process::{Resource, Rlimit, setrlimit, umask};

use crate::log::log;
use crate::modules;
use crate::network;
use crate::program::first_file_limit;

/// The first mount point of the root of `clade.root=`.
const NEW_ROOT: &str = "/newroot";
/// The agent's limit of descriptors: some for each process and each connection.
const FILES: u64 = 65_536;
/// The host name in an image.
const IMAGE_HOSTNAME: &str = "clade";
/// Settings below `/proc/sys`: any user may listen at any port and send pings, and Elasticsearch starts. Programs may
/// listen at `[::]`, which IPv4 reaches, and have the loopback address: there is no IPv6 network.
const IMAGE_SETTINGS: [(&str, &str); 5] = [
    ("net/ipv6/conf/all/disable_ipv6", "1"),
    ("net/ipv6/conf/lo/disable_ipv6", "0"),
    ("net/ipv4/ip_unprivileged_port_start", "0"),
    ("net/ipv4/ping_group_range", "0 2147483647"),
    ("vm/max_map_count", "262144"),
];
/// The limits of open files of programs in an image, soft and hard, as docker's.
const IMAGE_FILES: (u64, u64) = (1024, 524_288);
/// The kernel's index of the loopback interface.
const LOOPBACK: i32 = 1;

/// Directory, type, flags and data, in the order in which they are mounted.
const MOUNTS: [(&str, &str, &str); 7] = [
    ("/proc", "proc", ""),
    ("/sys", "sysfs", ""),
    ("/dev", "devtmpfs", "mode=0755"),
    ("/dev/pts", "devpts", "mode=0620,gid=5,ptmxmode=0666"),
    ("/dev/shm", "tmpfs", "mode=1777"),
    ("/tmp", "tmpfs", "mode=1777"),
    ("/run", "tmpfs", "mode=0755"),
];
const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
];

fn warn<E: std::fmt::Display>(what: &str, done: Result<(), E>) {
    if let Err(error) = done {
        log!("{what}: {error}");
    }
}

/// Whether a file system is mounted at a directory. False as long as `/proc` is not.
fn is_mounted(dir: &str) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(dir))
}

fn prepare_mounts() {
    for (dir, kind, data) in MOUNTS {
        if is_mounted(dir) {
            continue;
        }
        // Most guests have the directory.
        let _ = fs::create_dir_all(dir);
        let flags = if dir == "/dev" { MountFlags::NOSUID } else { MountFlags::NOSUID | MountFlags::NODEV };
        let flags = if dir == "/dev/pts" { MountFlags::NOSUID | MountFlags::NOEXEC } else { flags };
        let data = (!data.is_empty()).then(|| std::ffi::CString::new(data).unwrap_or_default());
        // A kernel may lack terminals, for example: everything else works without them.
        warn(dir, mount(kind, dir, kind, flags, data.as_deref()));
    }
    for (target, link) in LINKS {
        if !Path::new(link).exists() {
            // A device of that name may exist, without a driver.
            let _ = symlink(target, link);
        }
    }
}

/// Makes the file system of a device the root. Existing mounts are moved there; other files of the
/// initramfs are not. Directories of the image's own stay visible: `/tmp` and `/run` are not
/// mounted over.
fn switch_root(device: &str) -> io::Result<()> {
    let failed = |what: String| move |error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"));
    fs::create_dir_all(NEW_ROOT).map_err(failed(NEW_ROOT.to_owned()))?;
    // The options of ext4 are in its superblock.
    let mounted = mount(device, NEW_ROOT, "ext4", MountFlags::RELATIME, None);
    mounted.map_err(io::Error::from).map_err(failed(device.to_owned()))?;
    for dir in ["/proc", "/sys", "/dev"] {
        let place = format!("{NEW_ROOT}{dir}");
        // A link in the image would be followed in this root.
        if !fs::symlink_metadata(&place).is_ok_and(|what| what.is_dir()) {
            let _ = fs::remove_file(&place);
            fs::create_dir(&place).map_err(failed(place.clone()))?;
        }
        mount_move(dir, &place).map_err(io::Error::from).map_err(failed(place))?;
    }
    std::env::set_current_dir(NEW_ROOT)?;
    mount_move(".", "/").map_err(io::Error::from).map_err(failed("/".to_owned()))?;
    rustix::process::chroot(".").map_err(io::Error::from).map_err(failed("/".to_owned()))?;
    std::env::set_current_dir("/")
}

/// Brings up the loopback interface: RTM_NEWLINK by netlink.
fn bring_up_loopback() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST: u16 = 1;
    const IFF_UP: u32 = 1;
    let mut message = Vec::with_capacity(32);
    message.extend(32u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    // Sequence and sender; then the family and the type of the device, both any.
    message.extend([0; 12]);
    message.extend(LOOPBACK.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    // The protocol 0 is routing.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    // Without an address the message goes to the kernel.
    send(&socket, &message, SendFlags::empty())?;
    Ok(())
}

/// Sets the host name. Returns it.
fn set_hostname(words: &[String], is_image: bool) -> String {
    let named = words.iter().find_map(|word| word.strip_prefix("clade.hostname=")).map(str::to_owned);
    let otherwise = || match is_image {
        // The file of an image has the name of the host that made it.
        true => Some(IMAGE_HOSTNAME.to_owned()),
        false => fs::read_to_string("/etc/hostname").ok(),
    };
    let name = named.or_else(otherwise).unwrap_or_default();
    let name = name.trim();
    if !name.is_empty() {
        warn("the host name", rustix::system::sethostname(name.as_bytes()));
    }
    name.to_owned()
}

/// Writes the addresses of this host to a file without any address. Images have none: docker mounts the file.
fn name_hosts(file: &Path, hostname: &str) -> io::Result<()> {
    let there = fs::read_to_string(file).unwrap_or_default();
    if there.lines().any(|line| !matches!(line.trim_start().chars().next(), None | Some('#'))) {
        return Ok(());
    }
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(file, format!("{there}127.0.0.1\tlocalhost\n127.0.1.1\t{hostname}\n"))
}

/// Settings of the kernel and limits that programs of images have under docker.
fn set_limits_of_images() {
    for (setting, value) in IMAGE_SETTINGS {
        // A kernel may lack the subsystem.
        let _ = fs::write(Path::new("/proc/sys").join(setting), value);
    }
    let (soft, hard) = IMAGE_FILES;
    warn("open files", setrlimit(Resource::Nofile, Rlimit { current: Some(soft), maximum: Some(hard) }));
}

/// The words of a kernel command line. Quotes keep blanks together.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut is_quoted) = (Vec::new(), None::<String>, false);
    for letter in line.trim_end_matches('\n').chars() {
        match letter {
            '"' => {
                is_quoted = !is_quoted;
                word.get_or_insert_default();
            }
            blank if blank.is_whitespace() && !is_quoted => words.extend(word.take()),
            letter => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    words
}

/// The entrypoint: the words after ` -- ` on the kernel's command line, or the file.
fn entrypoint(words: &[String], file: Option<&str>) -> Result<Option<Entrypoint>, serde_json::Error> {
    if let Some(at) = words.iter().position(|word| word == "--")
        && at + 1 < words.len()
    {
        return Ok(Some(Entrypoint { args: words[at + 1..].to_vec(), ..Entrypoint::default() }));
    }
    file.map(serde_json::from_str).transpose()
}

/// Raises the limit of open files. Children get the original limit.
pub fn raise_file_limit() {
    let first = first_file_limit();
    let higher = Rlimit { current: Some(FILES), maximum: first.maximum.map(|most| most.max(FILES)) };
    // Not every root may exceed its own limit.
    let own = Rlimit { current: first.maximum.map_or(Some(FILES), |most| Some(most.min(FILES))), ..first };
    if let Err(error) = setrlimit(Resource::Nofile, higher).or_else(|_| setrlimit(Resource::Nofile, own)) {
        log!("descriptors: {error}");
    }
}

/// Mounts missing file systems, loads modules, changes to the root of the kernel's command line,
/// and brings up the loopback interface and the network. Returns the entrypoint.
#[must_use]
pub fn prepare() -> Option<Entrypoint> {
    umask(Mode::WGRP | Mode::WOTH);
    prepare_mounts();
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let words = words(&line);
    let has_modules = modules::load(&words);
    warn("the loopback interface", bring_up_loopback());
    // The entrypoint of the initramfs, before its files become unreachable.
    let file = fs::read_to_string(ENTRYPOINT_PATH).ok();
    let root = words.iter().find_map(|word| word.strip_prefix("clade.root="));
    if let Some(device) = root.filter(|_| has_modules) {
        modules::wait_for(device);
    }
    if let Some(device) = root
        && let Err(error) = switch_root(device)
    {
        // The entrypoint has its files there. The agent still answers, for diagnosis.
        log!("no root: {error}");
        return None;
    }
    let hostname = set_hostname(&words, root.is_some());
    if root.is_some() {
        warn("/etc/hosts", name_hosts(Path::new("/etc/hosts"), &hostname));
        set_limits_of_images();
    }
    network::set_up(&words, root.is_some());
    entrypoint(&words, file.as_deref()).unwrap_or_else(|error| {
        log!("{ENTRYPOINT_PATH}: {error}");
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_without_addresses_have_those_of_this_one() {
        let dir = tempfile::tempdir().unwrap();
        let own = "127.0.0.1\tlocalhost\n127.0.1.1\tclade\n";
        for (there, expected) in [
            (None, own.to_owned()),
            (Some(""), own.to_owned()),
            (Some("# none\n\n"), format!("# none\n\n{own}")),
            (Some("# mine\n192.0.2.1 a\n"), "# mine\n192.0.2.1 a\n".to_owned()),
        ] {
            let file = dir.path().join("etc/hosts");
            there.into_iter().for_each(|there| fs::write(&file, there).unwrap());
            name_hosts(&file, "clade").unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), expected);
        }
    }

    #[test]
    fn the_command_line_names_what_runs() {
        let of =
            |line: &str| entrypoint(&words(line), Some(r#"{"args":["/init"],"power_off":true}"#)).unwrap().unwrap();
        assert_eq!(of("quiet x=\"a b\" -- /bin/sh -c \"echo  hi\"\n").args, ["/bin/sh", "-c", "echo  hi"]);
        assert!(of("quiet --").power_off);
        assert_eq!(of("quiet").args, ["/init"]);
        assert_eq!(entrypoint(&words("quiet"), None).unwrap(), None);
        entrypoint(&[], Some(r#"{"argv":[]}"#)).unwrap_err();
        assert_eq!(words("a \"\" b=\"c d\""), ["a", "", "b=c d"]);
    }
}
