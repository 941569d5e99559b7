//! Guests that answer as slowly as they can, or never. The test controls the clock, which advances
//! to the next timeout when all tasks are idle.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use clade_agent_client::proto::process::StartRequest;
use clade_agent_client::{Client, ClientError, Endpoint};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, sleep};

const STREAM: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: application/connect+json\r\n\r\n";
/// A keepalive event of a stream, in its envelope.
const ALIVE: &[u8] = b"\0\0\0\0\x1a{\"event\":{\"keepalive\":{}}}";
/// Maximum duration of a call to an idle guest.
const LONGEST: Duration = Duration::from_secs(250);

/// A guest's behaviour after the head of a request.
#[derive(Clone, Copy)]
enum Guest {
    /// Sends `answer`, and then `drip` repeatedly with a pause before each.
    Says { answer: &'static [u8], drip: &'static [u8], pause: Duration },
    /// Reads the body to its end, and sends `answer`.
    Reads { answer: &'static [u8] },
}

async fn read_until(stream: &mut UnixStream, end: &[u8]) {
    let mut bytes = Vec::new();
    while !bytes.ends_with(end) {
        bytes.push(stream.read_u8().await.unwrap());
    }
}

async fn behave(mut stream: UnixStream, guest: Guest) {
    read_until(&mut stream, b"CONNECT 1\n").await;
    stream.write_all(b"OK 1024\n").await.unwrap();
    read_until(&mut stream, b"\r\n\r\n").await;
    match guest {
        Guest::Says { answer, drip, pause } => {
            let mut written = stream.write_all(answer).await;
            while written.is_ok() {
                sleep(pause).await;
                written = stream.write_all(drip).await;
            }
        }
        Guest::Reads { answer } => {
            read_until(&mut stream, b"\r\n0\r\n\r\n").await;
            stream.write_all(answer).await.unwrap();
            // The connection stays open.
            sleep(Duration::from_secs(1 << 20)).await;
        }
    }
}

/// Runs a call against a guest. Returns its result, and its duration.
fn call<T, F: Future<Output = T>>(guest: Guest, call: impl FnOnce(Client) -> F) -> (T, Duration) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("guest.vsock");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(behave(stream, guest));
            }
        });
        let begun = Instant::now();
        let done = call(Client::new(Endpoint::Vsock { socket, port: 1 })).await;
        (done, begun.elapsed())
    })
}

fn expect_silent<T: std::fmt::Debug>((done, took): (Result<T, ClientError>, Duration)) {
    assert!(matches!(done, Err(ClientError::Silent { .. })), "{done:?}");
    assert!(took < LONGEST, "{took:?}");
}

fn says(answer: &'static [u8], drip: &'static [u8]) -> Guest {
    Guest::Says { answer, drip, pause: Duration::from_secs(50) }
}

/// A device's behaviour for its connections, one after another. The last one also applies to all
/// later connections.
#[derive(Clone, Copy)]
enum Device {
    /// Closes the connection: the guest has no listener.
    Refuses,
    /// Keeps the connection without answering.
    Ignores,
    /// Accepts the connection, and answers a request.
    Takes,
}

/// Calls a guest behind such a device. Returns the answer, the duration, and the number of
/// connections.
fn ask(device: &'static [Device], wait: Option<Duration>) -> (Result<(), ClientError>, Duration, usize) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("guest.vsock");
        let listener = UnixListener::bind(&socket).unwrap();
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        tokio::spawn(async move {
            let mut kept = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let number = counted.fetch_add(1, Ordering::Relaxed).min(device.len() - 1);
                read_until(&mut stream, b"CONNECT 1\n").await;
                match device[number] {
                    Device::Refuses => drop(stream),
                    Device::Ignores => kept.push(stream),
                    Device::Takes => {
                        stream.write_all(b"OK 1024\n").await.unwrap();
                        read_until(&mut stream, b"\r\n\r\n").await;
                        stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
                    }
                }
            }
        });
        let client = Client::new(Endpoint::Vsock { socket, port: 1 });
        let client = wait.into_iter().fold(client, Client::with_wait);
        let begun = Instant::now();
        let done = client.health().await;
        (done, begun.elapsed(), count.load(Ordering::Relaxed))
    })
}

#[test]
fn an_agent_that_refuses_or_ignores_the_first_connections_is_reached() {
    let (done, took, count) = ask(&[Device::Refuses, Device::Ignores, Device::Refuses, Device::Takes], None);
    done.unwrap();
    assert_eq!(count, 4);
    assert!((Duration::from_secs(10)..Duration::from_secs(30)).contains(&took), "{took:?} of the paused clock");
}

