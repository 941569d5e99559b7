//! What goes over the control socket.

use serde::{Deserialize, Serialize};

use crate::fleet::Listed;
use crate::vm::StopReason;

/// What a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Its vCPUs run.
    Running,
    /// Its owner has paused it.
    Paused,
    /// It has ended.
    Stopped,
}

/// A VM's pages by kind; see `clade_memory::RamStats`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryInfo {
    /// Guest memory in MiB.
    pub mib: u64,
    /// Pages that are zeros in no layer.
    pub reference_pages: u64,
    /// Pages provided by a layer.
    pub shared_pages: u64,
    /// Pages the VM owns outright.
    pub exclusive_pages: u64,
    /// Of them, pinned for DMA.
    pub pinned_pages: u64,
    /// Memory that goes when the VM goes.
    pub private_kib: u64,
}

/// A VM as it is listed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// What it is doing.
    pub state: VmState,
    /// Why it stopped.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stopped: Option<StopReason>,
    /// Whose child it is.
    pub parent: Option<String>,
    /// Forks between it and the VM that was booted.
    pub generation: u32,
    /// vCPUs.
    pub cpus: u8,
    /// Seconds since it was made.
    pub age_s: f64,
    /// Its memory, if the kernel could be asked.
    pub memory: Option<MemoryInfo>,
}

impl From<&Listed> for VmInfo {
    fn from(listed: &Listed) -> Self {
        let vm = &listed.vm;
        let stopped = vm.stopped();
        let state = match (&stopped, vm.is_paused()) {
            (Some(_), _) => VmState::Stopped,
            (None, true) => VmState::Paused,
            (None, false) => VmState::Running,
        };
        let memory = vm.memory_stats().ok().map(|stats| MemoryInfo {
            mib: vm.config().layout().bytes() >> 20,
            reference_pages: stats.reference,
            shared_pages: stats.shared,
            exclusive_pages: stats.exclusive,
            pinned_pages: stats.pinned,
            private_kib: stats.private_kib,
        });
        Self {
            name: vm.name().to_owned(),
            pid: std::process::id(),
            state,
            stopped,
            parent: listed.parent.clone(),
            generation: vm.generation(),
            cpus: vm.config().cpus(),
            age_s: vm.age().as_secs_f64(),
            memory,
        }
    }
}

/// A fork to be made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// Children, 1 if not given.
    #[serde(default = "one")]
    pub count: usize,
    /// Their names, `{n}` standing for a number; the parent's name and a number if not given.
    #[serde(default)]
    pub name: Option<String>,
    /// Whether they wait for a resume.
    #[serde(default)]
    pub paused: bool,
}

fn one() -> usize {
    1
}

/// A fork that was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ForkAnswer {
    /// The children's names.
    pub children: Vec<String>,
    /// How long the parent was paused, in microseconds.
    pub pause_us: f64,
    /// Of that, freezing memory.
    pub freeze_us: f64,
    /// The whole request, until the last child was started.
    pub total_us: f64,
    /// Pages that became shared without being copied.
    pub remapped_pages: u64,
    /// Pages copied.
    pub copied_pages: u64,
}
