//! Compromised processes that answer with too much or too little. Supervisors that end.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::ProblemKind;

use super::*;
use crate::{DaemonError, StopRequest, VmInfo};

/// More bytes than are ever read.
const MANY: usize = 4 * MAX_ANSWER;

/// The process of a VM. It answers one request with `head` and parts of `part` until the client has
/// gone, or after `most` bytes. Returns the number of bytes sent.
fn process(path: PathBuf, head: &'static str, part: Vec<u8>, most: usize) -> JoinHandle<usize> {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
        stream.write_all(head.as_bytes()).unwrap();
        let mut sent = 0;
        while sent < most && stream.write_all(&part).is_ok() {
            sent += part.len();
        }
        sent
    })
}

/// A list keeps the descriptions of all VMs.
#[test]
fn a_vm_with_a_description_without_end_is_silent_in_a_list() {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::new(dir.path());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let chunk = [b"10000\r\n", &vec![b' '; 0x10000][..], b"\r\n"].concat();
    let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    let endless = process(socket_path(dir.path(), "web"), head, chunk, MANY);
    let listed = runtime.block_on(client.list()).unwrap();
    assert_eq!((listed.vms.len(), listed.silent), (0, vec!["web".to_owned()]));
    drop(runtime);
    let sent = endless.join().unwrap();
    assert!(sent < MAX_ANSWER / 2, "{sent} bytes");
}

#[test]
fn an_answer_without_end_is_refused_and_one_of_another_length_too() {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::new(dir.path());
    let at = |name: &str| socket_path(dir.path(), name);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();

    let chunk = [b"10000\r\n", &vec![b' '; 0x10000][..], b"\r\n"].concat();
    let endless = process(at("endless"), "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", chunk, MANY);
    let request = client.request::<VmInfo>(Method::GET, "endless", "", None::<&()>);
    let error = runtime.block_on(request).unwrap_err();
    assert!(matches!(error, ClientError::LongAnswer { most: MAX_ANSWER }), "{error}");
    drop(runtime);
    let sent = endless.join().unwrap();
    assert!((MAX_ANSWER..2 * MAX_ANSWER).contains(&sent), "{sent} bytes");

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for (name, head, has) in [
        ("short", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n", 3),
        ("long", "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", 9),
        ("right", "HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n", 8),
    ] {
        let process = process(at(name), head, vec![b'x'; has], has);
        let mut bytes = [0; 8];
        match runtime.block_on(client.read_memory(name, 0, &mut bytes)) {
            Ok(()) => assert_eq!((has, bytes), (8, [b'x'; 8])),
            Err(ClientError::ShortMemory { length: 8, got, .. }) => assert!(got == has && has != 8, "{name}: {got}"),
            Err(error) => panic!("{name}: {error}"),
        }
        process.join().unwrap();
    }
}

#[tokio::test]
async fn a_stop_is_asked_for_again_until_there_is_no_supervisor() {
    let dir = tempfile::tempdir().unwrap();
    let path = supervisor_path(dir.path());
    let listener = UnixListener::bind(&path).unwrap();
    let ending = thread::spawn(move || {
        // Accepted, and never read.
        for _ in 0..2 {
            drop(listener.accept().unwrap());
        }
        fs::remove_file(&path).unwrap();
    });
    let refused = Client::new(dir.path()).stop("web", StopRequest::default()).await.unwrap_err();
    assert!(matches!(&refused, ClientError::NoSupervisor { .. }), "{refused:?}");
    ending.join().unwrap();
}

/// A supervisor that refuses `refusals` requests with `kind`, and then answers. The counter has the
/// requests.
fn refusing(path: &Path, kind: ProblemKind, refusals: usize) -> Arc<AtomicUsize> {
    let listener = tokio::net::UnixListener::bind(path).unwrap();
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&requests);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
            let (status, body) = match counted.fetch_add(1, Ordering::Relaxed) < refusals {
                true => (kind.status(), format!(r#"{{"type":"{}","title":"","status":500,"detail":""}}"#, kind.urn())),
                false => (StatusCode::OK, "7".to_owned()),
            };
            let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all((head + &body).as_bytes()).await.unwrap();
        }
    });
    requests
}

