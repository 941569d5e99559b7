//! Tests as processes: limits, and processes of their own for tests that change limits.

use std::process::Command;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Set in the processes that [`in_a_process_of_its_own`] starts.
const OWN_PROCESS: &str = "CLADE_TEST_OWN_PROCESS";

/// Returns true in a process that runs only the test called `name`. Otherwise starts that process,
/// waits for it, passes its verdict on and returns false. No other test of the binary has a
/// [`Turn`](crate::Turn::take) of its own meanwhile: call it before that.
///
/// # Panics
/// When the test fails there.
#[must_use]
pub fn in_a_process_of_its_own(name: &str) -> bool {
    if std::env::var_os(OWN_PROCESS).is_some() {
        return true;
    }
    // The pipes to it are descriptors of this process, which another test may be counting.
    let _place = crate::shared();
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new(program);
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]).env(OWN_PROCESS, "1");
    let output = command.output().expect("the test's own process");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} failed in a process of its own ({}):\n{text}", output.status);
    assert!(text.contains("1 passed"), "there is no test called {name}:\n{text}");
    print!("{text}");
    false
}

/// Lets the process open `extra` more files and no others. A drop restores the limit.
///
/// # Panics
/// When /proc cannot be read.
#[must_use]
pub fn open_files_limit(extra: usize) -> impl Drop {
    struct Restore(Rlimit);
    impl Drop for Restore {
        fn drop(&mut self) {
            let _ = setrlimit(Resource::Nofile, self.0);
        }
    }
    // The limit is on the numbers, and there may be gaps.
    let free = |number: &u64| std::fs::read_link(format!("/proc/self/fd/{number}")).is_err();
    let limit = (0u64..).filter(free).nth(extra).expect("numbers do not end");
    let before = getrlimit(Resource::Nofile);
    let now = Rlimit { current: Some(limit), maximum: before.maximum };
    setrlimit(Resource::Nofile, now).expect("a lower limit is always allowed");
    Restore(before)
}
