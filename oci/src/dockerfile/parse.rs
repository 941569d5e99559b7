//! Instructions of a Dockerfile.

use super::lex::{Line, lines};
use super::{Command, Copy, Dockerfile, DockerfileError, Instruction, Placed};

/// The supported instructions.
const NAMES: [&str; 11] =
    ["RUN", "CMD", "ENTRYPOINT", "ENV", "ARG", "WORKDIR", "USER", "COPY", "EXPOSE", "LABEL", "FROM"];
/// Length to which each text is cut for display.
const MAX_SHOWN: usize = 200;

pub(super) fn parse(text: &str) -> Result<Dockerfile, DockerfileError> {
    let (mut before, mut from, mut rest) = (Vec::new(), None, Vec::new());
    for line in lines(text)? {
        let refused = |why: &str| DockerfileError::new(line.number, &line.name, why);
        let Some(name) = NAMES.into_iter().find(|name| *name == line.name) else {
            return Err(refused(unknown(&line.name)));
        };
        match (name, &from) {
            ("FROM", Some(_)) => return Err(refused("several stages are not supported")),
            ("FROM", None) => from = Some((line.number, base(&line)?)),
            ("ARG", None) => {
                before.extend(arguments(&line)?.into_iter().map(|(name, value)| (line.number, name, value)));
            }
            (_, None) => return Err(refused("FROM comes first")),
            (name, Some(_)) => {
                let instruction = instruction(name, &line)?;
                let text = format!("{name} {}", line.rest).chars().take(MAX_SHOWN).collect();
                rest.push(Placed { line: line.number, name, text, instruction });
            }
        }
    }
    let from = from.ok_or_else(|| DockerfileError::new(1, "FROM", "is missing"))?;
    Ok(Dockerfile { before, from, rest })
}

fn unknown(name: &str) -> &'static str {
    match name {
        "ADD" => "is not supported: COPY takes files of the directory, and RUN fetches what is elsewhere",
        "HEALTHCHECK" => "is not supported: a template has a ready command instead",
        "SHELL" | "VOLUME" | "STOPSIGNAL" | "ONBUILD" | "MAINTAINER" => "is not supported",
        _ => "there is no such instruction",
    }
}

/// The image of `FROM`.
fn base(line: &Line) -> Result<String, DockerfileError> {
    let refused = |why: String| DockerfileError::new(line.number, "FROM", why);
    let (flags, rest) = flags(&line.rest);
    for (name, value) in flags {
        match (name, value) {
            ("platform", "linux/amd64" | "$TARGETPLATFORM" | "$BUILDPLATFORM") => {}
            (name, value) => return Err(refused(format!("--{name}={value} is not supported"))),
        }
    }
    let words: Vec<&str> = rest.split_whitespace().collect();
    match words[..] {
        ["scratch"] => Err(refused("scratch has nothing to run".to_owned())),
        [image] => Ok(image.to_owned()),
        [image, word, _] if word.eq_ignore_ascii_case("as") => Ok(image.to_owned()),
        _ => Err(refused(format!("{rest:?} is no image"))),
    }
}

/// The leading words `--NAME=VALUE`, and the rest.
fn flags(text: &str) -> (Vec<(&str, &str)>, &str) {
    let (mut all, mut rest) = (Vec::new(), text);
    while let Some(behind) = rest.strip_prefix("--") {
        let (flag, behind) = behind.split_once(char::is_whitespace).unwrap_or((behind, ""));
        all.push(flag.split_once('=').unwrap_or((flag, "")));
        rest = behind.trim_start();
    }
    (all, rest)
}

/// A list as JSON. Any other text is meant for a shell.
fn list(text: &str) -> Option<Vec<String>> {
    text.starts_with('[').then(|| serde_json::from_str(text).ok()).flatten()
}

fn command(line: &Line) -> Result<Command, DockerfileError> {
    let refused = |why: String| DockerfileError::new(line.number, &line.name, why);
    let (flags, rest) = flags(&line.rest);
    if let Some((name, _)) = flags.first() {
        return Err(refused(format!("--{name} is not supported")));
    }
    match list(rest) {
        Some(words) if words.is_empty() && line.name == "RUN" => Err(refused("names no program".to_owned())),
        Some(words) if words.iter().any(|word| word.contains('\0')) => Err(refused("has a zero byte".to_owned())),
        Some(words) => Ok(Command::Exec(words)),
        None if rest.is_empty() => Err(refused("names no program".to_owned())),
        None => {
            here_document(line)?;
            Ok(Command::Shell(rest.to_owned()))
        }
    }
}

/// Refuses `<<WORD`, whose text would be in the next lines.
fn here_document(line: &Line) -> Result<(), DockerfileError> {
    let is_one = |word: &str| {
        let word = word.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix("<<");
        word.is_some_and(|word| !word.is_empty() && !word.contains('<'))
    };
    match line.rest.split_whitespace().find(|word| is_one(word)) {
        Some(word) => Err(DockerfileError::new(line.number, &line.name, format!("{word}: no here-documents"))),
        None => Ok(()),
    }
}

