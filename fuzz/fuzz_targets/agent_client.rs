//! Any answer of a guest to any call of the host's: the call ends, with an answer or an error.
#![no_main]

use std::cell::RefCell;

use clade_agent_client::proto::api::Generation;
use clade_agent_client::proto::process::StartRequest;
use clade_agent_client::{Client, Endpoint};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{Builder, Runtime};

const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: application/connect+json\r\n\r\n";
/// Most messages of a stream that are read: a guest may send any number.
const MAX_MESSAGES: usize = 10_000;

struct Guest {
    runtime: Runtime,
    listener: UnixListener,
    client: Client,
    _dir: tempfile::TempDir,
}

impl Guest {
    fn new() -> Self {
        // The clock is the target's: a wait for a silent guest times out at once.
        let runtime = Builder::new_current_thread().enable_all().start_paused(true).build().expect("a runtime");
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("guest");
        let listener = {
            let _inside = runtime.enter();
            UnixListener::bind(&socket).expect("a socket")
        };
        let client = Client::new(Endpoint::Vsock { socket, port: 1 });
        Self { runtime, listener, client, _dir: dir }
    }
}

thread_local! {
    static GUEST: RefCell<Guest> = RefCell::new(Guest::new());
}

/// Reads up to the end of the request's head, and answers.
async fn answer(mut stream: UnixStream, line: &[u8], answer: &[u8], is_open: bool) {
    let mut asked = [0; 1 << 12];
    let _ = stream.read(&mut asked).await;
    let _ = stream.write_all(line).await;
    let _ = stream.read(&mut asked).await;
    let _ = stream.write_all(answer).await;
    if is_open {
        std::future::pending::<()>().await;
    }
}

async fn call(client: &Client, kind: u8) {
    match kind % 4 {
        0 => drop(client.list().await),
        1 => drop(client.change_generation(&Generation::default()).await),
        2 => {
            let Ok(mut download) = client.download("/a").await else { return };
            while let Ok(Some(_)) = download.next().await {}
        }
        _ => {
            let Ok(mut process) = client.start(&StartRequest::default(), None).await else { return };
            for _ in 0..MAX_MESSAGES {
                let Ok(Some(_)) = process.next().await else { return };
            }
        }
    }
}

fuzz_target!(|input: (u8, &[u8])| {
    let (kind, bytes) = input;
    GUEST.with_borrow(|guest| {
        guest.runtime.block_on(async {
            // Random bytes hardly ever form a head, or the line before it.
            let (line, bytes) = if kind & 16 == 0 { (&b"OK 7\n"[..], bytes) } else { (bytes, &[][..]) };
            let said = if kind & 32 == 0 { [HEAD, bytes].concat() } else { bytes.to_vec() };
            let guest_side = async {
                if let Ok((stream, _)) = guest.listener.accept().await {
                    answer(stream, line, &said, kind & 64 == 0).await;
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = call(&guest.client, kind) => {}
                () = guest_side => {}
            }
        });
    });
});
