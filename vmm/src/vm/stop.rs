//! Why a VM stopped.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The end of a VM, as its vCPUs or its owner saw it.
#[derive(Clone, Debug, Error, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StopReason {
    /// Its owner stopped it.
    #[error("stopped")]
    Requested,
    /// The guest reset itself through the keyboard controller.
    #[error("the guest reset itself")]
    Reset,
    /// The guest shut down, or took a triple fault.
    #[error("vCPU {vcpu} shut down (a triple fault, unless the guest meant to)")]
    Shutdown {
        /// Which vCPU.
        vcpu: usize,
    },
    /// KVM could not emulate an instruction.
    #[error("vCPU {vcpu}: KVM cannot emulate the instruction at {rip:#x} ({bytes})")]
    Emulation {
        /// Which vCPU.
        vcpu: usize,
        /// Where.
        rip: u64,
        /// The instruction's bytes in hexadecimal, as far as KVM fetched them.
        bytes: String,
    },
    /// KVM reported an internal error of another kind.
    #[error("vCPU {vcpu}: {error}")]
    Internal {
        /// Which vCPU.
        vcpu: usize,
        /// What is known of it.
        error: String,
    },
    /// The hardware refused to enter the guest.
    #[error("vCPU {vcpu}: the guest could not be entered (hardware reason {reason:#x})")]
    FailEntry {
        /// Which vCPU.
        vcpu: usize,
        /// The hardware's reason.
        reason: u64,
    },
    /// An exit that Clade does not know.
    #[error("vCPU {vcpu}: unexpected exit: {exit}")]
    Unexpected {
        /// Which vCPU.
        vcpu: usize,
        /// Its description.
        exit: String,
    },
    /// KVM_RUN itself failed.
    #[error("vCPU {vcpu}: KVM_RUN failed: {error}")]
    Run {
        /// Which vCPU.
        vcpu: usize,
        /// The error.
        error: String,
    },
    /// The vCPU could not be given its state.
    #[error("vCPU {vcpu} could not be started: {error}")]
    Start {
        /// Which vCPU.
        vcpu: usize,
        /// The error.
        error: String,
    },
    /// Memory it shares with its parent was lost while it was still being copied.
    #[error("its memory is lost: {error}")]
    MemoryLost {
        /// Why.
        error: String,
    },
    /// A thread of the VM panicked.
    #[error("a thread of the VM panicked on vCPU {vcpu}")]
    Panic {
        /// Which vCPU.
        vcpu: usize,
    },
}
