//! Messages of `process.Process`.

use std::collections::BTreeMap;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::json::{Base64, is_default, number};

/// What is run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ProcessConfig {
    /// The program.
    #[serde(skip_serializing_if = "is_default")]
    pub cmd: String,
    /// Its arguments, without its name.
    #[serde(skip_serializing_if = "is_default")]
    pub args: Vec<String>,
    /// Variables beside the default ones.
    #[serde(skip_serializing_if = "is_default")]
    pub envs: BTreeMap<String, String>,
    /// The working directory.
    #[serde(skip_serializing_if = "is_default")]
    pub cwd: Option<String>,
}

/// A terminal's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Size {
    /// Characters a line.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "number::deserialize")]
    pub cols: u32,
    /// Lines.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "number::deserialize")]
    pub rows: u32,
}

/// A terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pty {
    /// Its size.
    pub size: Size,
}

/// Starts a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StartRequest {
    /// What is run.
    pub process: ProcessConfig,
    /// The terminal it gets.
    #[serde(skip_serializing_if = "is_default")]
    pub pty: Option<Pty>,
    /// A name to find it by.
    #[serde(skip_serializing_if = "is_default")]
    pub tag: Option<String>,
    /// Whether it has a standard input that can be written. Left out, it has.
    #[serde(skip_serializing_if = "is_default")]
    pub stdin: Option<bool>,
}

/// Names a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Selector {
    /// By its number.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "number::optional")]
    pub pid: Option<u32>,
    /// By its tag.
    #[serde(skip_serializing_if = "is_default")]
    pub tag: Option<String>,
}

impl Selector {
    /// The process `pid`.
    #[must_use]
    pub fn pid(pid: u32) -> Self {
        Self { pid: Some(pid), tag: None }
    }
}

/// A process that runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessInfo {
    /// What is run.
    pub config: ProcessConfig,
    /// Its number.
    #[serde(deserialize_with = "number::deserialize")]
    pub pid: u32,
    /// Its tag.
    #[serde(skip_serializing_if = "is_default")]
    pub tag: Option<String>,
}

/// The processes that run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ListResponse {
    /// Each of them.
    #[serde(skip_serializing_if = "is_default")]
    pub processes: Vec<ProcessInfo>,
}

/// A process has started, or is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StartEvent {
    /// Its number.
    #[serde(deserialize_with = "number::deserialize")]
    pub pid: u32,
}

/// What a process has written: one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataEvent {
    /// To its standard output.
    #[serde(skip_serializing_if = "is_default")]
    pub stdout: Option<Base64>,
    /// To its standard error.
    #[serde(skip_serializing_if = "is_default")]
    pub stderr: Option<Base64>,
    /// To its terminal.
    #[serde(skip_serializing_if = "is_default")]
    pub pty: Option<Base64>,
}

/// A process has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct EndEvent {
    /// Its exit code; -1 if a signal ended it.
    #[serde(skip_serializing_if = "is_default", alias = "exit_code", deserialize_with = "number::deserialize")]
    pub exit_code: i32,
    /// Whether it ended by itself.
    #[serde(skip_serializing_if = "is_default")]
    pub exited: bool,
    /// The same in words: `exit status 3`, `signal: killed`.
    #[serde(skip_serializing_if = "is_default")]
    pub status: String,
    /// Set if it failed.
    #[serde(skip_serializing_if = "is_default")]
    pub error: Option<String>,
}

/// What envd calls the signals from 1 on.
const SIGNALS: [&str; 15] = [
    "hangup",
    "interrupt",
    "quit",
    "illegal instruction",
    "trace/breakpoint trap",
    "aborted",
    "bus error",
    "floating point exception",
    "killed",
    "user defined signal 1",
    "segmentation fault",
    "user defined signal 2",
    "broken pipe",
    "alarm clock",
    "terminated",
];

/// What envd calls a signal.
#[must_use]
pub fn signal_name(number: i32) -> String {
    let known = usize::try_from(number).ok().and_then(|number| SIGNALS.get(number.checked_sub(1)?));
    known.map_or_else(|| format!("signal {number}"), |name| (*name).to_owned())
}

impl EndEvent {
    /// The exit code that a shell would give: 128 and its number for a signal.
    #[must_use]
    pub fn shell_code(&self) -> u8 {
        if self.exited {
            return u8::try_from(self.exit_code).unwrap_or(1);
        }
        let name = self.status.strip_prefix("signal: ").unwrap_or_default().trim_end_matches(" (core dumped)");
        let number = (1..=64).find(|number| signal_name(*number) == name);
        number.map_or(1, |number| 128 + number as u8)
    }
}

/// Nothing has happened; the stream is alive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepAlive {}

/// What happens to a process: one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessEvent {
    /// It has started.
    #[serde(skip_serializing_if = "is_default")]
    pub start: Option<StartEvent>,
    /// It has written something.
    #[serde(skip_serializing_if = "is_default")]
    pub data: Option<DataEvent>,
    /// It has ended.
    #[serde(skip_serializing_if = "is_default")]
    pub end: Option<EndEvent>,
    /// Nothing.
    #[serde(skip_serializing_if = "is_default")]
    pub keepalive: Option<KeepAlive>,
}

