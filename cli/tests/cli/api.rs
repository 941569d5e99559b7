//! The supervisor's API as programs meet it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use serde_json::Value;

use crate::tool::{Runtime, expect_problem, kvm, wait_until};

/// A supervisor without VMs.
fn served(args: &[&str]) -> Runtime {
    let mut runtime = Runtime::new();
    runtime.spawn(&[&["serve", "--pool", "0"], args].concat());
    let socket = runtime.dir().join("clade.api");
    wait_until("the supervisor", || UnixStream::connect(&socket).is_ok());
    runtime
}

fn ask(runtime: &Runtime, method: &str, path: &str, body: &str) -> (u16, Value) {
    runtime.http_at(&runtime.dir().join("clade.api"), method, path, body)
}

/// Sends bytes and returns what comes until the server closes.
fn raw(runtime: &Runtime, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(runtime.dir().join("clade.api")).unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
    // A server that refuses early may not read all of it.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn half_a_request_and_one_that_is_too_large_end_in_time() {
    if !kvm() {
        return;
    }
    let runtime = served(&[]);
    let begun = std::time::Instant::now();
    std::thread::scope(|scope| {
        // Half a head has no answer; half a body has one.
        let head = scope.spawn(|| raw(&runtime, b"GET /v1/vms HTTP/1.1\r\nhost: "));
        let body = b"POST /v1/vms HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{";
        let body = scope.spawn(|| raw(&runtime, body));
        assert_eq!(head.join().unwrap(), "");
        let answer = body.join().unwrap();
        assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("urn:clade:late-body"), "{answer}");
    });
    assert!(begun.elapsed() < std::time::Duration::from_secs(40));
    let long = format!("GET /v1/vms HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "x".repeat(1 << 20));
    let answer = raw(&runtime, long.as_bytes());
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{answer}");
    let many = format!("GET /v1/vms HTTP/1.1\r\nhost: x\r\n{}\r\n", "x: y\r\n".repeat(100));
    assert!(raw(&runtime, many.as_bytes()).starts_with("HTTP/1.1 431 "));
    let (status, answer) = ask(&runtime, "POST", "/v1/vms", &"x".repeat(65 << 10));
    expect_problem(&answer, status);
    assert_eq!(answer["type"], "urn:clade:body-too-large");
    assert_eq!(ask(&runtime, "GET", "/v1/vms", "").0, 200);
}

#[test]
fn each_route_of_the_document_is_there_and_no_other_method_is() {
    if !kvm() {
        return;
    }
    let runtime = served(&[]);
    let (status, document) = ask(&runtime, "GET", "/openapi.json", "");
    assert_eq!(status, 200);
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.contains_key("/v1/vms/{name}/pause") && paths.contains_key("/openapi.json"), "{paths:?}");
    for (path, item) in paths {
        let url = path.replace("{name}", "nobody");
        for method in ["get", "put", "post", "delete", "patch"] {
            // It would be followed without end.
            if path == "/v1/events" && method == "get" {
                continue;
            }
            let (status, answer) = ask(&runtime, &method.to_uppercase(), &url, "");
            match item.get(method) {
                None => assert_eq!(answer["type"], "urn:clade:method-not-allowed", "{method} {path}: {answer}"),
                Some(operation) => {
                    assert!(
                        operation["responses"][status.to_string()].is_object(),
                        "{method} {path}: {status} {answer}"
                    );
                    assert_ne!(answer["type"], "urn:clade:no-such-path", "{method} {path}");
                    assert_ne!(status, 405, "{method} {path}");
                }
            }
        }
    }
    for path in ["/", "/v1", "/v1/vms/nobody/nothing", "/v1/vms/nobody/fork/x", "/v2/vms", "/openapi.yaml"] {
        let (status, answer) = ask(&runtime, "GET", path, "");
        expect_problem(&answer, status);
        assert_eq!(answer["type"], "urn:clade:no-such-path", "{path}");
    }
}
