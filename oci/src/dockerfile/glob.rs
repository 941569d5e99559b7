//! Patterns of paths: `*`, `?` and classes within a name, `**` for any number of names.

use std::str::Chars;

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
pub struct Pattern(Vec<NamePattern>);

/// The pattern of one name of a path, or of several.
#[derive(Clone, Debug, PartialEq, Eq)]
enum NamePattern {
    /// `**`: any number of names.
    Any,
    /// One name.
    One(Vec<Element>),
}

/// An element of a name's pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Element {
    /// `*`: any number of characters.
    Star,
    /// `?`: one character.
    Any,
    /// This character.
    Char(char),
    /// `[a-z]`, or `[^a-z]`: a character that is in one of the ranges, or in none.
    Class { is_negated: bool, ranges: Vec<(char, char)> },
}

impl Element {
    /// Whether a character matches. A star matches none by itself.
    fn matches(&self, char: char) -> bool {
        match self {
            Self::Star => false,
            Self::Any => true,
            Self::Char(own) => *own == char,
            Self::Class { is_negated, ranges } => {
                ranges.iter().any(|(first, last)| (*first..=*last).contains(&char)) != *is_negated
            }
        }
    }
}

/// A fault of a name's pattern.
type Fault = &'static str;

/// The elements of a name's pattern, as Docker has them: `\` takes the next character literally, also in a class.
fn elements(name: &str) -> Result<Vec<Element>, Fault> {
    let (mut chars, mut elements) = (name.chars(), Vec::new());
    while let Some(char) = chars.next() {
        elements.push(match char {
            '*' => Element::Star,
            '?' => Element::Any,
            '[' => class(&mut chars)?,
            '\\' => Element::Char(chars.next().ok_or(NOTHING_ESCAPED)?),
            '\0' => return Err("no path has a NUL"),
            char => Element::Char(char),
        });
    }
    Ok(elements)
}

const NOTHING_ESCAPED: Fault = "a backslash is not followed by a character";
const NO_END: Fault = "a class has no closing bracket";

/// A class, after its opening bracket.
fn class(chars: &mut Chars<'_>) -> Result<Element, Fault> {
    let mut ahead = chars.clone();
    let is_negated = ahead.next() == Some('^');
    if is_negated {
        *chars = ahead;
    }
    let mut ranges = Vec::new();
    loop {
        if chars.as_str().starts_with(']') && !ranges.is_empty() {
            chars.next();
            return Ok(Element::Class { is_negated, ranges });
        }
        let first = class_char(chars)?;
        let is_range = chars.as_str().starts_with('-');
        if is_range {
            chars.next();
        }
        ranges.push((first, if is_range { class_char(chars)? } else { first }));
    }
}

/// A character of a class.
fn class_char(chars: &mut Chars<'_>) -> Result<char, Fault> {
    match chars.next().ok_or(NO_END)? {
        ']' => Err("a class is empty, or a range has no end"),
        '-' => Err("a range has no start"),
        '\\' => chars.next().ok_or(NOTHING_ESCAPED),
        char => Ok(char),
    }
}

impl Pattern {
    /// Parses a pattern. A leading slash and `.` components are ignored.
    ///
    /// # Errors
    /// When it leaves the directory, or a class is malformed.
    pub fn parse(text: &str) -> Result<Self, IgnoreError> {
        let refused = |why| IgnoreError::Pattern { pattern: text.chars().take(200).collect(), why };
        let mut names: Vec<NamePattern> = Vec::new();
        for name in text.split('/').filter(|name| !name.is_empty() && *name != ".") {
            match name {
                ".." => drop(names.pop().ok_or_else(|| refused("it leaves the directory of the build"))?),
                // Two in a row equal one.
                "**" if names.last() == Some(&NamePattern::Any) => {}
                "**" => names.push(NamePattern::Any),
                name => names.push(NamePattern::One(elements(name).map_err(refused)?)),
            }
        }
        if names.len() > MAX_NAMES {
            return Err(refused("it has too many names"));
        }
        Ok(Self(names))
    }

    /// The path, if the pattern matches one path only: without slashes at its ends, and empty for
    /// the directory itself.
    #[must_use]
    pub fn path(&self) -> Option<String> {
        let char = |element: &Element| if let Element::Char(char) = element { Some(*char) } else { None };
        let name = |name: &NamePattern| match name {
            NamePattern::Any => None,
            NamePattern::One(elements) => elements.iter().map(char).collect::<Option<String>>(),
        };
        Some(self.0.iter().map(name).collect::<Option<Vec<_>>>()?.join("/"))
    }

    /// Number of names in each path that the pattern matches, or none if that differs.
    #[must_use]
    pub fn depth(&self) -> Option<usize> {
        let is_any = self.0.contains(&NamePattern::Any);
        (!is_any).then_some(self.0.len())
    }

    /// Whether the pattern matches the whole path.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        let names: Vec<Vec<char>> =
            path.split('/').filter(|name| !name.is_empty()).map(|name| name.chars().collect()).collect();
        // The prefixes of the path that match the pattern so far.
        let mut reached = vec![false; names.len() + 1];
        reached[0] = true;
        for part in &self.0 {
            let mut next = vec![false; names.len() + 1];
            match part {
                NamePattern::Any => {
                    let mut any = false;
                    for (at, is_reached) in reached.iter().enumerate() {
                        any |= is_reached;
                        next[at] = any;
                    }
                }
                NamePattern::One(elements) => {
                    for at in 0..names.len() {
                        next[at + 1] = reached[at] && name_matches(elements, &names[at]);
                    }
                }
            }
            reached = next;
        }
        reached[names.len()]
    }
}

/// Whether a name's pattern matches the name.
fn name_matches(pattern: &[Element], name: &[char]) -> bool {
    let (mut at, mut of, mut star) = (0, 0, None);
    while at < name.len() {
        match pattern.get(of) {
            Some(Element::Star) => {
                star = Some((of, at));
                of += 1;
            }
            Some(element) if element.matches(name[at]) => {
                (at, of) = (at + 1, of + 1);
            }
            // The last star matches one more character.
            _ => match star {
                Some((place, taken)) => {
                    (of, at) = (place + 1, taken + 1);
                    star = Some((place, at));
                }
                None => return false,
            },
        }
    }
    pattern[of..].iter().all(|element| *element == Element::Star)
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
