//! Files and directories.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bytes::Bytes;
use clade_agent_client::proto::Code;
use clade_agent_client::proto::filesystem::{EntryResponse, FileType, ListDirRequest, ListDirResponse, MoveRequest};
use clade_agent_client::{Client, ClientError};

use crate::{Agent, run};

async fn put(client: &Client, path: &str, bytes: &[u8]) -> Result<String, ClientError> {
    let (mut upload, call) = client.upload(path, None);
    let call = tokio::spawn(call);
    for piece in bytes.chunks(100_000) {
        upload.send(Bytes::copy_from_slice(piece)).await;
    }
    drop(upload);
    call.await.unwrap().map(|written| written.path)
}

async fn get(client: &Client, path: &str) -> Result<Vec<u8>, ClientError> {
    let mut download = client.download(path).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = download.next().await? {
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

fn status(error: &ClientError) -> u16 {
    match error {
        ClientError::Refused { status, .. } => *status,
        ClientError::Rpc(error) => error.code.status(),
        other => panic!("{other}"),
    }
}

#[test]
fn files_go_up_and_down() {
    let agent = Agent::start();
    let client = agent.client();
    run(async {
        let bytes: Vec<u8> = (0..1_000_003u32).map(|number| (number * 7 % 251) as u8).collect();
        let path = agent.path("a b/ü%41.bin");
        assert_eq!(put(&client, &path, &bytes).await.unwrap(), path);
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        assert_eq!(get(&client, &path).await.unwrap(), bytes);
        // Shorter than before, and empty.
        put(&client, &path, b"short").await.unwrap();
        assert_eq!(get(&client, &path).await.unwrap(), b"short");
        put(&client, &path, b"").await.unwrap();
        assert_eq!(get(&client, &path).await.unwrap(), b"");
        // A file with content but without a length.
        assert!(get(&client, "/proc/self/status").await.unwrap().starts_with(b"Name:"));
        assert_eq!(status(&get(&client, "/nowhere").await.unwrap_err()), 404);
        assert_eq!(status(&get(&client, "/tmp").await.unwrap_err()), 400);
        assert_eq!(status(&get(&client, "/dev/zero").await.unwrap_err()), 400);
        assert_eq!(status(&put(&client, "/tmp", b"x").await.unwrap_err()), 400);
        assert_eq!(status(&put(&client, "/dev/null/x", b"x").await.unwrap_err()), 400);
        assert_eq!(status(&put(&client, "/a\0b", b"x").await.unwrap_err()), 400);
    });
}

#[test]
fn new_files_are_the_users() {
    let agent = Agent::start();
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        clade_test_support::skipped("files are given away by root only");
        return;
    }
    let nobody = agent.client().with_user(Some("nobody".into()));
    run(async {
        put(&nobody, &agent.path("new/dir/file"), b"x").await.unwrap();
        for name in ["new", "new/dir", "new/dir/file"] {
            assert_eq!(std::fs::metadata(agent.path(name)).unwrap().uid(), 65534, "{name}");
        }
        let entry = nobody.make_dir(&agent.path("made/below"), None).await.unwrap();
        assert_eq!((entry.kind, entry.owner.as_str()), (FileType::Directory, "nobody"));
        nobody.make_dir(&agent.path("made/of/mode"), Some(0o2750)).await.unwrap();
        assert_eq!(std::fs::metadata(agent.path("made/of/mode")).unwrap().mode() & 0o7777, 0o2750);
        assert_eq!(std::fs::metadata(agent.path("made/of")).unwrap().mode() & 0o7777, 0o755);
    });
}

#[test]
fn directories_are_made_listed_moved_and_removed() {
    let agent = Agent::start();
    let client = agent.client();
    run(async {
        client.make_dir(&agent.path("d/e/f"), None).await.unwrap();
        assert_eq!(status(&client.make_dir(&agent.path("d/e"), None).await.unwrap_err()), 409);
        std::fs::write(agent.path("d/file"), "12").unwrap();
        assert_eq!(status(&client.make_dir(&agent.path("d/file"), None).await.unwrap_err()), 400);
        std::os::unix::fs::symlink(agent.path("d"), agent.path("link")).unwrap();
        let list = async |path: String, depth: u32| {
            let request = ListDirRequest { path, depth };
            let answer: ListDirResponse = client.call("filesystem.Filesystem/ListDir", &request).await.unwrap();
            answer.entries.into_iter().map(|entry| entry.path).collect::<Vec<_>>()
        };
        assert_eq!(list(agent.path("d"), 0).await, [agent.path("d/e"), agent.path("d/file")]);
        let all = [agent.path("link/e"), agent.path("link/e/f"), agent.path("link/file")];
        assert_eq!(list(agent.path("link"), 9).await, all, "paths are as they were asked for");
        assert_eq!(status(&client.list_dir(&agent.path("d/file")).await.unwrap_err()), 400);
        assert_eq!(status(&client.list_dir("/nowhere").await.unwrap_err()), 404);
        let request = MoveRequest { source: agent.path("d/file"), destination: agent.path("x/y/z") };
        let moved: EntryResponse = client.call("filesystem.Filesystem/Move", &request).await.unwrap();
        assert_eq!((moved.entry.path, moved.entry.size), (agent.path("x/y/z"), 2));
        let again = client.call::<_, EntryResponse>("filesystem.Filesystem/Move", &request).await.unwrap_err();
        assert_eq!(status(&again), 404);
        let link = client.stat(&agent.path("link")).await.unwrap();
        assert_eq!((link.kind, link.symlink_target), (FileType::Directory, Some(agent.path("d"))));
        client.remove(&agent.path("link")).await.unwrap();
        assert!(Path::new(&agent.path("d/e/f")).exists(), "the link goes, not what it leads to");
        client.remove(&agent.path("d")).await.unwrap();
        client.remove(&agent.path("d")).await.unwrap();
        assert_eq!(status(&client.stat(&agent.path("d")).await.unwrap_err()), 404);
        for root in ["/", "/tmp/..", "/./"] {
            assert_eq!(status(&client.remove(root).await.unwrap_err()), 400);
        }
    });
}

fn form(agent: &Agent, parts: &[(&str, &str)], query: &str) -> String {
    let mut body = String::new();
    for (name, text) in parts {
        body += &format!("--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n{text}\r\n");
    }
    body += "--B--\r\n";
    let length = body.len();
    agent.say(
        format!(
            "POST /files{query} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Metadata-Origin: a test\r\n\
             Content-Type: multipart/form-data; boundary=B\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .as_bytes(),
    )
}

#[test]
fn forms_have_several_files() {
    let agent = Agent::start();
    let (one, two) = (agent.path("one"), agent.path("sub/two"));
    let answer = form(&agent, &[(&one, "1\r\n1"), (&two, "")], "");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(&two), "{answer}");
    assert_eq!(std::fs::read_to_string(&one).unwrap(), "1\r\n1");
    assert_eq!(std::fs::read_to_string(&two).unwrap(), "");
    let answer = form(&agent, &[(&one, "new"), (&one, "twice")], "");
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("same path"), "{answer}");
    assert_eq!(std::fs::read_to_string(&one).unwrap(), "new");
    let answer = form(&agent, &[("ignored", "named")], &format!("?path={}", agent.path("three")));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(std::fs::read_to_string(agent.path("three")).unwrap(), "named");
    let answer = form(&agent, &[("ignored", "secret")], &format!("?mode=600&path={}", agent.path("four")));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(std::fs::metadata(agent.path("four")).unwrap().mode() & 0o7777, 0o600);
    run(async {
        let notes = agent.client().stat(&one).await.unwrap().metadata;
        // Some file systems have no room for them.
        assert!(notes.is_empty() || notes["origin"] == "a test", "{notes:?}");
    });
}

