//! Calls in progress when their agent is killed, or their VM becomes another.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use bytes::Bytes;
use clade_agent_client::proto::api::{Generation, Written};
use clade_agent_client::proto::filesystem::{WatchDirResponse, WatchRequest};
use clade_agent_client::proto::process::Signal;
use clade_agent_client::{Client, ClientError, Download, Messages, Process, Upload};
use tokio::task::JoinHandle;

use crate::{Agent, run, sh, shell, until};

/// One call of each kind, in progress.
struct Calls {
    process: Process,
    watch: Messages<WatchDirResponse>,
    /// Kept, so that the client does not end it.
    _upload: Upload,
    uploaded: JoinHandle<Result<Written, ClientError>>,
    download: Download,
}

impl Calls {
    async fn begin(agent: &Agent, client: &Client) -> Self {
        let mut process = client.start(&shell("echo begun; exec sleep 1000"), None).await.unwrap();
        let first = process.next().await.unwrap().unwrap().data.unwrap().stdout.unwrap();
        assert_eq!(first.0, b"begun\n");
        let request = WatchRequest { path: agent.path(""), ..WatchRequest::default() };
        let mut watch: Messages<WatchDirResponse> =
            client.stream("filesystem.Filesystem/WatchDir", &request, None).await.unwrap();
        assert!(watch.next().await.unwrap().unwrap().start.is_some());
        let (mut upload, call) = client.upload(&agent.path("up"), None);
        let uploaded = tokio::spawn(call);
        assert!(upload.send(Bytes::from(vec![b'x'; 1 << 20])).await);
        until("a part of the file", async || {
            std::fs::metadata(agent.path("up")).is_ok_and(|file| file.len() >= 256 << 10)
        })
        .await;
        File::create(agent.path("down")).unwrap().set_len(1 << 30).unwrap();
        let mut download = client.download(&agent.path("down")).await.unwrap();
        assert!(download.next().await.unwrap().is_some());
        Self { process, watch, _upload: upload, uploaded, download }
    }

    /// Each call ends with the error of a broken connection, and not with that of a silent agent.
    async fn expect_lost(mut self) {
        let process = loop {
            if let Err(error) = self.process.next().await {
                break error;
            }
        };
        let watch = loop {
            if let Err(error) = self.watch.next().await {
                break error;
            }
        };
        let uploaded = self.uploaded.await.unwrap().unwrap_err();
        let download = loop {
            match self.download.next().await {
                Ok(piece) => assert!(piece.is_some(), "it is not whole"),
                Err(error) => break error,
            }
        };
        for error in [process, watch, uploaded, download] {
            assert!(matches!(error, ClientError::Lost(_)), "{error:?}");
            let text = error.to_string();
            assert!(text.contains("the agent or its VM has ended") && text.contains("another now"), "{text}");
        }
    }
}

#[test]
fn an_agent_that_is_killed_is_said_to_be_gone() {
    let mut agent = Agent::start();
    run(async {
        let client = agent.client();
        let calls = Calls::begin(&agent, &client).await;
        let pid = calls.process.pid;
        agent.child.kill().unwrap();
        agent.child.wait().unwrap();
        calls.expect_lost().await;
        let after = client.list().await.unwrap_err();
        assert!(matches!(after, ClientError::Socket { .. }), "{after}");
        // The orphan would run on.
        assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    });
}

#[test]
fn calls_end_when_the_vm_becomes_another_and_what_they_began_stays() {
    let agent = Agent::start_heard();
    let mut said = BufReader::new(agent.stderr());
    run(async {
        let client = agent.client();
        let calls = Calls::begin(&agent, &client).await;
        let pid = calls.process.pid;
        let generation = Generation { name: "child".into(), ..Generation::default() };
        assert_eq!(client.change_generation(&generation).await.unwrap().generation, 1);
        calls.expect_lost().await;
        // The process runs on, and the file has the bytes received so far. Later calls work
        // normally.
        assert_eq!(client.list().await.unwrap().processes[0].pid, pid);
        assert!((256 << 10..=1 << 20).contains(&std::fs::metadata(agent.path("up")).unwrap().len()));
        let (mut upload, call) = client.upload(&agent.path("up"), None);
        assert!(upload.send(Bytes::from_static(b"whole")).await);
        drop(upload);
        call.await.unwrap();
        assert_eq!(sh(&client, &format!("cat {}", agent.path("up"))).await.stdout, "whole");
        client.signal(pid, Signal::KILL).await.unwrap();
    });
    // The child's console reports the interrupted calls of its parent.
    let mut lines = String::new();
    while !lines.contains("/up is written in part") {
        assert!(said.read_line(&mut lines).unwrap() > 0, "{lines}");
    }
    assert!(lines.contains("the VM is \"child\" now"), "{lines}");
}

impl Agent {
    /// The same, with its log readable.
    fn start_heard() -> Self {
        Self::start_as(&[], Stdio::piped())
    }

    fn stderr(&self) -> std::process::ChildStderr {
        self.heard.borrow_mut().take().unwrap()
    }
}
