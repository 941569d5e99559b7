//! Messages of `process.Process`.

use std::collections::BTreeMap;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::json::{Base64, is_default, number};

/// The program of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ProcessConfig {
    /// The program.
    #[serde(skip_serializing_if = "is_default")]
    pub cmd: String,
    /// Its arguments, without its name.
    #[serde(skip_serializing_if = "is_default")]
    pub args: Vec<String>,
    /// Variables in addition to the default ones.
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
    /// The program.
    pub process: ProcessConfig,
    /// The terminal it gets.
    #[serde(skip_serializing_if = "is_default")]
    pub pty: Option<Pty>,
    /// A name to find it by.
    #[serde(skip_serializing_if = "is_default")]
    pub tag: Option<String>,
    /// Whether it has a writable standard input. Left out: yes.
    #[serde(skip_serializing_if = "is_default")]
    pub stdin: Option<bool>,
    /// Whether the other programs of its group are killed when it has ended, and output that programs
    /// hold open is not waited for. Not of envd.
    #[serde(rename = "cladeKillRest", skip_serializing_if = "is_default")]
    pub kill_rest: bool,
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

/// A running process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessInfo {
    /// The program.
    pub config: ProcessConfig,
    /// Its number.
    #[serde(deserialize_with = "number::deserialize")]
    pub pid: u32,
    /// Its tag.
    #[serde(skip_serializing_if = "is_default")]
    pub tag: Option<String>,
}

/// The running processes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ListResponse {
    /// The processes.
    #[serde(skip_serializing_if = "is_default")]
    pub processes: Vec<ProcessInfo>,
}

/// A process has started, or was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StartEvent {
    /// Its number.
    #[serde(deserialize_with = "number::deserialize")]
    pub pid: u32,
}

/// Output of a process: one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataEvent {
    /// Bytes of its standard output.
    #[serde(skip_serializing_if = "is_default")]
    pub stdout: Option<Base64>,
    /// Bytes of its standard error.
    #[serde(skip_serializing_if = "is_default")]
    pub stderr: Option<Base64>,
    /// Bytes of its terminal.
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
    /// Whether it exited by itself, and not by a signal.
    #[serde(skip_serializing_if = "is_default")]
    pub exited: bool,
    /// The same in words: `exit status 3`, `signal: killed`.
    #[serde(skip_serializing_if = "is_default")]
    pub status: String,
    /// Set if it failed.
    #[serde(skip_serializing_if = "is_default")]
    pub error: Option<String>,
}

/// The names of envd for the signals from 1 on.
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

/// The name of envd for a signal.
#[must_use]
pub fn signal_name(number: i32) -> String {
    let known = usize::try_from(number).ok().and_then(|number| SIGNALS.get(number.checked_sub(1)?));
    known.map_or_else(|| format!("signal {number}"), |name| (*name).to_owned())
}

impl EndEvent {
    /// The exit code as in a shell: 128 plus the number for a signal.
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

/// A keepalive: the stream is alive, without an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepAlive {}

/// An event of a process: one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessEvent {
    /// The process has started.
    #[serde(skip_serializing_if = "is_default")]
    pub start: Option<StartEvent>,
    /// The process has written output.
    #[serde(skip_serializing_if = "is_default")]
    pub data: Option<DataEvent>,
    /// The process has ended.
    #[serde(skip_serializing_if = "is_default")]
    pub end: Option<EndEvent>,
    /// A keepalive.
    #[serde(skip_serializing_if = "is_default")]
    pub keepalive: Option<KeepAlive>,
}

/// A message of the stream of `Start` and `Connect`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EventResponse {
    /// The event.
    pub event: ProcessEvent,
}

/// Follows a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConnectRequest {
    /// The process.
    pub process: Selector,
}

/// Gives a process's terminal another size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UpdateRequest {
    /// The process.
    pub process: Selector,
    /// The size.
    #[serde(skip_serializing_if = "is_default")]
    pub pty: Option<Pty>,
}

/// Input of a process: one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessInput {
    /// Bytes for its standard input.
    #[serde(skip_serializing_if = "is_default")]
    pub stdin: Option<Base64>,
    /// Bytes for its terminal.
    #[serde(skip_serializing_if = "is_default")]
    pub pty: Option<Base64>,
}

/// Writes to a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SendInputRequest {
    /// The process.
    pub process: Selector,
    /// The input.
    pub input: ProcessInput,
}

/// Begins a stream of input.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct InputStart {
    /// The process.
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
    /// The first message.
    #[serde(skip_serializing_if = "is_default")]
    pub start: Option<InputStart>,
    /// The later messages.
    #[serde(skip_serializing_if = "is_default")]
    pub data: Option<InputData>,
    /// A keepalive.
    #[serde(skip_serializing_if = "is_default")]
    pub keepalive: Option<KeepAlive>,
}

/// Closes a process's standard input.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CloseStdinRequest {
    /// The process.
    pub process: Selector,
}

/// A signal's number. SIGTERM and SIGKILL have names in the protocol; others are written as
/// numbers.
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
    /// The process.
    pub process: Selector,
    /// The signal.
    pub signal: Signal,
}

/// An empty answer.
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
