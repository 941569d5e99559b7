//! Requests on the wire, to a guest that is a task of the test.

use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::*;
use crate::connection_limits::{GuestEnd, PER_SANDBOX};
use crate::gateway::Options;
use crate::listen::{accept, router};
use crate::wire::{AskedNetwork, Texts};

const LIMIT: Duration = Duration::from_secs(300);
/// Longer than a test.
const FOR_EVER: Duration = Duration::from_secs(24 * 3600);
/// A request for a WebSocket, without its sandbox.
const ASK: &str = "GET /ws HTTP/1.1\r\nhost: 80-ibox.box.test\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                   sec-websocket-version: 13\r\nsec-websocket-key: k\r\n";
const TAKE: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
                    sec-websocket-accept: a\r\nx-access-token: t\r\n\r\n";

/// A gateway with one sandbox, `ibox`, and the guest's side of it.
struct Host {
    gateway: Gateway,
    options: Options,
    address: std::net::SocketAddr,
    guest: UnixListener,
    _dir: tempfile::TempDir,
}

type Guest = BufReader<UnixStream>;

impl Host {
    async fn new(change: impl FnOnce(&mut SandboxRecord)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let domain = Some("box.test".to_owned());
        let options = Options {
            dir: path("run"),
            keys: path("keys.json"),
            domain,
            templates: None,
            snapshots: None,
            quotas: crate::Quotas::default(),
        };
        std::fs::create_dir(path("run")).unwrap();
        let gateway = Gateway::of_socket(options.clone()).unwrap();
        let mut record = record(&path("vsock"));
        change(&mut record);
        gateway.0.sandboxes.insert(record).unwrap();
        let guest = UnixListener::bind(path("vsock")).unwrap();
        let address = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let mut host = Self { gateway: gateway.clone(), options, address, guest, _dir: dir };
        host.serve(gateway).await;
        host
    }

    /// Not through `listen`, which forgets sandboxes that no supervisor has.
    async fn serve(&mut self, gateway: Gateway) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.address = listener.local_addr().unwrap();
        tokio::spawn(accept(listener, router(&gateway), None));
        self.gateway = gateway;
    }

    async fn client(&self, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        stream
    }

    /// Takes a connection to port 80, and answers for the agent.
    async fn accept(&self) -> Guest {
        let (stream, _) = self.guest.accept().await.unwrap();
        let mut guest = BufReader::new(stream);
        assert_eq!(line(&mut guest).await, "CONNECT 49984\n");
        guest.write_all(b"OK 1073741824\n").await.unwrap();
        assert_eq!(line(&mut guest).await, "TCP 80\n");
        guest.write_all(b"OK\n").await.unwrap();
        guest
    }

    /// Returns the refusal of a request that reaches no guest.
    async fn refuses(&self, text: &str) -> (u16, String) {
        let mut client = BufReader::new(self.client(text).await);
        let head = head(&mut client).await;
        let length = head.split_once("content-length: ").and_then(|(_, rest)| rest.split_once('\r')?.0.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        client.read_exact(&mut body).await.unwrap();
        let status = head.split(' ').nth(1).unwrap_or_default().parse().unwrap_or_default();
        (status, head + &String::from_utf8_lossy(&body))
    }
}

fn record(socket: &Path) -> SandboxRecord {
    SandboxRecord {
        id: "ibox".to_owned(),
        template: "base".to_owned(),
        owner: "one".to_owned(),
        metadata: Texts::default(),
        envs: Texts::default(),
        started_at: Timestamp::UNIX_EPOCH,
        end_at: Timestamp::MAX,
        paused: false,
        auto_pause: false,
        auto_resume: false,
        cpus: 1,
        mib: 64,
        socket: socket.to_owned(),
        is_private: false,
        masked_host: None,
        network: AskedNetwork::default(),
        is_template_closed: None,
        template_layers: None,
    }
}

async fn line(from: &mut (impl AsyncBufReadExt + Unpin)) -> String {
    let mut line = String::new();
    from.read_line(&mut line).await.unwrap();
    line
}

/// Returns a head in lower case, with its empty line.
async fn head(from: &mut (impl AsyncBufReadExt + Unpin)) -> String {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        let line = line(from).await;
        assert!(!line.is_empty(), "the head ends early: {head:?}");
        head.push_str(&line);
    }
    head.to_ascii_lowercase()
}

