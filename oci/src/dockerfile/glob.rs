//! Patterns of paths: `*` and `?` within a name, `**` for any number of names.

use thiserror::Error;

/// Maximum number of patterns in a `.dockerignore`.
const MAX_PATTERNS: usize = 10_000;
/// Maximum number of names in a pattern.
const MAX_NAMES: usize = 128;

/// Why a pattern is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum IgnoreError {
    /// The text is not a pattern.
    #[error("{pattern:?}: {why}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// The reason.
        why: &'static str,
    },
    /// There are too many patterns.
    #[error("a .dockerignore has at most {MAX_PATTERNS} patterns")]
    TooMany,
}

/// A pattern of paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(Vec<String>);

impl Pattern {
    /// Parses a pattern. A leading slash and `.` components are ignored.
    ///
    /// # Errors
    /// When it leaves the directory, or has brackets.
    pub fn parse(text: &str) -> Result<Self, IgnoreError> {
        let refused = |why| IgnoreError::Pattern { pattern: text.chars().take(200).collect(), why };
        let mut names: Vec<String> = Vec::new();
        for name in text.split('/').filter(|name| !name.is_empty() && *name != ".") {
            match name {
                ".." => drop(names.pop().ok_or_else(|| refused("it leaves the directory of the build"))?),
                // Two in a row equal one.
                "**" if names.last().is_some_and(|last| last == "**") => {}
                name => names.push(name.to_owned()),
            }
        }
        if names.len() > MAX_NAMES {
            return Err(refused("it has too many names"));
        }
        match text.contains(['[', ']', '\0']) {
            true => Err(refused("brackets are not known here")),
            false => Ok(Self(names)),
        }
    }

    /// The path, if the pattern matches one path only: without slashes at its ends, and empty for
    /// the directory itself.
    #[must_use]
    pub fn path(&self) -> Option<String> {
        let is_plain = self.0.iter().all(|name| !name.contains(['*', '?']));
        is_plain.then(|| self.0.join("/"))
    }

    /// Number of names in each path that the pattern matches, or none if that differs.
    #[must_use]
    pub fn depth(&self) -> Option<usize> {
        let is_any = self.0.iter().any(|name| name == "**");
        (!is_any).then_some(self.0.len())
    }

    /// Whether the pattern matches the whole path.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        let names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
        // The prefixes of the path that match the pattern so far.
        let mut reached = vec![false; names.len() + 1];
        reached[0] = true;
        for part in &self.0 {
            let mut next = vec![false; names.len() + 1];
            if part == "**" {
                let mut any = false;
                for (at, is_reached) in reached.iter().enumerate() {
                    any |= is_reached;
                    next[at] = any;
                }
            } else {
                for at in 0..names.len() {
                    next[at + 1] = reached[at] && name_matches(part.as_bytes(), names[at].as_bytes());
                }
            }
            reached = next;
        }
        reached[names.len()]
    }
}

/// Whether a pattern with `*` and `?` matches the name.
fn name_matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut of, mut star) = (0, 0, None);
    while at < name.len() {
        match pattern.get(of) {
            Some(b'*') => {
                star = Some((of, at));
                of += 1;
            }
            Some(byte) if *byte == b'?' || *byte == name[at] => {
                (at, of) = (at + 1, of + 1);
            }
            // The last star matches one more byte.
            _ => match star {
                Some((place, taken)) => {
                    (of, at) = (place + 1, taken + 1);
                    star = Some((place, at));
                }
                None => return false,
            },
        }
    }
    pattern[of..].iter().all(|byte| *byte == b'*')
}

/// The patterns of a `.dockerignore`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ignore(Vec<(bool, Pattern)>);

impl Ignore {
    /// Parses a `.dockerignore`.
    ///
    /// # Errors
    /// When a line is not a pattern.
    pub fn parse(text: &str) -> Result<Self, IgnoreError> {
        let mut all = Vec::new();
        for line in text.trim_start_matches('\u{feff}').lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (is_left_out, pattern) = line.strip_prefix('!').map_or((true, line), |rest| (false, rest.trim()));
            all.push((is_left_out, Pattern::parse(pattern)?));
            if all.len() > MAX_PATTERNS {
                return Err(IgnoreError::TooMany);
            }
        }
        Ok(Self(all))
    }

    /// Whether a path is ignored. A pattern also matches paths below its own, and the last match
    /// decides.
    #[must_use]
    pub fn leaves_out(&self, path: &str) -> bool {
        let matches = |pattern: &Pattern| {
            let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
            !pattern.0.is_empty() && ends.into_iter().any(|end| pattern.matches(&path[..end]))
        };
        let last = self.0.iter().rev().find(|(_, pattern)| matches(pattern));
        last.is_some_and(|(is_left_out, _)| *is_left_out)
    }

    /// Whether a path below an ignored one may be included by an exception.
    #[must_use]
    pub fn has_exceptions(&self) -> bool {
        self.0.iter().any(|(is_left_out, _)| !is_left_out)
    }
}
