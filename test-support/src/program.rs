//! Programs that a test writes and runs.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Writes the program `path` with these permissions, in a process of its own: programs that other tests start
/// meanwhile would inherit a descriptor that is open for writing, and then the kernel does not execute it (ETXTBSY).
///
/// # Panics
/// When it cannot be written.
pub fn write_program(path: impl AsRef<Path>, text: &str, mode: u32) {
    let path = path.as_ref();
    let mut install = Command::new("install");
    install.arg(format!("--mode={mode:o}")).arg("/dev/stdin").arg(path).stdin(Stdio::piped());
    let written = install.spawn().and_then(|mut install| {
        // The pipe is closed behind the text.
        install.stdin.take().expect("it was piped").write_all(text.as_bytes())?;
        install.wait()
    });
    assert!(written.as_ref().is_ok_and(std::process::ExitStatus::success), "{}: {written:?}", path.display());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_was_written_runs_while_others_are_started() {
        // Removed by the last line; a directory of the crate's own would need another crate.
        let dir = std::env::temp_dir().join(format!("clade-write-program-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let dir = &dir;
                scope.spawn(move || {
                    for round in 0..25 {
                        let path = dir.join(format!("{thread}-{round}"));
                        write_program(&path, &format!("#!/bin/sh\necho {thread} {round}\n"), 0o755);
                        let said = Command::new(&path).output().unwrap().stdout;
                        assert_eq!(String::from_utf8(said).unwrap(), format!("{thread} {round}\n"));
                    }
                });
            }
        });
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
