//! Variables and quotes within a word.

use std::fmt::Write;

/// Levels of `${a:-${b:-...}}`.
const MAX_DEPTH: usize = 16;
/// Maximum length of a word: a variable can contain its own old value many times.
const MAX_WORD: usize = 64 << 10;

type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A word without its quotes, with its variables replaced.
///
/// # Errors
/// The reason in words, when the word is invalid.
pub(super) fn expand(word: &str, lookup: Lookup<'_>) -> Result<String, String> {
    expand_at(word, lookup, 0)
}

fn expand_at(word: &str, lookup: Lookup<'_>, depth: usize) -> Result<String, String> {
    if depth > MAX_DEPTH {
        return Err(format!("variables in more than {MAX_DEPTH} levels"));
    }
    let (mut out, mut rest, mut is_quoted) = (String::new(), word, false);
    while let Some(next) = rest.chars().next() {
        let behind = &rest[next.len_utf8()..];
        rest = match next {
            '\'' if !is_quoted => {
                let (plain, behind) = behind.split_once('\'').ok_or_else(|| format!("{word:?} has an open quote"))?;
                out.push_str(plain);
                behind
            }
            '"' => {
                is_quoted = !is_quoted;
                behind
            }
            '\\' => match behind.chars().next() {
                // Within quotes a backslash is literal before other characters.
                Some(escaped) if !is_quoted || "\"$\\".contains(escaped) => {
                    out.push(escaped);
                    &behind[escaped.len_utf8()..]
                }
                _ => {
                    out.push('\\');
                    behind
                }
            },
            '$' => variable(behind, &mut out, lookup, depth)?,
            other => {
                out.push(other);
                behind
            }
        };
        if out.len() > MAX_WORD {
            return Err(format!("a word has at most {MAX_WORD} bytes"));
        }
    }
    if is_quoted { Err(format!("{word:?} has an open quote")) } else { Ok(out) }
}

fn name_length(text: &str) -> usize {
    let is_name = |(at, b): (usize, u8)| b == b'_' || b.is_ascii_alphabetic() || (at > 0 && b.is_ascii_digit());
    text.bytes().enumerate().take_while(|one| is_name(*one)).count()
}

/// Expands the variable at the beginning of `text`, after its `$`. Returns the rest of the text.
fn variable<'t>(text: &'t str, out: &mut String, lookup: Lookup<'_>, depth: usize) -> Result<&'t str, String> {
    let Some(braced) = text.strip_prefix('{') else {
        let (name, behind) = text.split_at(name_length(text));
        match name {
            "" => out.push('$'),
            name => out.push_str(&lookup(name).unwrap_or_default()),
        }
        return Ok(behind);
    };
    let length = closing(braced).ok_or_else(|| format!("${text}: without its brace"))?;
    let (inner, behind) = (&braced[..length], &braced[length + 1..]);
    let (name, operation) = inner.split_at(name_length(inner));
    let value = lookup(name).filter(|value| !value.is_empty());
    match (name, operation.as_bytes(), value) {
        ("", ..) => return Err(format!("${{{inner}}} names no variable")),
        (_, [], value) => out.push_str(&value.unwrap_or_default()),
        (_, [b':', b'-', ..], Some(value)) => out.push_str(&value),
        (_, [b':', b'-', ..], None) | (_, [b':', b'+', ..], Some(_)) => {
            out.push_str(&expand_at(&operation[2..], lookup, depth + 1)?);
        }
        (_, [b':', b'+', ..], None) => {}
        _ => {
            let mut why = String::new();
            // Writing to a String does not fail.
            let _ = write!(why, "${{{inner}}}: only ${{{name}:-word}} and ${{{name}:+word}} are known");
            return Err(why);
        }
    }
    Ok(behind)
}

/// Position of the brace that closes the one open before `text`.
fn closing(text: &str) -> Option<usize> {
    let (mut open, mut bytes) = (1, text.bytes().enumerate());
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'\\' => drop(bytes.next()),
            b'{' => open += 1,
            b'}' => open -= 1,
            _ => {}
        }
        if open == 0 {
            return Some(at);
        }
    }
    None
}
