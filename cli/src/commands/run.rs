//! `clade run`: boots a kernel with its console on this terminal.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::num::NonZero;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use clade_devices::virtio::limiter::Limits;
use clade_devices::virtio::net::Egress;

use tokio::runtime::{Builder, Handle};
use zeroize::Zeroizing;

use crate::commands::args::{DEFAULT_CMDLINE, RunArgs};
use crate::commands::image_vm::{ImageVm, KERNEL_WORDS};
use crate::commands::oci_template;
use crate::commands::serve::ensure;
use crate::commands::session::CommandSession;
use crate::commands::shutdown::ShutdownSignal;
use crate::commands::times::{limit, suspend_after};
use crate::commands::worker::BARE;
use crate::commands::{Failure, Outcome};
use clade_api::http::MAX_CONNECTIONS;
use clade_api::secrets::{MAX_SECRET_BYTES, Secret};
use clade_api::{BootRequest, Client, Labels, VmInfo, VmLimits};
use clade_host_io::sched::serve_requests;
use clade_vmm::error_chain;
use clade_vmm::vm::{ConfigError, Irqchip, VmConfig, user_net};

/// Writes a line to standard error. A failure is ignored: a VM does not end because its terminal or
/// log has gone.
macro_rules! say {
    ($($text:tt)*) => {
        drop(::std::io::Write::write_fmt(&mut ::std::io::stderr(), format_args!("{}\n", format_args!($($text)*))))
    };
}
pub(super) use say;

/// Runs `work` with a runtime for the sockets of a command or a VM.
pub(super) fn with_runtime(work: impl FnOnce(&Handle) -> Outcome) -> Outcome {
    with(Builder::new_multi_thread().worker_threads(1), work)
}

/// Most threads that answer the supervisor's clients.
const MAX_SERVERS: usize = 4;
/// Threads for their work: one for each connection of the socket and of the port, and for each request of
/// E2B's API.
const MAX_WORK: usize = 3 * MAX_CONNECTIONS;

/// Runs `work` with a runtime for the clients of a supervisor. Its threads run soon after they wake: the
/// guests of one client delay the answers to others little.
pub(super) fn with_server_runtime(work: impl FnOnce(&Handle) -> Outcome) -> Outcome {
    let servers = std::thread::available_parallelism().map_or(1, NonZero::get).clamp(2, MAX_SERVERS);
    with(
        Builder::new_multi_thread()
            .worker_threads(servers)
            .max_blocking_threads(MAX_WORK)
            .on_thread_start(serve_requests),
        work,
    )
}

fn with(builder: &mut Builder, work: impl FnOnce(&Handle) -> Outcome) -> Outcome {
    let runtime = builder.enable_all().build().map_err(Failure::run)?;
    let outcome = work(runtime.handle());
    // Does not wait for requests: the important ones have ended.
    runtime.shutdown_background();
    outcome
}

/// Returns the VM's name.
pub(super) fn name(args: &RunArgs) -> String {
    args.name.clone().unwrap_or_else(|| format!("clade-{}", std::process::id()))
}

fn config(args: &RunArgs, bare: bool) -> Result<VmConfig, Failure> {
    let machine = &args.machine;
    let hint = |error: ConfigError| match machine.mem {
        // Docker's `--memory` and QEMU's `-m` also accept a plain number.
        mem @ 1..0x10_0000 => Failure::input(anyhow!("{}; did you mean {mem}M?", error_chain(&error))),
        _ => Failure::input(error),
    };
    let mut config = VmConfig::new(machine.mem, machine.cpus).map_err(hint)?;
    if !machine.overcommit {
        config.check_host_memory().map_err(Failure::input)?;
    }
    config.pit = machine.pit;
    config.cpu = machine.cpu_template;
    config.hide = machine.cpu_hide.clone().unwrap_or_default();
    config.pmu = machine.pmu;
    config.acpi = !(bare || machine.no_acpi);
    config.irqchip = Irqchip::Full;
    config.disks.clone_from(&args.disk);
    config.nets.clone_from(&machine.net);
    let egress = Egress::new(machine.egress.clone()).map_err(Failure::input)?;
    config.nets.iter_mut().for_each(|net| net.egress.clone_from(&egress));
    config.vsock.clone_from(&args.vsock);
    config.rng = (machine.rng || !(bare || machine.no_rng)).then(Limits::default);
    config.balloon = machine.balloon;
    config.virtio_console = machine.virtio_console;
    config.check_devices().map_err(Failure::input)?;
    Ok(config)
}