#[test]
fn an_upload_that_breaks_off_is_an_error() {
    let agent = Agent::start();
    let path = agent.path("half");
    let head = format!(
        "POST /files?path={path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/octet-stream\r\nContent-Length: 100\r\n\r\n"
    );
    let mut stream = agent.raw();
    std::io::Write::write_all(&mut stream, format!("{head}half").as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    let _ = std::io::Read::read_to_string(&mut stream, &mut answer);
    assert!(!answer.contains("200 OK"), "{answer}");
    run(async { agent.client().health().await.unwrap() });
}

/// The agent has not noticed that the first one is over.
#[test]
fn an_upload_that_is_sent_again_has_no_byte_of_the_first() {
    let agent = Agent::start();
    let path = agent.path("again");
    let mut first = agent.raw();
    let head = format!(
        "POST /files?path={path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/octet-stream\r\nContent-Length: 600000\r\n\r\n"
    );
    let write =
        |mut stream: &std::os::unix::net::UnixStream, bytes: &[u8]| std::io::Write::write_all(&mut stream, bytes);
    write(&first, &[head.as_bytes(), &[1; 300_000]].concat()).unwrap();
    clade_test_support::wait_until("its first bytes", || std::fs::metadata(&path).is_ok_and(|file| file.len() > 0));
    run(async {
        assert_eq!(put(&agent.client(), &path, &[2; 200_000]).await.unwrap(), path);
    });
    // The agent may end the connection first.
    let _ = write(&first, &[1; 300_000]);
    let mut answer = String::new();
    let _ = std::io::Read::read_to_string(&mut first, &mut answer);
    assert!(answer.starts_with("HTTP/1.1 409 ") && answer.contains("another upload"), "{answer}");
    assert!(std::fs::read(&path).unwrap() == [2; 200_000]);
}

#[test]
fn the_answer_of_a_wrong_call_is_an_error_of_its_kind() {
    let agent = Agent::start();
    run(async {
        let error = agent.client().call::<_, ListDirResponse>("filesystem.Filesystem/Nothing", &()).await.unwrap_err();
        assert!(matches!(&error, ClientError::Rpc(error) if error.code == Code::Unimplemented), "{error}");
    });
}
