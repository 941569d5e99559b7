//! Connections to TCP ports, through the agent.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use clade_agent_client::{ClientError, Endpoint, Socket};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use clade_test_support::{Watchdog, lowest, wait_until};

use crate::{Agent, LIMIT, run, shell, until};

/// Longer than any test runs: the watchdog handles a connection without an answer.
const ANY_TIME: Duration = Duration::from_secs(86_400);

/// An agent, and its socket for connections to ports.
struct Forward {
    agent: Agent,
    dir: tempfile::TempDir,
}

impl Forward {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("forward.sock");
        let agent = Agent::start_with(&["--forward-unix", path.to_str().unwrap()]);
        wait_until("the agent takes connections to ports", || StdUnixStream::connect(&path).is_ok());
        Self { agent, dir }
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::Unix(self.dir.path().join("forward.sock"))
    }

    async fn open(&self, port: u16) -> Result<Socket, ClientError> {
        self.endpoint().connect_tcp(port, ANY_TIME).await
    }

    /// The answer to this exact first line.
    fn say(&self, line: &[u8]) -> String {
        let _watchdog = Watchdog::new(LIMIT, || "the agent does not close a connection".to_owned());
        let mut stream = StdUnixStream::connect(self.dir.path().join("forward.sock")).unwrap();
        let _ = stream.write_all(line);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    }
}

async fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// A port that stays closed until the socket is dropped: nobody else is given it.
fn closed_port() -> (TcpSocket, u16) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, port)
}

async fn echo(mut stream: TcpStream) {
    let (mut read, mut write) = stream.split();
    let _ = tokio::io::copy(&mut read, &mut write).await;
    let _ = write.shutdown().await;
}

#[test]
fn a_port_that_is_closed_is_refused_by_the_guest() {
    let all = Forward::start();
    run(async {
        let (_socket, port) = closed_port();
        let error = all.open(port).await.unwrap_err();
        // The kernel's refusal is passed on: the agent has not waited for a timeout.
        let refusal = format!("nothing listens at port {port}");
        assert!(
            matches!(&error, ClientError::PortClosed { port: of, why } if *of == port && *why == refusal),
            "{error}"
        );
    });
    for wrong in ["TCP 0\n", "TCP 127.0.0.1:80\n", "TCP 70000\n", "GET / HTTP/1\n", "\n"] {
        assert_eq!(all.say(wrong.as_bytes()), "ERR the line names no port\n", "{wrong:?}");
    }
    // Not a line, or one without an end.
    assert_eq!(all.say(&[b'x'; 4096]), "");
}

#[test]
fn ipv6_is_tried_where_ipv4_is_closed() {
    let all = Forward::start();
    run(async {
        let Ok(listener) = TcpListener::bind("[::1]:0").await else {
            return clade_test_support::skipped("there is no IPv6");
        };
        let port = listener.local_addr().unwrap().port();
        let mut stream = all.open(port).await.unwrap();
        let (mut served, _) = listener.accept().await.unwrap();
        served.write_all(b"six").await.unwrap();
        let mut read = [0; 3];
        stream.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"six");
    });
}

#[test]
fn either_side_may_end_first_and_the_other_goes_on() {
    let all = Forward::start();
    run(async {
        let (listener, port) = listener().await;
        // The host shuts down its direction, and then gets the answer.
        let mut stream = all.open(port).await.unwrap();
        let (mut served, _) = listener.accept().await.unwrap();
        stream.write_all(b"question").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut read = Vec::new();
        served.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, b"question");
        tokio::time::sleep(Duration::from_millis(100)).await;
        served.write_all(b"answer").await.unwrap();
        drop(served);
        read.clear();
        stream.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, b"answer");
        // The program shuts down its direction, and still reads.
        let mut stream = all.open(port).await.unwrap();
        let (mut served, _) = listener.accept().await.unwrap();
        served.shutdown().await.unwrap();
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        stream.write_all(b"later").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut read = Vec::new();
        served.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, b"later");
        // When a client disconnects, so does the agent from the program, and no descriptor is left.
        drop((stream, served));
        let before = lowest(|| all.agent.descriptors());
        let stream = all.open(port).await.unwrap();
        let (mut served, _) = listener.accept().await.unwrap();
        drop(stream);
        assert_eq!(served.read(&mut [0]).await.unwrap(), 0);
        drop(served);
        until("its descriptors", async || all.agent.descriptors() <= before).await;
    });
}

#[test]
fn many_connections_are_served_and_one_more_is_refused() {
    let all = Forward::start();
    run(async {
        let (listener, port) = listener().await;
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(echo(stream));
            }
        });
        let mut open = Vec::new();
        for number in 0..512_u32 {
            let mut stream = all.open(port).await.unwrap();
            stream.write_all(&number.to_be_bytes()).await.unwrap();
            open.push(stream);
        }
        let error = all.open(port).await.unwrap_err();
        assert!(matches!(&error, ClientError::PortRefused { why, .. } if why.contains("512")), "{error}");
        // The agent itself still answers.
        all.agent.client().start(&shell("true"), None).await.unwrap();
        for (number, stream) in open.iter_mut().enumerate() {
            let mut read = [0; 4];
            stream.read_exact(&mut read).await.unwrap();
            assert_eq!(u32::from_be_bytes(read) as usize, number);
        }
        println!("512 connections: the agent has {} KiB", all.agent.memory());
        drop(open.pop());
        until("a place", async || all.open(port).await.is_ok()).await;
    });
}

#[test]
fn a_slow_reader_slows_its_writer_and_no_byte_is_lost() {
    let all = Forward::start();
    run(async {
        const SIZE: usize = 64 << 20;
        let (listener, port) = listener().await;
        let mut stream = all.open(port).await.unwrap();
        let (mut served, _) = listener.accept().await.unwrap();
        let sent = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counted = std::sync::Arc::clone(&sent);
        let before = all.agent.memory();
        let writer = tokio::spawn(async move {
            let piece: Vec<u8> = (0..1 << 16).map(|at| (at % 251) as u8).collect();
            while counted.load(std::sync::atomic::Ordering::Relaxed) < SIZE {
                served.write_all(&piece).await.unwrap();
                counted.fetch_add(piece.len(), std::sync::atomic::Ordering::Relaxed);
            }
        });
        // Without a reader, the transfer stops long before the end.
        let mut last = usize::MAX;
        until("a halt", async || {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let now = sent.load(std::sync::atomic::Ordering::Relaxed);
            now > 0 && std::mem::replace(&mut last, now) == now
        })
        .await;
        println!("{last} bytes were taken without a reader");
        assert!(last < SIZE / 2, "{last}");
        assert!(all.agent.memory() < before + (2 << 10), "{} KiB", all.agent.memory());
        let (mut total, mut buffer) = (0, vec![0; 1 << 20]);
        loop {
            let count = stream.read(&mut buffer).await.unwrap();
            if count == 0 {
                break;
            }
            assert!(
                buffer[..count]
                    .iter()
                    .enumerate()
                    .all(|(at, byte)| usize::from(*byte) == (total + at) % (1 << 16) % 251)
            );
            total += count;
        }
        assert_eq!(total, SIZE);
        writer.await.unwrap();
    });
}

#[test]
fn connections_of_before_end_when_the_vm_is_another() {
    let all = Forward::start();
    run(async {
        let (listener, port) = listener().await;
        let mut stream = all.open(port).await.unwrap();
        let (mut served, _) = listener.accept().await.unwrap();
        let generation =
            "POST /clade/generation HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}";
        let answer = all.agent.say(generation.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(served.read(&mut [0]).await.unwrap(), 0);
    });
}
