//! The supervisor's API as programs meet it.

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