async fn read(from: &mut (impl AsyncReadExt + Unpin), text: &str) {
    let mut bytes = vec![0; text.len()];
    from.read_exact(&mut bytes).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes), text);
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _watchdog = clade_test_support::Watchdog::new(LIMIT, || "a request is proxied".to_owned());
    runtime.block_on(test);
}

#[test]
fn a_program_learns_nothing_that_opens_anything() {
    run(async {
        let host = Host::new(|_| {}).await;
        let mut client = host
            .client(
                "GET /a?b HTTP/1.1\r\nhost: 80-ibox.box.test:3000\r\nx-api-key: secret\r\nx-access-token: secret\r\n\
                 e2b-traffic-access-token: secret\r\ne2b-sandbox-id: ibox\r\ne2b-sandbox-port: 80\r\nx-mine: secret\r\n\
                 connection: close, x-mine\r\nauthorization: own\r\ncookie: c\r\nupgrade: h2c\r\n\r\n",
            )
            .await;
        let mut guest = host.accept().await;
        let asked = head(&mut guest).await;
        assert!(asked.starts_with("get /a?b http/1.1\r\n") && !asked.contains("secret"), "{asked}");
        assert!(asked.contains("host: 80-ibox.box.test:3000\r\n"), "{asked}");
        assert!(asked.contains("authorization: own\r\n") && asked.contains("cookie: c\r\n"), "{asked}");
        for gone in ["e2b-", "upgrade", "x-mine", "connection: close"] {
            assert!(!asked.contains(gone), "{gone}: {asked}");
        }
        // The answer is streamed, without the token in it.
        let answer =
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nkeep-alive: 5\r\nx-access-token: t\r\nx-own: 1\r\n\r\n";
        guest.write_all(answer.as_bytes()).await.unwrap();
        guest.write_all(b"3\r\none\r\n").await.unwrap();
        let mut client = BufReader::new(&mut client);
        let head = head(&mut client).await;
        assert!(head.contains("x-own: 1") && !head.contains("keep-alive: 5") && !head.contains("token"), "{head}");
        read(&mut client, "3\r\none\r\n").await;
        guest.write_all(b"3\r\ntwo\r\n0\r\n\r\n").await.unwrap();
        read(&mut client, "3\r\ntwo\r\n0\r\n\r\n").await;
    });
}

#[test]
fn a_body_goes_up_as_it_comes() {
    run(async {
        let host = Host::new(|record| record.masked_host = Some("${PORT}-app.test".to_owned())).await;
        let ask = "POST / HTTP/1.1\r\nhost: x\r\ne2b-sandbox-id: ibox\r\ne2b-sandbox-port: 80\r\ntransfer-encoding: chunked\r\n\r\n";
        let mut client = host.client(ask).await;
        let mut guest = host.accept().await;
        let asked = head(&mut guest).await;
        assert!(asked.contains("host: 80-app.test\r\n") && asked.contains("transfer-encoding: chunked"), "{asked}");
        for piece in ["3\r\none\r\n", "5\r\nthree\r\n", "0\r\n\r\n"] {
            client.write_all(piece.as_bytes()).await.unwrap();
            read(&mut guest, piece).await;
        }
        guest.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        assert!(head(&mut BufReader::new(client)).await.starts_with("http/1.1 204"));
    });
}

