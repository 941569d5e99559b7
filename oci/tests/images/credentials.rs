//! Registries that require credentials for an image, and the destinations of these.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use clade_oci::{Credentials, Image, PullError, PullOptions, SourceError};
use serde_json::json;

use crate::layout::{Rig, Tar, chain, plain};

const PASSWORD: &str = "open sesame";
/// "Aladdin" and the password, in base64.
const BASIC: &str = "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==";

/// A path, and the authorization of its request.
type Request = (String, Option<String>);
/// A status, further headers, and a body.
type Answer = (&'static str, String, Vec<u8>);

/// A server on this machine, and its requests.
struct Server {
    port: u16,
    asked: Arc<Mutex<Vec<Request>>>,
}

fn read(stream: &TcpStream) -> std::io::Result<Request> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let target = lines.next().unwrap_or(Ok(String::new()))?;
    let mut heads = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        heads.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    Ok((target.split(' ').nth(1).unwrap_or_default().to_owned(), heads.remove("authorization")))
}

impl Server {
    fn start(address: &str, answer: impl Fn(u16, &Request) -> Answer + Send + 'static) -> Self {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&asked);
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let Ok(request) = read(&stream) else { continue };
                let (status, heads, body) = answer(port, &request);
                all.lock().unwrap().push(request);
                let length = body.len();
                let head = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n{heads}\r\n");
                let _ = stream.write_all(&[head.as_bytes(), &body].concat());
            }
        });
        Self { port, asked }
    }

    fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap().clone()
    }
}

/// The content of an image of `rig`, by path of its repository.
#[derive(Clone)]
struct Content {
    blobs: PathBuf,
    manifest: String,
}

impl Content {
    fn of(rig: &Rig) -> Self {
        let manifest = json!(rig.image(&[plain(Tar::default().file("a", b"1").end())]));
        let manifest = manifest["digest"].as_str().unwrap().to_owned();
        Self { blobs: rig.path("layout/blobs/sha256"), manifest }
    }

    fn get(&self, path: &str) -> Answer {
        let path = path.replace("manifests/v1", &format!("manifests/{}", self.manifest));
        let blob = path.rsplit_once("sha256:").and_then(|(_, hex)| fs::read(self.blobs.join(hex)).ok());
        match blob {
            Some(bytes) => ("200 OK", String::new(), bytes),
            None => ("404 Not Found", String::new(), Vec::new()),
        }
    }
}

fn unauthorized(asks: &str) -> Answer {
    ("401 Unauthorized", format!("www-authenticate: {asks}\r\n"), Vec::new())
}

/// Pulls `a/b:v1` from a port of this machine, as Aladdin if there is a password.
fn pull(rig: &Rig, port: u16, password: Option<&str>) -> Result<Image, PullError> {
    let credentials = password.map(|password| Credentials::new("Aladdin", password.to_owned().into()).unwrap());
    let options = PullOptions { credentials, ..PullOptions::default() };
    rig.store().pull(&format!("127.0.0.1:{port}/a/b:v1").parse().unwrap(), &options, &())
}

/// Checks that pulls with no password and with a wrong one are refused, with an error that has only
/// the registry's name.
fn expect_refused(rig: &Rig, port: u16) {
    let host = format!("127.0.0.1:{port}");
    let nobody = pull(rig, port, None).unwrap_err();
    assert!(
        matches!(&nobody, PullError::Source(SourceError::Anonymous { registry }) if *registry == host),
        "{nobody:?}"
    );
    let wrong = pull(rig, port, Some("open wheat")).unwrap_err();
    assert!(matches!(&wrong, PullError::Source(SourceError::Refused { registry }) if *registry == host), "{wrong:?}");
    let said = format!("{} {wrong:?}", chain(&wrong));
    assert!(said.contains(&host) && !said.contains("wheat") && !said.contains("QWxhZGRpbjpvcGVu"), "{said}");
}

