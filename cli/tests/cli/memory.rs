//! A guest's memory through the API and `clade memory`, compared with its process's.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::supervisor::{GuestMemory, Supervised};
use crate::tool::kvm;

const PAGE: u64 = 4096;
/// Bytes of the range that is written while the VM is forked: more than fit one page.
const SPAN: usize = 64 << 10;
/// The most bytes of a request.
const MOST: usize = 4 << 20;

/// One request with bytes: the status, the media type and the body of the answer.
fn bytes_at(socket: &Path, method: &str, path: &str, headers: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
    let mut stream = clade_test_support::PatientStream::from(UnixStream::connect(socket).unwrap());
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: clade\r\nconnection: close\r\n{headers}content-length: {}\r\n\r\n",
        body.len()
    );
    // A server that refuses early may not read all of it.
    let _ = stream.write_all(&[head.as_bytes(), body].concat());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or_else(|| panic!("no answer to {path}"));
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let media = head.lines().find_map(|line| line.strip_prefix("content-type: ")).unwrap_or_default().to_owned();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), media, answer.split_off(end + 4))
}

const OCTETS: &str = "content-type: application/octet-stream\r\n";

#[test]
fn memory_is_read_and_written_as_the_guest_sees_it_also_while_it_is_forked() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    let clade = |args: &[&str]| all.runtime.clade(args);
    let (api, own) = (all.runtime.api(), all.runtime.socket("web"));
    let own_pages = |name: &str| {
        let stats = all.http("GET", &format!("/v1/vms/{name}"), "").1;
        stats["memory"]["exclusive_pages"].as_u64().unwrap()
    };
    let at = format!("{:#x}", GuestMemory::AT);

    // Writes at either end appear at the other, and the command shows both.
    GuestMemory::of(all.pid_of("web")).write(1, 7);
    let written = clade(&["memory", "write", "web", &at, "de ad be ef"]);
    assert_eq!((written.code, written.stdout.as_str()), (Some(0), ""), "{written:?}");
    let dump = clade(&["memory", "read", "web", &at, "0x1010"]).stdout;
    let lines: Vec<&str> = dump.lines().collect();
    assert_eq!(lines[0], "000001800000  de ad be ef 00 00 00 00  00 00 00 00 00 00 00 00  |................|");
    assert_eq!(lines[3], "000001801000  07 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|");
    assert_eq!(lines.len(), 4, "equal lines are one star: {dump}");

    // A child sees its parent's memory; its writes are private, and reads take no memory.
    assert_eq!(all.fork(&["web"]), ["web-1"]);
    let before = own_pages("web-1");
    let file = all.runtime.dir().join("memory");
    let path = file.to_str().unwrap();
    let whole = clade(&["memory", "read", "web-1", "0", "32M", "--output", path]);
    assert_eq!(whole.code, Some(0), "{whole:?}");
    let bytes = std::fs::read(&file).unwrap();
    // A read that fails after its first requests leaves the file of before, and no other.
    let names = || std::fs::read_dir(all.runtime.dir()).unwrap().count();
    let there = names();
    clade(&["memory", "read", "web-1", "0", "64M", "--output", path]).expect_refusal("0x2000000");
    assert!(std::fs::read(&file).unwrap() == bytes && names() == there);
    // A whole one takes its permissions: memory has secrets.
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(clade(&["memory", "read", "web-1", "0", "4K", "--output", path]).code, Some(0));
    let found = std::fs::metadata(&file).unwrap();
    assert_eq!((found.len(), found.permissions().mode() & 0o777), (4096, 0o600));
    std::fs::remove_file(&file).unwrap();
    assert_eq!(bytes.len() as u64, GuestMemory::BYTES);
    let place = GuestMemory::AT as usize;
    assert_eq!((&bytes[place..place + 4], bytes[place + PAGE as usize]), ([0xde, 0xad, 0xbe, 0xef].as_slice(), 7));
    assert_eq!(own_pages("web-1"), before, "a read breaks no sharing");
    clade(&["memory", "write", "web-1", &format!("{:#x}", GuestMemory::AT + PAGE - 1), "0102"]);
    assert_eq!(own_pages("web-1"), before + 2, "a write of two pages does");
    let first = |name: &str| clade(&["memory", "read", name, &at, "16"]).stdout;
    assert_eq!(first("web"), first("web-1"));

    // Through the VM's own socket as through the supervisor's; each refusal names the address.
    let uri = |query: &str| format!("/v1/vms/web/memory?{query}");
    for socket in [&api, &own] {
        let query = format!("address={}&length=4", GuestMemory::AT);
        let (status, media, body) = bytes_at(socket, "GET", &uri(&query), "", b"");
        assert_eq!(
            (status, media.as_str(), &body[..]),
            (200, "application/octet-stream", &[0xde, 0xad, 0xbe, 0xef][..])
        );
        for (method, query, body, kind, named) in [
            ("GET", "address=33554428&length=8", &b""[..], "bad-address", "0x2000000"),
            ("GET", "address=18446744073709551615&length=2", b"", "bad-address", "0xffffffffffffffff"),
            ("PUT", "address=33554431", b"xy", "bad-address", "0x2000000"),
            ("PUT", "address=3221225472", b"x", "bad-address", "0xc0000000"),
            ("PUT", "address=4096", b"", "bad-address", "0x1000"),
            ("GET", "address=0&length=4194305", b"", "bad-request", "length=4194305"),
            ("GET", "address=0x10&length=1", b"", "bad-request", "0x10"),
            ("GET", "address=0", b"", "bad-request", "length"),
        ] {
            let (status, media, answer) = bytes_at(socket, method, &uri(query), OCTETS, body);
            let text = String::from_utf8_lossy(&answer).into_owned();
            assert_eq!((status, media.as_str()), (400, "application/problem+json"), "{query}: {text}");
            assert!(text.contains(&format!("urn:clade:{kind}")) && text.contains(named), "{query}: {text}");
        }
        let (status, ..) = bytes_at(socket, "PUT", &uri("address=0"), "content-type: text/plain\r\n", b"x");
        assert_eq!(status, 415);
        assert_eq!(bytes_at(socket, "PUT", &uri("address=0"), OCTETS, &vec![0; MOST + 1]).0, 413);
        let most = vec![0x5a; MOST];
        assert_eq!(bytes_at(socket, "PUT", &uri("address=20971520"), OCTETS, &most).0, 200);
        let (status, _, body) = bytes_at(socket, "GET", &uri("address=20971520&length=4194304"), "", b"");
        assert!(status == 200 && body == most);
    }
    clade(&["memory", "read", "web", "0x2000000"]).expect_refusal("0x2000000");
    clade(&["memory", "read", "nobody", "0"]).expect_refusal("nobody");
    let odd = clade(&["memory", "write", "web", "0", "abc"]);
    assert!(odd.code == Some(2) && odd.stderr.contains("\"abc\""), "{odd:?}");

    // A fork has a write wholly or not at all, and the parent has every one wholly.
    clade(&["resume", "web"]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let query = uri(&format!("address={}", GuestMemory::AT + 16 * PAGE));
            for round in (1..=250u8).cycle() {
                assert_eq!(bytes_at(&own, "PUT", &query, OCTETS, &[round; SPAN]).0, 200);
                if stop.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        for n in 0..12 {
            let name = format!("beside-{n}");
            assert_eq!(all.fork(&["web", "--name", &name]), [name.as_str()]);
            let query = format!("/v1/vms/{name}/memory?address={}&length={SPAN}", GuestMemory::AT + 16 * PAGE);
            let (status, _, body) = bytes_at(&api, "GET", &query, "", b"");
            assert!(status == 200 && body.len() == SPAN);
            assert!(body.iter().all(|byte| *byte == body[0]), "{name} has a part of a write");
        }
        stop.store(true, Ordering::Relaxed);
    });
    all.end();
}