/// Reads the secrets named in the arguments, without line ends behind them.
fn secrets(args: &RunArgs) -> Result<Vec<Secret>, Failure> {
    let secret = |name: &str, mut value: Zeroizing<Vec<u8>>| {
        let length = value.trim_ascii_end().len();
        value.truncate(length);
        Secret { name: name.to_owned(), value }
    };
    let of_file = |path: &PathBuf| {
        // Too long a secret is detected by one byte more.
        let read = File::open(path).and_then(|file| {
            let mut value = Zeroizing::new(Vec::with_capacity(MAX_SECRET_BYTES + 1));
            file.take(MAX_SECRET_BYTES as u64 + 1).read_to_end(&mut value)?;
            Ok(value)
        });
        let value = read.with_context(|| format!("the secret {}", path.display())).map_err(Failure::Input)?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        Ok(secret(&name, value))
    };
    let of_variable = |name: &String| {
        let value = std::env::var_os(name).with_context(|| format!("the secret: there is no variable {name}"));
        Ok(secret(name, Zeroizing::new(value.map_err(Failure::Input)?.into_vec())))
    };
    args.secret.iter().map(of_file).chain(args.secret_env.iter().map(of_variable)).collect()
}

/// Returns the address of a guest whose first network device is passt's, in the form of the kernel
/// and the agent.
fn ip_word(config: &VmConfig) -> Option<String> {
    let is_user = config.nets.first().is_some_and(|net| net.user.is_some());
    let mask = Ipv4Addr::from_bits(u32::MAX << (32 - u32::from(user_net::PREFIX)));
    let word = || format!("ip={}::{}:{mask}::eth0:off:{}", user_net::GUEST, user_net::GATEWAY, user_net::RESOLVER);
    is_user.then(word)
}

/// Builds the request from the arguments, with the parts of `of_image`.
pub(super) fn request(args: &RunArgs, of_image: Option<&ImageVm>) -> Result<BootRequest, Failure> {
    // Its process has another working directory.
    let file = |path: &PathBuf| std::path::absolute(path).map_err(Failure::input);
    let kernel = of_image.map_or_else(|| args.kernel.clone().unwrap_or_default(), |image| image.kernel.clone());
    let initrd = of_image.map(|image| image.initrd.path().to_owned()).or_else(|| args.initrd.clone());
    let is_bare = kernel == Path::new(BARE);
    let mut config = config(args, is_bare)?;
    if let Some(image) = of_image {
        config.disks.insert(0, image.disk.clone());
        config.vsock.get_or_insert_with(|| image.vsock.clone());
        config.check_devices().map_err(Failure::input)?;
    }
    for disk in &mut config.disks {
        disk.disk.path = file(&disk.disk.path)?;
        disk.disk.overlays = disk.disk.overlays.as_ref().map(file).transpose()?;
    }
    if let Some(vsock) = &mut config.vsock {
        vsock.socket = file(&vsock.socket)?;
    }
    let ip = ip_word(&config);
    let default_cmdline = || {
        of_image
            .into_iter()
            .flat_map(|_| KERNEL_WORDS)
            .chain(ip.as_deref())
            .chain(args.append.iter().map(String::as_str))
            .fold(DEFAULT_CMDLINE.to_owned(), |cmdline, more| format!("{cmdline} {more}"))
    };
    Ok(BootRequest {
        name: name(args),
        config,
        kernel: if is_bare { kernel } else { file(&kernel)? },
        initrd: initrd.as_ref().map(file).transpose()?,
        cmdline: args.cmdline.clone().unwrap_or_else(default_cmdline),
        labels: Labels::of(&args.label).map_err(Failure::input)?,
        paused: false,
        reports_ready: of_image.is_some(),
        session: None,
        limits: VmLimits { memory_mib: args.memory_limit, cpus: args.cpu_limit },
        secrets: secrets(args)?,
    })
}

pub(crate) fn main(args: &RunArgs) -> Outcome {
    // Its initramfs is a file until the VM runs.
    let of_image = args.image.as_deref().map(|image| ImageVm::prepare(args, image)).transpose()?;
    let mut request = request(args, of_image.as_ref())?;
    if args.background {
        return background(args, &request);
    }
    with_runtime(|runtime| {
        // Before there is anything to clean up.
        let shutdown = ShutdownSignal::listen(runtime).map_err(Failure::run)?;
        let session = CommandSession::begin(args.confine, runtime, &shutdown)?;
        request.session = Some(session.name().to_owned());
        session.make("/v1/vms", &request, |info: VmInfo| vec![info.name])?;
        session.foreground(&request.name, args.detached)
    })
}

/// Leaves the VM to the supervisor.
fn background(args: &RunArgs, request: &BootRequest) -> Outcome {
    if !Client::default().is_remote() {
        ensure()?;
    }
    let vm = oci_template::start(args, request)?;
    let names = std::slice::from_ref(&vm.name);
    // Before the wait: the VM stays if that fails.
    let limited = limit(names, args.times.ttl).and(suspend_after(names, args.times.suspend_after));
    let waited = limited.and_then(|()| vm.wait(args, request));
    drop(writeln!(io::stdout(), "{}", vm.name));
    waited
}