#[test]
fn what_is_said_in_two_ways_comes_to_no_guest_or_in_one() {
    run(async {
        let host = Host::new(|_| {}).await;
        let own = "host: 80-ibox.box.test\r\nconnection: close\r\n";
        for wrong in [
            format!("POST / HTTP/1.1\r\n{own}content-length: 3\r\ncontent-length: 4\r\n\r\nabcd"),
            format!("POST / HTTP/1.1\r\n{own}content-length: 3, 4\r\n\r\nabcd"),
            format!("POST / HTTP/1.1\r\n{own}content-length: +3\r\n\r\nabc"),
            format!("POST / HTTP/1.1\r\n{own}transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
            format!("POST / HTTP/1.0\r\n{own}transfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
            format!("GET / HTTP/1.1\r\n{own}x-a: b\rx-access-token: c\r\n\r\n"),
            format!("GET / HTTP/1.1\r\n{own}x-a : b\r\n\r\n"),
            format!("GET / HTTP/1.1\r\n{own}x-a: b\r\n continued: c\r\n\r\n"),
            ASK.replace("GET", "POST") + "content-length: 0\r\n\r\n",
            ASK.to_owned() + "content-length: 3\r\n\r\nabc",
            ASK.to_owned() + "upgrade: h2c\r\n\r\n",
            ASK.replace("sec-websocket-key: k\r\n", "") + "\r\n",
        ] {
            let (status, answer) = host.refuses(&wrong).await;
            assert_eq!(status, 400, "{wrong:?}: {answer}");
        }
        // Both lengths: if the server lets one pass, the guest gets only that one.
        let both = format!(
            "POST / HTTP/1.1\r\n{own}content-length: 30\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n"
        );
        let mut client = host.client(&both).await;
        tokio::select! {
            mut guest = host.accept() => {
                let asked = head(&mut guest).await;
                assert!(!asked.contains("content-length"), "{asked}");
                guest.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
                let mut rest = String::new();
                guest.read_to_string(&mut rest).await.unwrap();
                assert_eq!(rest, "0\r\n\r\n");
            }
            first = async { let mut first = [0; 12]; client.read_exact(&mut first).await.unwrap(); first } => {
                assert_eq!(&first, b"HTTP/1.1 400");
            }
        }
    });
}

#[test]
fn a_websocket_is_copied_both_ways_until_it_ends() {
    run(async {
        let host = Host::new(|_| {}).await;
        let mut client =
            host.client(&(ASK.to_owned() + "x-access-token: secret\r\norigin: http://x\r\n\r\nfirst")).await;
        let mut guest = host.accept().await;
        let asked = head(&mut guest).await;
        for kept in
            ["connection: upgrade\r\n", "upgrade: websocket\r\n", "sec-websocket-key: k\r\n", "origin: http://x\r\n"]
        {
            assert!(asked.contains(kept), "{asked}");
        }
        assert!(!asked.contains("secret"), "{asked}");
        // Bytes behind the head belong to the other protocol, on both sides.
        guest.write_all((TAKE.to_owned() + "hello").as_bytes()).await.unwrap();
        let mut reader = BufReader::new(&mut client);
        let taken = head(&mut reader).await;
        assert!(taken.starts_with("http/1.1 101") && taken.contains("sec-websocket-accept: a\r\n"), "{taken}");
        assert!(taken.contains("connection: upgrade\r\n") && !taken.contains("x-access-token"), "{taken}");
        read(&mut reader, "hello").await;
        read(&mut guest, "first").await;
        reader.write_all(b"\x81\x00\r\n\r\n\xff").await.unwrap();
        let mut bytes = [0; 7];
        guest.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"\x81\x00\r\n\r\n\xff");
        // The guest's last bytes arrive, and then its end.
        guest.write_all(b"bye").await.unwrap();
        drop(guest);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "bye");
        // The guest sees the client's end.
        let mut client = host.client(&(ASK.to_owned() + "\r\n")).await;
        let mut guest = host.accept().await;
        head(&mut guest).await;
        guest.write_all(TAKE.as_bytes()).await.unwrap();
        head(&mut BufReader::new(&mut client)).await;
        drop(client);
        assert_eq!(guest.read(&mut [0]).await.unwrap(), 0);
    });
}

#[test]
fn connections_are_cut_when_the_sandbox_pauses() {
    run(async {
        let host = Host::new(|_| {}).await;
        let mut socket = host.client(&(ASK.to_owned() + "\r\n")).await;
        let mut first = host.accept().await;
        head(&mut first).await;
        first.write_all(TAKE.as_bytes()).await.unwrap();
        head(&mut BufReader::new(&mut socket)).await;
        let mut stream = host.client("GET / HTTP/1.1\r\nhost: 80-ibox.box.test\r\n\r\n").await;
        let mut second = host.accept().await;
        head(&mut second).await;
        second.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nfive.").await.unwrap();
        let mut stream = BufReader::new(&mut stream);
        head(&mut stream).await;
        read(&mut stream, "five.").await;
        let entry = host.gateway.0.sandboxes.get("ibox").unwrap();
        host.gateway.0.sandboxes.change(&entry, |record| record.paused = true);
        entry.cut.send_replace(());
        for end in [socket.read(&mut [0]).await, stream.read(&mut [0]).await] {
            assert!(end.as_ref().is_ok_and(|count| *count == 0) || end.is_err(), "{end:?}");
        }
        for guest in [&mut first, &mut second] {
            assert_eq!(guest.read(&mut [0]).await.unwrap(), 0);
        }
        let (status, answer) =
            host.refuses("GET / HTTP/1.1\r\nhost: 80-ibox.box.test\r\nconnection: close\r\n\r\n").await;
        assert!(status == 502 && answer.contains("paused"), "{answer}");
    });
}

