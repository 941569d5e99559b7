//! Dockerfiles: instructions that make one image from another.
//!
//! [`Dockerfile::parse`] parses a text, and [`Dockerfile::plan`] returns the steps in a guest of
//! the base image: programs to run, files to copy, directories to make, each with its variables,
//! directory and user. Nothing is run here. Unknown instructions are refused with their line and
//! name.
//!
//! | file | contents |
//! |---|---|
//! | `lex` | lines, comments, continuations |
//! | `parse` | instructions |
//! | `expand` | variables and quotes within a word |
//! | `expose` | ports |
//! | `plan` | the steps, in order |
//! | `glob` | patterns of `.dockerignore` and of sources |

mod expand;
mod expose;
mod glob;
mod lex;
mod parse;
mod plan;
#[cfg(test)]
mod tests;

use thiserror::Error;

pub use glob::{Ignore, IgnoreError, Pattern};
pub use plan::{Action, BuildPlan, BuildStep, CopyFiles};

/// Maximum length of a Dockerfile, and of a `.dockerignore`.
pub const MAX_DOCKERFILE: usize = 1 << 20;

/// Why a Dockerfile is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("line {line}: {instruction}: {why}")]
pub struct DockerfileError {
    /// Its line, from 1.
    pub line: usize,
    /// The instruction.
    pub instruction: String,
    /// The reason.
    pub why: String,
}

impl DockerfileError {
    fn new(line: usize, instruction: &str, why: impl Into<String>) -> Self {
        // The length of a foreign text in an error is limited.
        Self { line, instruction: instruction.chars().take(32).collect(), why: why.into().chars().take(300).collect() }
    }
}

/// A program to run: a text for a shell, or a program with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Command {
    Shell(String),
    Exec(Vec<String>),
}

/// `COPY`, as in the text.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Copy {
    sources: Vec<String>,
    to: String,
    owner: Option<String>,
    mode: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Instruction {
    Run(Command),
    Cmd(Command),
    Entrypoint(Command),
    Env(Vec<(String, String)>),
    Arg(Vec<(String, Option<String>)>),
    Workdir(String),
    User(String),
    Copy(Copy),
    Label(Vec<(String, String)>),
    Expose(Vec<String>),
}

/// An instruction and its position.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Placed {
    line: usize,
    name: &'static str,
    text: String,
    instruction: Instruction,
}

/// A Dockerfile of one stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dockerfile {
    /// `ARG` before `FROM`.
    before: Vec<(usize, String, Option<String>)>,
    from: (usize, String),
    rest: Vec<Placed>,
}

impl Dockerfile {
    /// Parses a Dockerfile.
    ///
    /// # Errors
    /// When the text is not a Dockerfile, or has an unknown instruction.
    pub fn parse(text: &str) -> Result<Self, DockerfileError> {
        parse::parse(text)
    }
}
