//! Processes that were broken into, and answer with too much or too little. Supervisors that end.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::thread::{self, JoinHandle};

use super::*;

/// More than is ever read.
const MANY: usize = 4 * MAX_ANSWER;

/// The process of a VM, which answers one request with `head` and parts of `part` until the client has
/// gone, or after `most` bytes. Returns how many it has sent.
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
    assert!(matches!(error, ClientError::LongAnswer), "{error}");
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
async fn a_stop_outlives_a_supervisor_that_ends() {
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
    // Then its own process is asked, which is not there.
    assert!(matches!(&refused, ClientError::NoSuchVm { name, .. } if name == "web"), "{refused:?}");
    ending.join().unwrap();
}
