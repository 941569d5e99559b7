//! Why a VM stopped.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why a VM stopped, as seen by its vCPUs or its owner.
#[derive(Clone, Debug, Error, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum StopReason {
    /// Its owner stopped it.
    #[error("stopped")]
    Requested,
    /// The time that its owner gave it is over.
    #[error("its time to live is over")]
    TimeOver,
    /// The command of its session has ended.
    #[error("the command that it belonged to has ended")]
    SessionEnded,
    /// Its process has ended without reporting a reason: it was killed, or it panicked.
    #[error("its process has ended ({})", how(*.signal, *.code))]
    Process {
        /// The signal that ended it.
        signal: Option<i32>,
        /// Its exit code, if there was no signal.
        code: Option<i32>,
    },
    /// Its process took more memory than its limit, and was killed.
    #[error("its process took more than its limit of {mib} MiB of memory")]
    OverLimit {
        /// The limit in MiB.
        mib: u64,
    },
    /// The guest reset itself through the keyboard controller.
    #[error("the guest reset itself")]
    Reset,
    /// The guest powered itself off, by ACPI.
    #[error("the guest powered itself off")]
    PowerOff,
    /// The guest ended itself after its main program had ended, and reported that.
    #[error("the guest's program has ended: {}", program(*.status, text))]
    Exited {
        /// The exit status: 128 and the signal's number after a signal.
        status: u8,
        /// The guest's text about it.
        text: String,
    },
    /// The guest shut down, or took a triple fault.
    #[error("vCPU {vcpu} shut down (a triple fault, unless the guest meant to)")]
    Shutdown {
        /// The vCPU's index.
        vcpu: usize,
    },
    /// KVM could not emulate an instruction.
    #[error("vCPU {vcpu}: KVM cannot emulate the instruction at {rip:#x} ({bytes})")]
    Emulation {
        /// The vCPU's index.
        vcpu: usize,
        /// The instruction's guest-virtual address.
        rip: u64,
        /// The instruction's bytes in hexadecimal, as far as KVM fetched them.
        bytes: String,
    },
    /// KVM reported an internal error of another kind.
    #[error("vCPU {vcpu}: {error}")]
    Internal {
        /// The vCPU's index.
        vcpu: usize,
        /// The error in words.
        error: String,
    },
    /// The hardware refused to enter the guest.
    #[error("vCPU {vcpu}: the guest could not be entered (hardware reason {reason:#x})")]
    FailEntry {
        /// The vCPU's index.
        vcpu: usize,
        /// The hardware's reason, as KVM reports it.
        reason: u64,
    },
    /// KVM_RUN returned an exit that Clade does not handle.
    #[error("vCPU {vcpu}: unexpected exit: {exit}")]
    Unexpected {
        /// The vCPU's index.
        vcpu: usize,
        /// The exit, as `kvm-ioctls` shows it.
        exit: String,
    },
    /// KVM_RUN itself failed.
    #[error("vCPU {vcpu}: KVM_RUN failed: {error}")]
    Run {
        /// The vCPU's index.
        vcpu: usize,
        /// The ioctl's error.
        error: String,
    },
    /// The vCPU could not load its state.
    #[error("vCPU {vcpu} could not be started: {error}")]
    Start {
        /// The vCPU's index.
        vcpu: usize,
        /// The error in words.
        error: String,
    },
    /// Memory shared with its parent was lost while it was still being copied.
    #[error("its memory is lost: {error}")]
    MemoryLost {
        /// The error in words.
        error: String,
    },
    /// The thread of a vCPU panicked.
    #[error("the thread of vCPU {vcpu} panicked: {message}")]
    Panic {
        /// The vCPU's index.
        vcpu: usize,
        /// The panic's message. Empty in records written before this field existed.
        #[serde(default)]
        message: String,
    },
}

impl StopReason {
    /// Whether the guest has run, and caused the stop.
    pub(crate) fn is_by_guest(&self) -> bool {
        matches!(
            self,
            Self::Reset
                | Self::PowerOff
                | Self::Exited { .. }
                | Self::Shutdown { .. }
                | Self::Emulation { .. }
                | Self::Unexpected { .. }
        )
    }

    /// Whether the guest has ended itself: by a reset or power-off, with whatever exit status.
    #[must_use]
    pub fn is_guests_end(&self) -> bool {
        matches!(self, Self::Reset | Self::PowerOff | Self::Exited { .. })
    }

    /// Whether the VM ended as its owner or its guest wanted, and without an error of the guest's
    /// program.
    #[must_use]
    pub fn is_in_order(&self) -> bool {
        matches!(self, Self::Requested | Self::TimeOver | Self::Reset | Self::PowerOff | Self::Exited { status: 0, .. })
    }
}

fn program(status: u8, text: &str) -> String {
    if text.is_empty() { format!("exit status {status}") } else { text.to_owned() }
}

fn how(signal: Option<i32>, code: Option<i32>) -> String {
    match (signal, code) {
        (Some(signal), _) => format!("signal {signal}"),
        (None, Some(code)) => format!("exit code {code}"),
        (None, None) => "nobody knows how".to_owned(),
    }
}
