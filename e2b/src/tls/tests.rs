//! The listener with a certificate: who gets through, and what happens when its files change.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsConnector;

use super::*;
use crate::listen::{accept, accept_at_most};

/// Makes a certificate of this host and its key in `dir`.
fn certificate(dir: &Path) -> Option<TlsFiles> {
    clade_test_support::certificate(dir, &[]).map(|(certificate, key)| TlsFiles { certificate, key })
}

/// A client that trusts the certificate in this file.
fn client(trusted: &Path) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&fs::read(trusted).unwrap()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()));
    let config = config.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
    TlsConnector::from(Arc::new(config.with_no_client_auth()))
}

/// Sends a request. Returns the answer, or the error of the handshake.
async fn ask(address: std::net::SocketAddr, client: &TlsConnector) -> io::Result<String> {
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut stream = client.connect(name, stream).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

async fn listener() -> (TcpListener, std::net::SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn router() -> Router {
    Router::new().route("/", get(|| async { "hello" }))
}

#[tokio::test]
async fn clients_get_through_by_tls_alone() {
    let dir = tempfile::tempdir().unwrap();
    let Some(files) = certificate(dir.path()) else { return };
    let trusting = client(&files.certificate);
    let (listener, address) = listener().await;
    tokio::spawn(accept(listener, router(), Some(Arc::new(Tls::open(files).unwrap()))));
    let answer = ask(address, &trusting).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"), "{answer}");
    // A client that expects another certificate, and one without TLS.
    let other = tempfile::tempdir().unwrap();
    let refused = ask(address, &client(&certificate(other.path()).unwrap().certificate)).await.unwrap_err();
    assert!(refused.to_string().contains("certificate"), "{refused}");
    let mut plain = TcpStream::connect(address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // The kernel may reset the connection.
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!String::from_utf8_lossy(&answer).contains("HTTP"), "{answer:?}");
    // Others are served meanwhile and afterwards.
    let _silent = TcpStream::connect(address).await.unwrap();
    ask(address, &trusting).await.unwrap();
}

/// A connection that makes no handshake is as idle as one without a request.
#[tokio::test]
async fn connections_without_a_handshake_make_way() {
    let dir = tempfile::tempdir().unwrap();
    let Some(files) = certificate(dir.path()) else { return };
    let trusting = client(&files.certificate);
    let (listener, address) = listener().await;
    tokio::spawn(accept_at_most(2, listener, router(), Some(Arc::new(Tls::open(files).unwrap()))));
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    ask(address, &trusting).await.unwrap();
    // The oldest have been closed.
    assert_eq!(silent[0].read(&mut [0]).await.unwrap_or(0), 0);
}

/// The clock is paused: it moves when nothing else can happen.
#[tokio::test(start_paused = true)]
async fn a_client_has_a_minute_for_its_handshake_and_not_more() {
    let dir = tempfile::tempdir().unwrap();
    let Some(files) = certificate(dir.path()) else { return };
    let tls = Arc::new(Tls::open(files).unwrap());
    let (listener, address) = listener().await;
    let mut silent = TcpStream::connect(address).await.unwrap();
    // The first bytes of a handshake, and nothing after them.
    silent.write_all(&[22, 3, 1]).await.unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    let begun = tokio::time::Instant::now();
    assert!(tls.accept(stream).await.is_none());
    assert_eq!(begun.elapsed().as_secs(), 60);
    // Its connection is closed then, not kept.
    assert_eq!(silent.read(&mut [0]).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn a_certificate_that_changes_is_used_if_it_is_valid() {
    let dir = tempfile::tempdir().unwrap();
    let Some(files) = certificate(dir.path()) else { return };
    let first = client(&files.certificate);
    let tls = Arc::new(Tls::open(files.clone()).unwrap());
    // As the thread does that a connection starts.
    let look_again = || tls.look();
    let (listener, address) = listener().await;
    tokio::spawn(accept(listener, router(), Some(Arc::clone(&tls))));
    ask(address, &first).await.unwrap();
    // A half-written file, and a key without its certificate.
    fs::write(&files.certificate, "-----BEGIN CERTIFICATE-----\n").unwrap();
    look_again();
    ask(address, &first).await.unwrap();
    let next = tempfile::tempdir().unwrap();
    let other = certificate(next.path()).unwrap();
    fs::copy(&other.certificate, &files.certificate).unwrap();
    look_again();
    ask(address, &first).await.unwrap();
    // The key comes too: connections have it noticed.
    fs::copy(&other.key, &files.key).unwrap();
    tls.loaded().looked_at = Instant::now().checked_sub(LOOK_INTERVAL);
    let second = client(&other.certificate);
    while ask(address, &second).await.is_err() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    ask(address, &first).await.unwrap_err();
    // A file that cannot be read for a while is tried again, although it is the same.
    let third = tempfile::tempdir().unwrap();
    let renewed = certificate(third.path()).unwrap();
    fs::copy(&renewed.certificate, &files.certificate).unwrap();
    fs::remove_file(&files.key).unwrap();
    look_again();
    assert_eq!(tls.loaded().warned, Some(files.stamps()));
    ask(address, &second).await.unwrap();
    fs::rename(&renewed.key, &files.key).unwrap();
    look_again();
    ask(address, &client(&renewed.certificate)).await.unwrap();
}

#[test]
fn files_without_a_certificate_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let Some(files) = certificate(dir.path()) else { return };
    let refused = |files: &TlsFiles| {
        let error = Tls::open(files.clone()).unwrap_err();
        // What a log has.
        println!("{error:?}");
        (error.to_string(), std::error::Error::source(&error).is_some())
    };
    let private = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    let absent = TlsFiles { key: dir.path().join("absent"), ..files.clone() };
    assert_eq!(refused(&absent), (format!("{} cannot be read", absent.key.display()), true));
    let swapped = TlsFiles { certificate: files.key.clone(), key: files.certificate.clone() };
    private(&files.certificate);
    let text = format!("{} has no certificate in PEM form: there is none", files.key.display());
    assert_eq!(refused(&swapped), (text, false));
    let no_key = TlsFiles { key: files.certificate.clone(), ..files.clone() };
    let text = format!("{} has no private key in PEM form: there is none", files.certificate.display());
    assert_eq!(refused(&no_key), (text, false));
    let directory = TlsFiles { certificate: dir.path().to_owned(), ..files.clone() };
    assert_eq!(refused(&directory).0, format!("{} is not a regular file", dir.path().display()));
    let pipe = dir.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    private(&pipe);
    let piped = TlsFiles { key: pipe.clone(), ..files.clone() };
    assert_eq!(refused(&piped).0, format!("{} is not a regular file", pipe.display()));
    for (mode, is_refused) in [(0o640, false), (0o644, true), (0o660, true), (0o604, true)] {
        fs::set_permissions(&files.key, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(Tls::open(files.clone()).is_err(), is_refused, "{mode:o}");
    }
    private(&files.key);
    // A key on one line, or cut: no error has a part of it.
    let key = fs::read_to_string(&files.key).unwrap();
    let secret = key.lines().nth(1).unwrap().as_bytes()[..12].to_vec();
    let texts =
        [key.replace('\n', " "), key.replace('\n', ""), key.trim_end().replace('\n', "\\n"), key[..90].to_owned()];
    for text in texts {
        let wrong = TlsFiles { key: dir.path().join("one-line.pem"), ..files.clone() };
        fs::write(&wrong.key, &text).unwrap();
        private(&wrong.key);
        let error = Tls::open(wrong).unwrap_err();
        assert!(std::error::Error::source(&error).is_none(), "{error:?}");
        let shown = format!("{error} {error:?}");
        let decimal = format!("{secret:?}");
        let shows = |part: &str| shown.contains(part.trim_matches(['[', ']']));
        assert!(!shows(&decimal) && !shows(std::str::from_utf8(&secret).unwrap()), "{shown}");
        assert!(shown.contains("private key in PEM form"), "{shown}");
    }
    let other = tempfile::tempdir().unwrap();
    let mixed = TlsFiles { key: certificate(other.path()).unwrap().key, ..files.clone() };
    assert!(refused(&mixed).0.ends_with("are no certificate with its key"), "{:?}", refused(&mixed));
    fs::write(&files.key, vec![b'x'; 1 << 20 | 1]).unwrap();
    assert_eq!(refused(&files).0, format!("{} has more than 1048576 bytes", files.key.display()));
}