#[test]
fn a_port_that_is_closed_and_a_protocol_that_was_not_asked_for_are_502() {
    run(async {
        let host = Host::new(|_| {}).await;
        let ask = "GET / HTTP/1.1\r\nhost: 80-ibox.box.test\r\nconnection: close\r\n\r\n";
        let closed = async {
            let (stream, _) = host.guest.accept().await.unwrap();
            let mut guest = BufReader::new(stream);
            line(&mut guest).await;
            guest.write_all(b"OK 1\n").await.unwrap();
            line(&mut guest).await;
            guest.write_all(b"CLOSED nothing listens at port 80\n").await.unwrap();
        };
        let ((status, answer), ()) = tokio::join!(host.refuses(ask), closed);
        assert!(status == 502 && answer.contains("nothing listens at port 80"), "{answer}");
        assert!(answer.contains(r#""port":80"#) && answer.contains(r#""sandboxId":"ibox""#), "{answer}");
        let unasked = async {
            let mut guest = host.accept().await;
            head(&mut guest).await;
            guest.write_all(TAKE.as_bytes()).await.unwrap();
        };
        let ((status, answer), ()) = tokio::join!(host.refuses(ask), unasked);
        assert!(status == 502, "{answer}");
        // A guest's refusal is passed on.
        let declined = async {
            let mut guest = host.accept().await;
            head(&mut guest).await;
            guest
                .write_all(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno")
                .await
                .unwrap();
        };
        let mut client = host.client(&(ASK.to_owned() + "\r\n")).await;
        declined.await;
        let mut client = BufReader::new(&mut client);
        assert!(head(&mut client).await.starts_with("http/1.1 403"));
        read(&mut client, "no").await;
    });
}

#[test]
fn ports_that_are_not_public_need_their_token_before_anything_is_done() {
    run(async {
        let host = Host::new(|record| (record.is_private, record.paused) = (true, true)).await;
        let ask = |more: &str| format!("GET / HTTP/1.1\r\nhost: 80-ibox.box.test\r\nconnection: close\r\n{more}\r\n");
        let own = host.gateway.traffic_token(&host.gateway.0.sandboxes.get("ibox").unwrap().get()).unwrap();
        let agents = host.gateway.token("ibox");
        let header = |token: &str| format!("e2b-traffic-access-token: {token}\r\n");
        for wrong in [
            String::new(),
            header(""),
            header(&agents),
            header(&own[1..]),
            header(&own) + &header(&own),
            format!("x-access-token: {own}\r\n"),
        ] {
            let (status, answer) = host.refuses(&ask(&wrong)).await;
            assert!(status == 403 && !answer.contains("paused"), "{wrong}: {answer}");
        }
        let (status, answer) = host.refuses(&ask(&header(&own))).await;
        assert!(status == 502 && answer.contains("paused"), "{answer}");
    });
}

#[test]
fn connections_have_places_which_a_websocket_keeps_until_it_ends() {
    run(async {
        let host = Host::new(|_| {}).await;
        let take = || host.gateway.0.connection_limits.take("ibox", "one", GuestEnd::Port).unwrap();
        let taken: Vec<_> = (1..PER_SANDBOX / 4 * 3).map(|_| take()).collect();
        let mut socket = host.client(&(ASK.to_owned() + "\r\n")).await;
        let mut guest = host.accept().await;
        head(&mut guest).await;
        guest.write_all(TAKE.as_bytes()).await.unwrap();
        head(&mut BufReader::new(&mut socket)).await;
        let ask = "GET / HTTP/1.1\r\nhost: 80-ibox.box.test\r\nconnection: close\r\n\r\n";
        for wanted in [ask, &(ASK.to_owned() + "\r\n")] {
            let (status, answer) = host.refuses(wanted).await;
            assert!(status == 429 && answer.contains("retry-after: 1\r\n"), "{answer}");
            assert!(answer.contains(r#"{"code":429,"message":"192 connections"#), "{answer}");
        }
        // The last quarter is for the agent's clients.
        drop(host.gateway.0.connection_limits.take("ibox", "one", GuestEnd::Agent).unwrap());
        // The agent is reached all the same, and refuses this path.
        let agents = "GET /init HTTP/1.1\r\nhost: 49983-ibox.box.test\r\nconnection: close\r\n\r\n";
        assert_eq!(host.refuses(agents).await.0, 403);
        drop((socket, guest));
        // A request has its place until its answer has been read, and no longer.
        for _ in 0..2 {
            let mut client = answered(&host, ask).await;
            let mut rest = String::new();
            client.read_to_string(&mut rest).await.unwrap();
            assert!(rest.ends_with("\r\n\r\nok"), "{rest}");
        }
        drop(taken);
    });
}

/// Repeats the request until there is a place, and answers for the program.
async fn answered(host: &Host, ask: &str) -> TcpStream {
    loop {
        let client = host.client(ask).await;
        let mut first = [0];
        tokio::select! {
            mut guest = host.accept() => {
                head(&mut guest).await;
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok";
                guest.write_all(answer).await.unwrap();
                return client;
            }
            // The end of the previous connection is noticed a moment later. Until then the request is refused.
            refused = client.peek(&mut first) => assert_eq!(refused.unwrap(), 1),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn a_guest_that_never_answers_is_not_waited_for_without_end() {
    run(async {
        let mut host = Host::new(|_| {}).await;
        let mut gateway = Gateway::of_socket(host.options.clone()).unwrap();
        Arc::get_mut(&mut gateway.0).unwrap().answering = FOR_EVER;
        host.serve(gateway).await;
        let request = "POST / HTTP/1.1\r\nhost: 80-ibox.box.test\r\ncontent-length: 4\r\n\r\nbody";
        let mut client = BufReader::new(host.client(request).await);
        let mut guest = host.accept().await;
        head(&mut guest).await;
        read(&mut guest, "body").await;
        assert_eq!(host.gateway.0.connection_limits.taken("ibox"), 1);
        // The clock advances once no task has any work.
        tokio::time::pause();
        let answer = head(&mut client).await;
        assert!(answer.starts_with("http/1.1 504 "), "{answer}");
        // Its place is free when the connection to the guest has ended.
        let mut rest = Vec::new();
        guest.read_to_end(&mut rest).await.unwrap();
        while host.gateway.0.connection_limits.taken("ibox") > 0 {
            tokio::task::yield_now().await;
        }
    });
}

/// Clients use a connection again after a refusal: one that was answered before its body had come would be closed.
#[test]
fn a_refused_call_has_been_read_and_its_connection_is_used_again() {
    run(async {
        let host = Host::new(|_| {}).await;
        let key = host.gateway.0.keys.add("other", None, crate::keys::Scope::All).unwrap();
        let head_of = |method: &str, path: &str, length: usize| {
            format!(
                "{method} {path} HTTP/1.1\r\nhost: box.test\r\nx-api-key: {key}\r\ncontent-length: {length}\r\n\r\n"
            )
        };
        let mut client = BufReader::new(host.client(&head_of("POST", "/sandboxes/ibox/connect", 2)).await);
        // It is refused for its owner: not before the body has come.
        let early = tokio::time::timeout(Duration::from_millis(200), client.fill_buf()).await;
        assert!(early.is_err(), "{early:?}");
        client.get_mut().write_all(b"{}").await.unwrap();
        for (answer, next) in [("404", head_of("GET", "/health", 0)), ("204", String::new())] {
            let head = head(&mut client).await;
            assert!(head.contains(answer), "{head}");
            let length =
                head.split_once("content-length: ").and_then(|(_, rest)| rest.split_once('\r')?.0.parse().ok());
            client.read_exact(&mut vec![0; length.unwrap_or(0)]).await.unwrap();
            client.get_mut().write_all(next.as_bytes()).await.unwrap();
        }
    });
}