/// Words of a line. Blanks within quotes, and after a backslash, are parts of a word, and quotes
/// stay.
fn words(text: &str) -> Vec<String> {
    let (mut all, mut word, mut quote) = (Vec::new(), String::new(), None);
    let mut chars = text.chars();
    while let Some(next) = chars.next() {
        match (next, quote) {
            ('\\', None | Some('"')) => {
                word.push('\\');
                word.extend(chars.next());
            }
            (next @ ('"' | '\''), None) => {
                quote = Some(next);
                word.push(next);
            }
            (next, None) if next.is_whitespace() => all.extend(Some(std::mem::take(&mut word))),
            (next, open) => {
                quote = open.filter(|open| *open != next);
                word.push(next);
            }
        }
    }
    all.push(word);
    all.retain(|word| !word.is_empty());
    all
}

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.bytes().all(|b| b == b'_' || b.is_ascii_alphanumeric())
        && !name.as_bytes()[0].is_ascii_digit()
}

fn arguments(line: &Line) -> Result<Vec<(String, Option<String>)>, DockerfileError> {
    let refused = |why: String| DockerfileError::new(line.number, "ARG", why);
    let mut all = Vec::new();
    for word in words(&line.rest) {
        let (name, value) = word.split_once('=').map_or((word.as_str(), None), |(name, value)| (name, Some(value)));
        if !is_name(name) {
            return Err(refused(format!("{name:?} is no name")));
        }
        all.push((name.to_owned(), value.map(str::to_owned)));
    }
    if all.is_empty() { Err(refused("names nothing".to_owned())) } else { Ok(all) }
}

/// `NAME=VALUE` several times, or `NAME VALUE` once.
fn variables(line: &Line) -> Result<Vec<(String, String)>, DockerfileError> {
    pairs(line, is_name)
}

/// The same with any names, which may be quoted.
fn labels(line: &Line) -> Result<Vec<(String, String)>, DockerfileError> {
    pairs(line, |name| !name.is_empty())
}

fn pairs(line: &Line, is_name: impl Fn(&str) -> bool) -> Result<Vec<(String, String)>, DockerfileError> {
    let refused = |why: String| DockerfileError::new(line.number, &line.name, why);
    let pair = |name: &str, value: &str| match is_name(name) {
        true => Ok((name.to_owned(), value.to_owned())),
        false => Err(refused(format!("{name:?} is no name"))),
    };
    let words = words(&line.rest);
    match words.first() {
        None => Err(refused("names nothing".to_owned())),
        Some(first) if first.contains('=') => {
            let equal = |word: &String| {
                let (name, value) = word.split_once('=').ok_or_else(|| refused(format!("{word:?} has no value")))?;
                pair(name, value)
            };
            words.iter().map(equal).collect()
        }
        Some(_) => {
            let (name, value) = line.rest.split_once(char::is_whitespace).unwrap_or((&line.rest, ""));
            if value.is_empty() {
                return Err(refused(format!("{name:?} has no value")));
            }
            Ok(vec![pair(name, value.trim_start())?])
        }
    }
}

fn copy(line: &Line) -> Result<Copy, DockerfileError> {
    let refused = |why: String| DockerfileError::new(line.number, "COPY", why);
    let (flags, rest) = flags(&line.rest);
    let (mut owner, mut mode) = (None, None);
    for (name, value) in flags {
        match name {
            "chown" => owner = Some(value.to_owned()),
            "chmod" => mode = Some(value.to_owned()),
            // This flag concerns layers, which do not exist here.
            "link" => {}
            "from" => return Err(refused("--from: several stages are not supported".to_owned())),
            name => return Err(refused(format!("--{name} is not supported"))),
        }
    }
    here_document(line)?;
    let mut sources = list(rest).unwrap_or_else(|| rest.split_whitespace().map(str::to_owned).collect());
    match sources.pop() {
        Some(to) if !sources.is_empty() => Ok(Copy { sources, to, owner, mode }),
        _ => Err(refused("what is copied, and where to?".to_owned())),
    }
}

fn instruction(name: &str, line: &Line) -> Result<Instruction, DockerfileError> {
    let text = || match line.rest.as_str() {
        "" => Err(DockerfileError::new(line.number, name, "names nothing")),
        text => Ok(text.to_owned()),
    };
    Ok(match name {
        "RUN" => Instruction::Run(command(line)?),
        "CMD" => Instruction::Cmd(command(line)?),
        "ENTRYPOINT" => Instruction::Entrypoint(command(line)?),
        "ENV" => Instruction::Env(variables(line)?),
        "ARG" => Instruction::Arg(arguments(line)?),
        "WORKDIR" => Instruction::Workdir(text()?),
        "USER" => Instruction::User(text()?),
        "COPY" => Instruction::Copy(copy(line)?),
        "LABEL" => Instruction::Label(labels(line)?),
        _ => Instruction::Expose(words(&text()?)),
    })
}