/// A message of the stream of `Start` and `Connect`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EventResponse {
    /// What has happened.
    pub event: ProcessEvent,
}

/// Follows a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConnectRequest {
    /// Which.
    pub process: Selector,
}

/// Gives a process's terminal another size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UpdateRequest {
    /// Which.
    pub process: Selector,
    /// The size.
    #[serde(skip_serializing_if = "is_default")]
    pub pty: Option<Pty>,
}

/// What a process is to read: one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessInput {
    /// On its standard input.
    #[serde(skip_serializing_if = "is_default")]
    pub stdin: Option<Base64>,
    /// On its terminal.
    #[serde(skip_serializing_if = "is_default")]
    pub pty: Option<Base64>,
}

/// Writes to a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SendInputRequest {
    /// Which.
    pub process: Selector,
    /// What.
    pub input: ProcessInput,
}

/// Begins a stream of input.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct InputStart {
    /// For which process.
    pub process: Selector,
}

/// A piece of a stream of input.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct InputData {
    /// The bytes.
    pub input: ProcessInput,
}

/// A message of a stream of input: one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StreamInputRequest {
    /// The first.
    #[serde(skip_serializing_if = "is_default")]
    pub start: Option<InputStart>,
    /// Those after it.
    #[serde(skip_serializing_if = "is_default")]
    pub data: Option<InputData>,
    /// Nothing.
    #[serde(skip_serializing_if = "is_default")]
    pub keepalive: Option<KeepAlive>,
}

/// Closes a process's standard input.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CloseStdinRequest {
    /// Which.
    pub process: Selector,
}

/// A signal's number. SIGTERM and SIGKILL have names in the protocol; others are written as numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signal(pub i32);

impl Signal {
    /// SIGTERM.
    pub const TERM: Self = Self(15);
    /// SIGKILL.
    pub const KILL: Self = Self(9);
}

impl Serialize for Signal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::TERM => serializer.serialize_str("SIGNAL_SIGTERM"),
            Self::KILL => serializer.serialize_str("SIGNAL_SIGKILL"),
            Self(number) => serializer.serialize_i32(number),
        }
    }
}

impl<'de> Deserialize<'de> for Signal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::String(name) => match name.as_str() {
                "SIGNAL_SIGTERM" => Ok(Self::TERM),
                "SIGNAL_SIGKILL" => Ok(Self::KILL),
                "SIGNAL_UNSPECIFIED" => Ok(Self::default()),
                _ => Err(D::Error::custom(format_args!("{name:?} is no signal"))),
            },
            value => number::deserialize(value).map(Self).map_err(D::Error::custom),
        }
    }
}

/// Sends a signal to a process and its group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SendSignalRequest {
    /// Which.
    pub process: Selector,
    /// What.
    pub signal: Signal,
}

/// An answer that says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::{decode, encode};

    fn text<T: Serialize>(message: &T) -> String {
        String::from_utf8(encode(message)).unwrap()
    }

    #[test]
    fn events_are_written_as_protobuf_writes_them() {
        let data = DataEvent { stdout: Some(Base64(b"hi\n".to_vec())), ..DataEvent::default() };
        let event = EventResponse { event: ProcessEvent { data: Some(data), ..ProcessEvent::default() } };
        assert_eq!(text(&event), r#"{"event":{"data":{"stdout":"aGkK"}}}"#);
        let end = EndEvent { exited: true, status: "exit status 0".into(), ..EndEvent::default() };
        assert_eq!(text(&end), r#"{"exited":true,"status":"exit status 0"}"#);
        let keepalive = ProcessEvent { keepalive: Some(KeepAlive {}), ..ProcessEvent::default() };
        assert_eq!(text(&keepalive), r#"{"keepalive":{}}"#);
    }

    #[test]
    fn signals_are_names_and_numbers() {
        let of = |json: &str| decode::<SendSignalRequest>(json.as_bytes()).map(|request| request.signal.0);
        assert_eq!(of(r#"{"signal":"SIGNAL_SIGTERM"}"#).unwrap(), 15);
        assert_eq!(of(r#"{"signal":2}"#).unwrap(), 2);
        assert_eq!(of("{}").unwrap(), 0);
        of(r#"{"signal":"SIGHUP"}"#).unwrap_err();
        assert_eq!(text(&Signal::KILL), r#""SIGNAL_SIGKILL""#);
    }

    #[test]
    fn ends_have_the_codes_of_shells() {
        let of = |exited, exit_code, status: &str| {
            EndEvent { exited, exit_code, status: status.into(), error: None }.shell_code()
        };
        assert_eq!([of(true, 3, "exit status 3"), of(true, 0, "exit status 0"), of(true, 300, "odd")], [3, 0, 1]);
        assert_eq!([of(false, -1, "signal: killed"), of(false, -1, "signal: signal 64")], [137, 192]);
        assert_eq!([of(false, -1, "signal: aborted (core dumped)"), of(false, -1, "odd")], [134, 1]);
    }

    #[test]
    fn snake_case_is_read() {
        assert_eq!(decode::<EndEvent>(br#"{"exit_code":3}"#).unwrap().exit_code, 3);
        assert_eq!(decode::<EndEvent>(br#"{"exitCode":-1}"#).unwrap().exit_code, -1);
    }
}
