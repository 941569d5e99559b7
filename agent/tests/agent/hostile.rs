//! Clients that send garbage, floods and partial requests, and clients that vanish.

use std::io::{Read, Write};
use std::time::Duration;

use clade_agent_client::proto::process::{Selector, Signal};

use crate::{Agent, run, sh, shell, until};

fn post(path: &str, media_type: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: {media_type}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

fn still_works(agent: &Agent) {
    run(async { assert_eq!(sh(&agent.client(), "echo fine").await.stdout, "fine\n") });
}

#[test]
fn garbage_is_refused() {
    let agent = Agent::start();
    for garbage in [
        &b"\0\0\0\0\n\n"[..],
        b"GET\r\n\r\n",
        b"POST /process.Process/List HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nA: \x80\x01\r\n: \r\n\r\n",
        &[b"GET /".as_slice(), &[b'a'; 200_000], b" HTTP/1.1\r\n\r\n"].concat(),
        &[b"GET / HTTP/1.1\r\n".as_slice(), &b"A: b\r\n".repeat(1000), b"\r\n"].concat(),
    ] {
        let answer = agent.say(garbage);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    for (path, media_type, body, status) in [
        ("/process.Process/List", "application/json", &b"{"[..], 400),
        ("/process.Process/List", "application/json", b"\xff\xfe", 400),
        ("/process.Process/List", "application/json", &b"[".repeat(100_000), 400),
        ("/process.Process/List", "application/proto", b"", 415),
        ("/process.Process/Start", "application/json", b"{}", 415),
        ("/process.Process/Nothing", "application/json", b"{}", 501),
        ("/process.Process/List", "application/json", &vec![b' '; 5 << 20], 429),
        ("/nothing", "application/json", b"{}", 404),
        ("/init", "application/json", b"{\"envVars\":3}", 400),
        ("/files?path=/tmp/x", "text/plain", b"x", 400),
        ("/files?path=/tmp/x", "multipart/form-data", b"x", 400),
        ("/files", "application/octet-stream", b"x", 400),
        ("/files?path=~bob/x", "application/octet-stream", b"x", 400),
        ("/files?path=/x&username=nobody-there", "application/octet-stream", b"x", 401),
    ] {
        let answer = agent.say(&post(path, media_type, body));
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{path} {media_type}: {answer}");
    }
    let answer = agent.say(b"GET /process.Process/List HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    still_works(&agent);
}

#[test]
fn broken_streams_end_with_an_error() {
    let agent = Agent::start();
    for (body, code) in [
        (&b""[..], "unimplemented"),
        (b"\0\0\0\0\x02{}\0\0\0\0\x02{}", "unimplemented"),
        (b"\0\0\0\0\x05{}", "invalid_argument"),
        (b"\0\0\0", "invalid_argument"),
        (b"\x01\0\0\0\x02{}", "invalid_argument"),
        (b"\0\xff\xff\xff\xff{}", "resource_exhausted"),
        (b"\0\0\0\0\x02{]", "invalid_argument"),
        (b"\0\0\0\0\x02{}", "invalid_argument"),
    ] {
        let answer = agent.say(&post("/process.Process/Start", "application/connect+json", body));
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains(code), "{body:?}: {answer}");
    }
    let data = b"\0\0\0\0\x25{\"data\":{\"input\":{\"stdin\":\"aGkK\"}}}  ";
    let answer = agent.say(&post("/process.Process/StreamInput", "application/connect+json", data));
    assert!(answer.contains("invalid_argument"), "{answer}");
    still_works(&agent);
}

#[test]
fn a_client_that_vanishes_leaves_nothing() {
    let agent = Agent::start();
    run(async {
        let client = agent.client();
        let before = agent.descriptors();
        let mut pids = Vec::new();
        for _ in 0..50 {
            // Writes for ever, without a reader.
            let process = client.start(&shell("exec cat /dev/zero"), None).await.unwrap();
            pids.push(process.pid);
        }
        // Without followers: the output is dropped, and the processes run on.
        assert_eq!(client.list().await.unwrap().processes.len(), 50);
        for pid in pids {
            client.signal(pid, Signal::KILL).await.unwrap();
        }
        until("no processes", async || client.list().await.unwrap().processes.is_empty()).await;
        until("no descriptors", async || agent.descriptors() <= before).await;
    });
    still_works(&agent);
}

#[test]
fn a_client_that_reads_nothing_stops_the_process_and_not_the_agent() {
    let agent = Agent::start();
    let mut stream = agent.raw();
    let start = br#"{"process":{"cmd":"/bin/sh","args":["-c","exec cat /dev/zero"]},"tag":"flood"}"#;
    let body = [&[0, 0, 0, 0, start.len() as u8], &start[..]].concat();
    stream.write_all(&post("/process.Process/Start", "application/connect+json", &body)).unwrap();
    run(async {
        let client = agent.client();
        until("the process", async || client.list().await.unwrap().processes.len() == 1).await;
        let pid = client.list().await.unwrap().processes[0].pid;
        let written = || {
            let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
            io.lines().find_map(|line| line.strip_prefix("wchar: ")?.parse::<u64>().ok()).unwrap()
        };
        let mut last = written();
        until("the process to stand still", async || {
            tokio::time::sleep(Duration::from_millis(300)).await;
            std::mem::replace(&mut last, written()) == last
        })
        .await;
        assert!(last < 8 << 20, "{last} bytes were taken");
        assert!(agent.memory() < 64 << 10, "{} KiB", agent.memory());
        assert_eq!(sh(&client, "echo fine").await.stdout, "fine\n");
        client.signal(pid, Signal::KILL).await.unwrap();
        // The process has ended, and its client has not received that. Another client gets the end
        // at once.
        drop(client.follow(Selector { tag: Some("flood".into()), pid: None }).await.unwrap());
        drop(stream);
        until("the end", async || client.list().await.unwrap().processes.is_empty()).await;
    });
}

#[test]
fn a_body_that_does_not_come_holds_nobody_up() {
    let agent = Agent::start();
    let mut slow = Vec::new();
    for _ in 0..100 {
        let mut stream = agent.raw();
        let head = "POST /process.Process/List HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 4000000\r\n\r\n";
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&[b' '; 10_000]).unwrap();
        slow.push(stream);
    }
    still_works(&agent);
    assert!(agent.memory() < 64 << 10, "{} KiB", agent.memory());
}

#[test]
fn requests_may_come_one_after_another() {
    let agent = Agent::start();
    let mut stream = agent.raw();
    stream.write_all(&b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n".repeat(50)).unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
    let mut answers = String::new();
    stream.read_to_string(&mut answers).unwrap();
    assert_eq!(answers.matches("HTTP/1.1 204 No Content").count(), 51);
}
