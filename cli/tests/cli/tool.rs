//! Runs the binary, and sends requests to its sockets.

use std::collections::BTreeSet;
use std::fs::{DirEntry, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use clade_host_io::Tap;
use clade_test_support::{PatientStream, TapName};
pub(crate) use clade_test_support::{required, wait_until};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// The binary under test.
pub(crate) const CLADE: &str = env!("CARGO_BIN_EXE_clade");

/// Copies the program to `to`, in a process of its own: programs started by other tests meanwhile
/// would inherit a descriptor open for writing, and then the copy cannot be run.
pub(crate) fn copy_program(to: &std::path::Path) {
    assert!(std::process::Command::new("cp").arg(CLADE).arg(to).status().unwrap().success());
}

/// Returns a stem for names of interfaces that no other test has. A number goes behind it.
pub(crate) fn stem(name: &TapName) -> String {
    format!("{}x", name.name())
}

/// Returns whether this host has KVM. Panics if it is required and missing.
pub(crate) fn kvm() -> bool {
    let missing = File::options().read(true).write(true).open("/dev/kvm").err();
    if let Some(error) = &missing {
        clade_test_support::skip("kvm", &format!("/dev/kvm: {error}"));
    }
    missing.is_none()
}

/// The same for TAP interfaces.
pub(crate) fn taps() -> bool {
    let missing = Tap::open("cladep%d", 1).err();
    if let Some(error) = &missing {
        clade_test_support::skip("tap", &error.to_string());
    }
    missing.is_none()
}

/// The result of a command.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Checks that it is a refusal of bad input: exit code 2 and one line that names `value`.
    pub(crate) fn expect_refusal(&self, value: &str) {
        assert_eq!(self.code, Some(2), "{self:?}");
        // A slow fork says after a second that it goes on.
        let is_progress = |line: &&str| line.starts_with("clade: forking ") && line.ends_with(" wanted)");
        assert_eq!(self.stderr.trim_end().lines().filter(|line| !is_progress(line)).count(), 1, "one line: {self:?}");
        assert!(self.stderr.contains(value), "it does not name {value:?}: {self:?}");
        assert!(self.stderr.starts_with("clade: "), "{self:?}");
        assert_eq!(self.stdout, "", "{self:?}");
        for noise in ["panicked", "backtrace", "thread '"] {
            assert!(!self.stderr.contains(noise), "{self:?}");
        }
    }
}

/// Checks that an answer is a problem of the status.
pub(crate) fn expect_problem(answer: &Value, status: u16) {
    assert_eq!(answer["status"], status, "{answer}");
    assert!(answer["type"].as_str().is_some_and(|kind| kind.starts_with("urn:clade:")), "{answer}");
    for text in ["title", "detail"] {
        assert!(answer[text].as_str().is_some_and(|text| !text.is_empty()), "{answer}");
    }
}

/// A directory for sockets, and the processes run over it.
pub(crate) struct Runtime {
    dir: TempDir,
    processes: Vec<Child>,
}

