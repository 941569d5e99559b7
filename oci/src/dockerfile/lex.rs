//! Lines of a Dockerfile: comments left out, continuations joined.

use super::{DockerfileError, MAX_DOCKERFILE};

/// An instruction with its text, and the line in which it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) number: usize,
    pub(super) name: String,
    pub(super) rest: String,
}

/// Parses a comment as a directive: its name and value. Directives precede everything else.
fn directive(line: &str) -> Option<(String, &str)> {
    let (name, value) = line.trim().strip_prefix('#')?.split_once('=')?;
    let name = name.trim().to_ascii_lowercase();
    name.bytes().all(|b| b.is_ascii_alphabetic()).then_some((name, value.trim()))
}

/// The text without the backslash that continues it on the next line. Two backslashes are an escaped one.
fn continued(line: &str) -> Option<&str> {
    line.trim_end().strip_suffix('\\').filter(|line| !line.ends_with('\\'))
}

/// The instructions of a text.
pub(super) fn lines(text: &str) -> Result<Vec<Line>, DockerfileError> {
    if text.len() > MAX_DOCKERFILE {
        return Err(DockerfileError::new(1, "#", format!("a Dockerfile has at most {MAX_DOCKERFILE} bytes")));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let (mut all, mut open): (Vec<Line>, Option<(usize, String)>) = (Vec::new(), None);
    let mut may_direct = true;
    for (at, line) in text.lines().enumerate() {
        let number = at + 1;
        let trimmed = line.trim();
        match directive(line).filter(|_| may_direct) {
            Some((name, value)) if name == "escape" && value != "\\" => {
                return Err(DockerfileError::new(number, "# escape", format!("{value:?}: only \\ continues a line")));
            }
            Some(_) => continue,
            None => may_direct = false,
        }
        // Also between the lines of one instruction.
        if trimmed.is_empty() || trimmed.starts_with('#') {
            continue;
        }
        let (number, before) = open.take().unwrap_or((number, String::new()));
        match continued(line) {
            Some(line) => open = Some((number, before + line)),
            None => all.push(split(number, &(before + line))),
        }
    }
    // The last line may end with a backslash.
    all.extend(open.filter(|(_, text)| !text.trim().is_empty()).map(|(number, text)| split(number, &text)));
    Ok(all)
}

fn split(number: usize, text: &str) -> Line {
    let text = text.trim();
    let (name, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    Line { number, name: name.to_ascii_uppercase(), rest: rest.trim().to_owned() }
}
