//! Kinds of threads, for whoever restricts what each may do.

use std::sync::OnceLock;

/// A kind of thread with needs of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a vCPU.
    Vcpu,
    /// Serves the queues of a virtio device.
    Device,
}

static HOOK: OnceLock<fn(ThreadKind)> = OnceLock::new();

/// Has `hook` called on each thread of a kind when it starts. The first call of a process counts.
pub fn set_start_hook(hook: fn(ThreadKind)) {
    let _ = HOOK.set(hook);
}

/// Called by a thread of `kind` when it starts.
pub fn started(kind: ThreadKind) {
    if let Some(hook) = HOOK.get() {
        hook(kind);
    }
}