/// Returns the answer to a request of `method`, and the number of attempts.
async fn ask(client: Client, method: Method, kind: ProblemKind, refusals: usize) -> (Result<u8, ClientError>, usize) {
    let requests = refusing(&supervisor_path(client.dir()), kind, refusals);
    let answer = client.supervisor::<u8>(method, "/v1/vms/web/fork", None::<&()>).await;
    (answer, requests.load(Ordering::Relaxed))
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_may_pass_is_answered_by_another_attempt() {
    let most = MAX_ATTEMPTS as usize;
    for (method, kind, refusals, has_answer, requests) in [
        (Method::POST, ProblemKind::TooMany, 2, true, 3),
        (Method::POST, ProblemKind::NoThread, 1, true, 2),
        (Method::GET, ProblemKind::VmSilent, 1, true, 2),
        // The attempts are bounded.
        (Method::POST, ProblemKind::TooMany, most - 1, true, most),
        (Method::POST, ProblemKind::TooMany, most, false, most),
        // The VM's process may still carry it out, or more room would have to be made.
        (Method::POST, ProblemKind::VmSilent, 1, false, 1),
        (Method::GET, ProblemKind::NoRoom, 1, false, 1),
        (Method::GET, ProblemKind::NoSuchVm, 1, false, 1),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (answer, count) = ask(Client::new(dir.path()).with_retries(), method.clone(), kind, refusals).await;
        assert_eq!((answer.is_ok(), count), (has_answer, requests), "{method} {kind:?} {refusals}: {answer:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let (answer, count) = ask(Client::new(dir.path()), Method::GET, ProblemKind::TooMany, 1).await;
    assert!(answer.is_err() && count == 1, "a supervisor's own client sends a request once: {answer:?}");
}

#[test]
fn a_path_to_the_supervisor_consists_of_names() {
    let dir = tempfile::tempdir().unwrap();
    // A request that is sent fails with another error: nothing listens.
    let client = Client::new(dir.path());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let is_bad = |error: ClientError| matches!(error, ClientError::Name(DaemonError::BadName { .. }));
    for name in ["%6bept", "k%65pt", "kept?", "kept?x", "kept#", "kept ", "..", ".", "", "a/../b", "a\r\nb", "\u{e9}"] {
        let path = format!("/v1/checkpoints/{name}/fork");
        let error = runtime.block_on(client.supervisor::<VmInfo>(Method::POST, &path, None::<&()>)).unwrap_err();
        assert!(is_bad(error), "{name:?}");
        let error = runtime.block_on(client.of_checkpoint::<VmInfo>(Method::GET, name, "", None::<&()>)).unwrap_err();
        assert!(is_bad(error), "{name:?}");
    }
    for name in ["a/b", "kept/fork"] {
        let error = runtime.block_on(client.of_vm::<VmInfo>(Method::GET, name, "", None::<&()>)).unwrap_err();
        assert!(is_bad(error), "{name:?}");
    }
    let path = "/v1/checkpoints/kept/fork";
    let sent = runtime.block_on(client.supervisor::<VmInfo>(Method::POST, path, None::<&()>));
    assert!(matches!(sent, Err(ClientError::NoSupervisor { .. })), "{sent:?}");
}

/// Hundreds of clients at once fill the backlog of a supervisor that is busy.
#[tokio::test]
async fn a_client_waits_while_the_backlog_of_a_socket_is_full() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen, socket_with};
    let dir = tempfile::tempdir().unwrap();
    let path = supervisor_path(dir.path());
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&socket, 0).unwrap();
    let _first = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let client = Client::new(dir.path());
    let mut waits = std::pin::pin!(client.connect_supervisor());
    let answer = tokio::time::timeout(5 * CONNECT_POLL, waits.as_mut()).await;
    assert!(answer.is_err(), "the backlog is full: {answer:?}");
    let _accepted = accept(&socket).unwrap();
    waits.await.unwrap();
}
