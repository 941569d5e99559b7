//! Lines on standard error: the console, if the agent is PID 1.

macro_rules! log {
    ($($arg:tt)*) => {{
        use std::io::Write;
        // One write: each one is a system call, and several interrupts of a serial line. A failed
        // write to the console cannot be reported.
        let line = format!("clade-agent: {}\n", format_args!($($arg)*));
        let _ = std::io::stderr().write_all(line.as_bytes());
    }};
}

pub(crate) use log;