impl Runtime {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), processes: Vec::new() }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Returns the directory of its templates.
    pub(crate) fn templates(&self) -> PathBuf {
        self.dir().join("clade.templates")
    }

    /// Returns the directory of its kept checkpoints.
    pub(crate) fn kept(&self) -> PathBuf {
        self.dir().join("clade.checkpoints")
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        // A shell that runs the tests in its background has them, and their children, ignore
        // SIGINT.
        let mut command = Command::new("env");
        command.args(["--default-signal=HUP,INT,TERM", CLADE]).args(args);
        command.env("CLADE_RUNTIME_DIR", self.dir()).env_remove("CLADE_LOG").env("RUST_BACKTRACE", "1");
        command.env("CLADE_TEMPLATE_DIR", self.templates());
        command.env("CLADE_CHECKPOINT_DIR", self.kept());
        command.stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn clade(&self, args: &[&str]) -> Answer {
        self.command(args).output().unwrap().into()
    }

    /// The same with a full disk as its standard output.
    pub(crate) fn clade_with_full_disk(&self, args: &[&str]) -> Answer {
        let full = File::options().write(true).open("/dev/full").unwrap();
        self.command(args).stdout(full).output().unwrap().into()
    }

    /// Starts a bare VM in the background, and waits for its socket. The VM is paused.
    pub(crate) fn start(&mut self, name: &str) {
        self.start_with(name, &[]);
    }

    /// The same, with more arguments.
    pub(crate) fn start_with(&mut self, name: &str, args: &[&str]) {
        let mut command = self.command(&["run", "--detached", "--kernel", "bare", "--mem", "32M", "--name", name]);
        command.args(args);
        self.processes.push(command.stdout(Stdio::null()).spawn().unwrap());
        wait_until("the VM's socket", || UnixStream::connect(self.socket(name)).is_ok());
        // Once it answers, it is listed.
        self.clade(&["pause", name, "--json"]).json();
    }

    /// Starts a command in the background.
    pub(crate) fn spawn(&mut self, args: &[&str]) {
        let mut command = self.command(args);
        self.processes.push(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    }

    /// The same, with its standard error kept for [`Runtime::heard`].
    pub(crate) fn spawn_heard(&mut self, args: &[&str]) {
        self.processes.push(self.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    }

    /// The same, with what `directives` select of its log in `file`.
    pub(crate) fn spawn_logging(&mut self, args: &[&str], directives: &str, file: File) {
        let mut command = self.command(args);
        command.env("CLADE_LOG", directives).stdout(Stdio::null()).stderr(file);
        self.processes.push(command.spawn().unwrap());
    }

    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        self.dir().join(format!("{name}.sock"))
    }

    /// Kills the newest process, like a crash.
    pub(crate) fn crash(&mut self) {
        let mut process = self.processes.pop().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// The same with the supervisor, which could clear up.
    pub(crate) fn crash_all(&mut self) {
        kill(self.supervisor(), Signal::KILL);
        self.crash();
    }

    /// Waits for the oldest process to end by itself; returns its exit code.
    pub(crate) fn ended(&mut self) -> Option<i32> {
        // The process stays in the list until it has ended, so that it is killed if it does not.
        wait_until("the end of the process", || self.processes[0].try_wait().unwrap().is_some());
        self.processes.remove(0).wait().unwrap().code()
    }

    /// Adds a process that was started elsewhere.
    pub(crate) fn adopt(&mut self, process: Child) {
        self.processes.push(process);
    }

    /// Returns the pid of the oldest process.
    pub(crate) fn pid(&self) -> u32 {
        self.processes[0].id()
    }

    /// Returns the pid of the supervisor.
    pub(crate) fn supervisor(&self) -> u32 {
        self.http("GET", "/v1/supervisor", "").1["pid"].as_u64().unwrap() as u32
    }

    /// Returns the log of the supervisor in the background, and of its VMs' processes.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir().join("clade.log")).unwrap_or_default()
    }

    /// Returns the number of a process's descriptors.
    pub(crate) fn open_files(&self, pid: u32) -> usize {
        std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
    }

    /// Sends the oldest process a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.processes[0]), signal).unwrap();
    }

    /// Returns the oldest process's standard error from now on, to its end.
    /// [`Runtime::spawn_heard`] must have started it.
    pub(crate) fn heard(&mut self) -> String {
        let mut text = String::new();
        self.processes[0].stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// Waits until the oldest process's standard error has `text`, and returns it up to there or a
    /// little further.
    pub(crate) fn heard_until(&mut self, text: &str) -> String {
        let mut heard = Vec::new();
        wait_until(&format!("{text:?} in what the process says"), || {
            let has_ended = self.processes[0].try_wait().unwrap().is_some();
            let stderr = self.processes[0].stderr.as_mut().unwrap();
            let mut bytes = vec![0; rustix::io::ioctl_fionread(&*stderr).unwrap() as usize];
            stderr.read_exact(&mut bytes).unwrap();
            heard.extend(bytes);
            let is_there = String::from_utf8_lossy(&heard).contains(text);
            assert!(is_there || !has_ended, "no {text:?}: {}", String::from_utf8_lossy(&heard));
            is_there
        });
        String::from_utf8(heard).unwrap()
    }

    /// Returns whether the oldest process runs.
    pub(crate) fn runs(&mut self) -> bool {
        self.processes[0].try_wait().unwrap().is_none()
    }

    /// Returns the names of the running VMs.
    pub(crate) fn names(&self) -> Vec<String> {
        let all = self.clade(&["ps", "--json"]).json();
        all.as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Returns the supervisor's socket.
    pub(crate) fn api(&self) -> PathBuf {
        self.dir().join("clade.api")
    }

    /// One HTTP request to the supervisor: the status and the body.
    pub(crate) fn http(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        self.http_at(&self.api(), method, path, body)
    }

    /// Sends the supervisor a request, and does not wait for its answer.
    pub(crate) fn begin(&self, path: &str, body: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.api()).unwrap();
        let head = format!("POST {path} HTTP/1.1\r\nhost: clade\r\ncontent-type: application/json\r\n");
        stream.write_all(format!("{head}content-length: {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap();
        stream
    }

    /// Returns the process of a VM.
    pub(crate) fn worker(&self, name: &str) -> u32 {
        self.http("GET", &format!("/v1/vms/{name}"), "").1["pid"].as_u64().unwrap() as u32
    }

    /// Returns the files of VMs, without those of a supervisor.
    pub(crate) fn files(&self) -> BTreeSet<String> {
        let all = std::fs::read_dir(self.dir()).unwrap().flatten();
        let all = all.map(|entry| entry.file_name().into_string().unwrap());
        all.filter(|name| !name.starts_with("clade.")).collect()
    }

    /// Returns the running processes of this runtime directory: supervisors, zygotes and workers.
    pub(crate) fn clades(&self) -> BTreeSet<u32> {
        let dir = self.dir().display().to_string();
        let is_ours = |entry: &DirEntry| {
            let of = |file: &str| std::fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            ["serve", "zygote"].contains(&of("cmdline").split('\0').nth(1).unwrap_or_default())
                && of("environ").contains(&dir)
        };
        let all = std::fs::read_dir("/proc").unwrap().flatten().filter(is_ours);
        all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(|pid| runs(*pid)).collect()
    }

    /// One HTTP request to a socket.
    pub(crate) fn http_at(&self, socket: &Path, method: &str, path: &str, body: &str) -> (u16, Value) {
        let mut stream = PatientStream::from(UnixStream::connect(socket).unwrap());
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: clade\r\ncontent-type: application/json\r\nconnection: close\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        // A server that refuses early may not read all of it.
        let _ = stream.write_all(request.as_bytes());
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text);
        let text = String::from_utf8_lossy(&text);
        let (head, body) =
            text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer to {method} {path}: {text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let of_a_problem = head.to_ascii_lowercase().contains("content-type: application/problem+json");
        assert_eq!(of_a_problem, status >= 400, "{method} {path}: {head}");
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
        // Background processes, which start no others afterwards.
        self.clades().iter().for_each(|pid| kill(*pid, Signal::KILL));
    }
}

pub(crate) fn kill(pid: u32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), signal);
}

/// Stops a process until SIGCONT, and waits until no thread of it runs: on a busy host that takes a
/// moment after the signal.
pub(crate) fn hold(pid: u32) {
    kill(pid, Signal::STOP);
    wait_until("all its threads to stand still", || {
        let mut threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        threads
            .all(|thread| std::fs::read_to_string(thread.path().join("stat")).is_ok_and(|stat| stat.contains(") T ")))
    });
}

pub(crate) fn runs(pid: u32) -> bool {
    // A zombie counts as ended: its parent has died, and its new parent reaps it.
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = state.rsplit(") ").next().and_then(|rest| rest.chars().next());
    test_kill_process(Pid::from_raw(pid as i32).unwrap()).is_ok() && !matches!(state, None | Some('Z'))
}
