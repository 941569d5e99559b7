//! Lines on standard error: the console, if the agent is PID 1.

macro_rules! log {
    ($($arg:tt)*) => {{
        use std::io::Write;
        // Nothing can be done about a console that is gone.
        let _ = writeln!(std::io::stderr(), "clade-agent: {}", format_args!($($arg)*));
    }};
}

pub(crate) use log;
