//! A hook on threads that serve a guest, for sandboxing.

use std::sync::OnceLock;

static HOOK: OnceLock<fn()> = OnceLock::new();

/// Sets `hook`, to be called on each thread that serves a guest when it starts. Only the first call
/// of a process has an effect.
pub fn set_guest_hook(hook: fn()) {
    let _ = HOOK.set(hook);
}

/// Called by a thread that serves a guest when it starts: of a vCPU or a virtio device.
pub fn serves_guest() {
    if let Some(hook) = HOOK.get() {
        hook();
    }
}