#[test]
fn a_server_of_tokens_is_told_the_password_and_the_registry_the_token() {
    let rig = Rig::new();
    let content = Content::of(&rig);
    let registry = Server::start("127.0.0.1", move |port, (path, proof)| match proof.as_deref() {
        _ if path.starts_with("/token?") => match proof.as_deref() {
            Some(BASIC) => ("200 OK", String::new(), br#"{"token": "ticket"}"#.to_vec()),
            Some(_) => ("401 Unauthorized", String::new(), Vec::new()),
            // A public token, without any rights.
            None => ("200 OK", String::new(), br#"{"token": "public"}"#.to_vec()),
        },
        Some("Bearer ticket") => content.get(path),
        _ => unauthorized(&format!("Bearer realm=\"http://127.0.0.1:{port}/token\",service=\"here\"")),
    });
    expect_refused(&rig, registry.port);
    pull(&rig, registry.port, Some(PASSWORD)).unwrap();
    let asked = registry.asked();
    let is_told = |(path, proof): &Request| proof.as_deref() != Some(BASIC) || path.starts_with("/token?");
    assert!(asked.iter().all(is_told), "{asked:?}");
}

#[test]
fn a_registry_that_asks_for_a_password_is_told_it_and_nobody_else_is() {
    let rig = Rig::new();
    let content = Content::of(&rig);
    // The server of blobs, which sends an unnecessary challenge.
    let other = content.clone();
    let elsewhere = Server::start("127.0.0.1", move |port, (path, _)| {
        let greedy = path.starts_with("/greedy");
        if greedy { unauthorized(&format!("Bearer realm=\"http://127.0.0.1:{port}/token\"")) } else { other.get(path) }
    });
    let (to, is_greedy) = (elsewhere.port, Arc::new(Mutex::new(true)));
    let greedy = Arc::clone(&is_greedy);
    let registry = Server::start("127.0.0.1", move |_, (path, proof)| {
        if proof.as_deref() != Some(BASIC) {
            return unauthorized("Basic realm=\"clade\"");
        }
        if path.contains("/blobs/") {
            let way = if *greedy.lock().unwrap() { "/greedy" } else { "" };
            return ("307 Temporary Redirect", format!("location: http://127.0.0.1:{to}{way}{path}\r\n"), Vec::new());
        }
        content.get(path)
    });
    expect_refused(&rig, registry.port);
    let greedy = pull(&rig, registry.port, Some(PASSWORD)).unwrap_err();
    assert!(matches!(greedy, PullError::Source(SourceError::Challenge { .. })), "{greedy:?}");
    *is_greedy.lock().unwrap() = false;
    pull(&rig, registry.port, Some(PASSWORD)).unwrap();
    let asked = elsewhere.asked();
    assert!(asked.len() >= 3 && asked.iter().all(|(_, proof)| proof.is_none()), "{asked:?}");
    assert!(asked.iter().all(|(path, _)| !path.starts_with("/token")), "{asked:?}");
}

#[test]
fn a_password_does_not_leave_this_machine_in_the_clear() {
    let rig = Rig::new();
    let registry = Server::start("127.0.0.1", |_, _| unauthorized("Bearer realm=\"http://127.0.0.2:9/token\""));
    let refused = pull(&rig, registry.port, Some(PASSWORD)).unwrap_err();
    assert!(matches!(&refused, PullError::Source(SourceError::Clear { .. })), "{refused:?}");
    let said = chain(&refused);
    assert!(said.contains("127.0.0.2:9") && !said.contains(PASSWORD), "{said}");
}

#[test]
fn a_file_without_certificates_is_refused_by_its_name() {
    let rig = Rig::new();
    let ca = rig.path("ca.pem");
    let options = PullOptions { ca: Some(ca.clone()), ..PullOptions::default() };
    let refused = || chain(&rig.store().pull(&"127.0.0.1:9/a".parse().unwrap(), &options, &()).unwrap_err());
    assert!(refused().contains("ca.pem cannot be read"));
    fs::write(ca, "no certificate").unwrap();
    assert!(refused().contains("ca.pem has no certificate"));
}

#[test]
fn a_blob_that_stalls_ends_the_pull_and_gives_the_store_back() {
    let rig = Rig::new();
    let content = Content::of(&rig);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let has_blob = Arc::new(AtomicBool::new(false));
    let sent = Arc::clone(&has_blob);
    thread::spawn(move || {
        let mut held = Vec::new();
        for mut stream in listener.incoming().flatten() {
            let Ok((path, _)) = read(&stream) else { continue };
            sent.fetch_or(path.contains("/blobs/"), Ordering::Release);
            let (status, _, body) = content.get(&path);
            let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
            // All but the last byte of a blob.
            let length = if path.contains("/blobs/") { body.len() - 1 } else { body.len() };
            let _ = stream.write_all(&[head.as_bytes(), &body[..length]].concat());
            held.push(stream);
        }
    });
    let options = PullOptions { stall: Some(Duration::from_millis(200)), ..PullOptions::default() };
    let reference = format!("127.0.0.1:{port}/a/b:v1").parse().unwrap();
    // On a busy machine an earlier answer may take as long.
    while !has_blob.load(Ordering::Acquire) {
        let error = rig.store().pull(&reference, &options, &()).unwrap_err();
        assert!(chain(&error).contains("has sent nothing for 0.2 s"), "{}", chain(&error));
    }
    drop(rig.store().lock().unwrap());
}
