//! Threads that serve a guest, for whoever restricts what they may do.

use std::sync::OnceLock;

static HOOK: OnceLock<fn()> = OnceLock::new();

/// Has `hook` called on each thread that serves a guest when it starts. The first call of a process
/// counts.
pub fn set_guest_hook(hook: fn()) {
    let _ = HOOK.set(hook);
}

/// Called by a thread that serves a guest when it starts: of a vCPU or a virtio device.
pub fn serves_guest() {
    if let Some(hook) = HOOK.get() {
        hook();
    }
}
