//! Lines on standard error: the console, if the agent is PID 1.

macro_rules! log {
    ($($arg:tt)*) => {{
        use std::io::Write;
        // A failed write to the console cannot be reported.
        let _ = writeln!(std::io::stderr(), "clade-agent: {}", format_args!($($arg)*));
    }};
}

pub(crate) use log;
