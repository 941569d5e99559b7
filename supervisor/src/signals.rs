//! Default signals for other programs.

use std::os::unix::process::CommandExt;
use std::process::Command;

/// The last real-time signal of the kernel.
const LAST_SIGNAL: i32 = 64;

/// Has the program of `command` start with default signals, none ignored or blocked. Otherwise exec
/// would keep those of this process, such as the ones that `nohup` sets.
pub(crate) fn with_default_signals(command: &mut Command) -> &mut Command {
    let reset = || {
        // The kernel's structure: SIG_DFL, no flags, no restorer and no mask. The C library's
        // function refuses the two signals that the library uses itself.
        let action = [0_u64; 4];
        for number in 1..=LAST_SIGNAL {
            let (action, size) = (&raw const action, size_of::<u64>());
            // SAFETY: the kernel reads `action`, which lives on, and installs no handler. It
            // refuses SIGKILL and SIGSTOP with an error.
            unsafe { libc::syscall(libc::SYS_rt_sigaction, number, action, 0_usize, size) };
        }
        let (mask, size) = (0_u64, size_of::<u64>());
        // SAFETY: the kernel reads `mask`, which lives on, and returns no old mask.
        unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const mask, 0_usize, size) };
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls on values of its own: it
    // takes no lock and no memory.
    unsafe { command.pre_exec(reset) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_starts_with_default_signals_under_a_starter_that_ignores_and_blocks_some() {
        // A shell of `env` is the starter, and the test's own program its child.
        const INNER: &str = "CLADE_TEST_DEFAULT_SIGNALS";
        if std::env::var_os(INNER).is_some() {
            let status = with_default_signals(Command::new("cat").arg("/proc/self/status")).output().unwrap().stdout;
            return println!("{}", String::from_utf8_lossy(&status));
        }
        let mut command = Command::new("env");
        command.args(["--ignore-signal=HUP,INT", "--block-signal=TERM"]).arg(std::env::current_exe().unwrap());
        let name = "signals::tests::a_program_starts_with_default_signals_under_a_starter_that_ignores_and_blocks_some";
        command.args(["--exact", name, "--nocapture"]).env(INNER, "1");
        let said = command.output().unwrap();
        let text = String::from_utf8_lossy(&said.stdout);
        for signals in ["SigIgn:\t0000000000000000", "SigBlk:\t0000000000000000"] {
            assert!(text.contains(signals), "{signals} in {text}");
        }
    }
}