#[test]
fn a_guest_without_an_agent_is_given_up_after_30_s_and_the_error_has_the_time() {
    for device in [Device::Refuses, Device::Ignores] {
        let device = &*vec![device].leak();
        let (done, took, count) = ask(device, None);
        let error = done.unwrap_err();
        assert!(matches!(error, ClientError::NoAgent { .. }), "{error}");
        assert!(error.to_string().contains("within 30.0 s"), "{error}");
        assert!(count > 2 && took.as_secs() == 30, "{count} attempts, {took:?} of the paused clock");
        let (done, took, _) = ask(device, Some(Duration::from_secs(3)));
        assert!(done.unwrap_err().to_string().contains("within 3.0 s"));
        assert_eq!(took.as_secs(), 3);
    }
}

#[test]
fn a_guest_without_a_socket_gets_one_attempt() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let nowhere = Client::new(Endpoint::Vsock { socket: "/nowhere".into(), port: 1 });
    let begun = runtime.block_on(async { Instant::now() });
    let error = runtime.block_on(async { nowhere.health().await.unwrap_err() });
    assert!(matches!(error, ClientError::Socket { .. }), "{error}");
    // The paused clock does not advance unless a task waits for time.
    assert_eq!(runtime.block_on(async { begun.elapsed() }), Duration::ZERO);
}

#[test]
fn an_answer_that_never_comes_is_not_waited_for() {
    expect_silent(call(says(b"", b""), async |guest| guest.list().await));
    expect_silent(call(says(b"HTTP/1.1 200 OK\r\n", b""), async |guest| guest.health().await));
    expect_silent(call(says(STREAM, b""), async |guest| guest.start(&StartRequest::default(), None).await));
}

#[test]
fn an_answer_byte_by_byte_is_not_waited_for() {
    let ready =
        call(says(b"HTTP/1.1 200 OK\r\n\r\n", b" "), async |guest| guest.change_generation(&Default::default()).await);
    expect_silent(ready);
    let refusal = call(says(b"HTTP/1.1 500 No\r\n\r\n", b"x"), async |guest| guest.list().await);
    expect_silent(refusal);
    // The beginning of a message of a megabyte.
    let message = call(says(&[STREAM, b"\0\0\x10\0\0"].concat().leak()[..], b" "), async |guest| {
        guest.start(&StartRequest::default(), None).await
    });
    expect_silent(message);
}

#[test]
fn a_program_that_runs_for_long_is_waited_for() {
    let start = b"\0\0\0\0\x1f{\"event\":{\"start\":{\"pid\":7}}}  ";
    let guest = says([STREAM, start].concat().leak(), ALIVE);
    let (done, took) = call(guest, async |guest| {
        let mut process = guest.start(&StartRequest::default(), None).await?;
        for _ in 0..100 {
            assert!(process.next().await?.is_some());
        }
        Ok::<_, ClientError>(process.pid)
    });
    assert_eq!(done.unwrap(), 7);
    assert!(took > Duration::from_secs(4000), "{took:?}");
}

/// Sends as much as the guest accepts, up to `pieces`.
async fn upload(guest: Client, pieces: usize, pause: Duration) -> Result<String, ClientError> {
    let (mut upload, call) = guest.upload("/srv/file", None);
    let call = tokio::spawn(call);
    for _ in 0..pieces {
        sleep(pause).await;
        if !upload.send(Bytes::from_static(&[b'x'; 1 << 16])).await {
            break;
        }
    }
    drop(upload);
    call.await.unwrap().map(|written| written.path)
}

#[test]
fn a_file_that_is_not_taken_is_given_up() {
    let unread = call(says(b"", b""), |guest| upload(guest, 1000, Duration::ZERO));
    expect_silent(unread);
    let unanswered = call(Guest::Reads { answer: b"" }, |guest| upload(guest, 10, Duration::ZERO));
    expect_silent(unanswered);
}

#[test]
fn a_file_that_comes_slowly_is_taken() {
    const WRITTEN: &[u8] =
        b"HTTP/1.1 200 OK\r\nContent-Length: 48\r\n\r\n[{\"path\":\"/srv/file\",\"name\":\"file\",\"type\":\"\"}]  ";
    let guest = Guest::Reads { answer: WRITTEN };
    let (done, took) = call(guest, |guest| upload(guest, 5, Duration::from_secs(1000)));
    assert_eq!(done.unwrap(), "/srv/file");
    assert!(took >= Duration::from_secs(5000), "{took:?}");
}
