//! The terminal: raw mode, which ends with the command in every case, and keyboard input.

use std::io::{self, IsTerminal};
use std::sync::{Mutex, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// The settings of standard input before raw mode, while it is in raw mode.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Standard input in raw mode until dropped.
pub(crate) struct RawMode(());

impl RawMode {
    /// `None` when standard input is not a terminal.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        // Output stays cooked, so that Clade's own lines start at the left.
        raw.output_modes = before.output_modes;
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let is_raw = Self(());
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(is_raw))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Ends raw mode: also before an exit of the process, which drops nothing.
pub(crate) fn restore() {
    if let Some(before) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

/// A user's command after Ctrl-A.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Escape {
    Leave,
}

/// Separates input for the guest from Ctrl-A commands: `x` leaves, a second Ctrl-A types one.
#[derive(Debug, Default)]
pub(crate) struct EscapeFilter {
    pending: bool,
}

impl EscapeFilter {
    pub(crate) fn feed(&mut self, typed: &[u8], to_guest: &mut Vec<u8>) -> Option<Escape> {
        const CTRL_A: u8 = 1;
        for byte in typed {
            match (std::mem::take(&mut self.pending), *byte) {
                (false, CTRL_A) => self.pending = true,
                (true, b'x' | b'X') => return Some(Escape::Leave),
                (true, CTRL_A) | (false, _) => to_guest.push(*byte),
                // Not a command: both reach the guest.
                (true, other) => to_guest.extend([CTRL_A, other]),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(parts: &[&[u8]]) -> (Vec<u8>, Option<Escape>) {
        let mut filter = EscapeFilter::default();
        let mut out = Vec::new();
        for part in parts {
            if let Some(escape) = filter.feed(part, &mut out) {
                return (out, Some(escape));
            }
        }
        (out, None)
    }

    #[test]
    fn ctrl_a_commands_are_not_typed() {
        assert_eq!(feed(&[b"ls\n"]), (b"ls\n".to_vec(), None));
        assert_eq!(feed(&[b"a\x01", b"xb"]), (b"a".to_vec(), Some(Escape::Leave)));
        assert_eq!(feed(&[b"\x01\x01x"]), (b"\x01x".to_vec(), None));
        assert_eq!(feed(&[b"\x01q"]), (b"\x01q".to_vec(), None));
    }
}
