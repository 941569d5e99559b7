//! The supervisor's API as programs see it.

use std::io::{BufRead, Read, Write};
use std::os::unix::net::UnixStream;

use clade_test_support::{PatientStream, Port, wait_for, wait_until_within};
use serde_json::Value;

use crate::supervisor::Supervised;
use crate::tool::{Answer, CLADE, Runtime, expect_problem, kvm, wait_until};

fn ask(runtime: &Runtime, method: &str, path: &str, body: &str) -> (u16, Value) {
    runtime.http_at(&runtime.dir().join("clade.api"), method, path, body)
}

/// Sends bytes and returns the answer until the server closes.
fn raw(runtime: &Runtime, bytes: &[u8]) -> String {
    let mut stream = PatientStream::from(UnixStream::connect(runtime.dir().join("clade.api")).unwrap());
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
    let all = Supervised::start("0");
    let runtime = &all.runtime;
    std::thread::scope(|scope| {
        // Half a head has no answer; half a body has one.
        let head = scope.spawn(|| raw(runtime, b"GET /v1/vms HTTP/1.1\r\nhost: "));
        let body = b"POST /v1/vms HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{";
        let body = scope.spawn(|| raw(runtime, body));
        assert_eq!(head.join().unwrap(), "");
        let answer = body.join().unwrap();
        assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("urn:clade:late-body"), "{answer}");
    });
    let long = format!("GET /v1/vms HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "x".repeat(1 << 20));
    let answer = raw(runtime, long.as_bytes());
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{answer}");
    let many = format!("GET /v1/vms HTTP/1.1\r\nhost: x\r\n{}\r\n", "x: y\r\n".repeat(100));
    assert!(raw(runtime, many.as_bytes()).starts_with("HTTP/1.1 431 "));
    let (status, answer) = ask(runtime, "POST", "/v1/vms", &"x".repeat(65 << 10));
    expect_problem(&answer, status);
    assert_eq!(answer["type"], "urn:clade:body-too-large");
    assert_eq!(ask(runtime, "GET", "/v1/vms", "").0, 200);
}

/// One request over TCP: the status and the body.
fn over_tcp(address: &str, headers: &str) -> (u16, Value) {
    let mut stream = PatientStream::from(std::net::TcpStream::connect(address).unwrap());
    write!(stream, "GET /v1/supervisor HTTP/1.1\r\nconnection: close\r\n{headers}\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    assert_eq!(head.to_ascii_lowercase().contains("www-authenticate: bearer"), status == 401, "{head}");
    (status, serde_json::from_str(body).unwrap())
}

#[test]
fn a_port_asks_for_the_token_and_a_host_of_its_own() {
    if !kvm() {
        return;
    }
    let mut runtime = Runtime::new();
    let file = runtime.dir().join("token");
    let file = file.to_str().unwrap();
    let port = Port::take();
    let address = format!("127.0.0.1:{}", port.number());
    runtime.spawn(&["serve", "--pool", "0", "--tcp", &address, "--token-file", file]);
    wait_until("the port", || std::net::TcpStream::connect(&address).is_ok());
    let token = std::fs::read_to_string(file).unwrap();
    let token = token.trim();
    let shown =
        |host: &str, token: &str| over_tcp(&address, &format!("host: {host}\r\nauthorization: Bearer {token}\r\n"));
    for host in ["localhost", "127.0.0.1", &address, "[::1]:7"] {
        assert_eq!(shown(host, token).0, 200, "{host}");
    }
    for host in ["evil.example", "localhost.evil.example", ""] {
        let (status, answer) = shown(host, token);
        assert_eq!((status, &answer["type"]), (403, &"urn:clade:bad-host".into()), "{host}");
    }
    for wrong in ["", "x", &token[1..], &token.to_uppercase(), &"0".repeat(64)] {
        let (status, answer) = shown("localhost", wrong);
        assert_eq!((status, &answer["type"]), (401, &"urn:clade:unauthorized".into()), "{wrong}");
    }
    // Guesses from one address are few at a time, and never delay holders of the token.
    let wrong = "0".repeat(64);
    let guess = || {
        std::thread::scope(|scope| {
            let guesses: Vec<_> = (0..16).map(|_| scope.spawn(|| shown("localhost", &wrong).0)).collect();
            assert_eq!(shown("localhost", token).0, 200);
            guesses.into_iter().map(|guess| guess.join().unwrap()).collect::<Vec<u16>>()
        })
    };
    // The places are taken for a second: a slow host may not make the guesses within it. There are a hundred attempts.
    wait_until_within(std::time::Duration::from_secs(20), "guesses at the same time", || {
        let answers = guess();
        assert!(answers.iter().all(|status| matches!(status, 401 | 429)), "{answers:?}");
        assert!(answers.contains(&401), "{answers:?}");
        answers.contains(&429)
    });
    assert_eq!(over_tcp(&address, "host: localhost\r\n").0, 401);
    assert_eq!(over_tcp(&address, &format!("authorization: Bearer {token}\r\n")).0, 403, "no host");
    // The Unix socket needs no token.
    assert_eq!(ask(&runtime, "GET", "/v1/supervisor", "").0, 200);
    // Commands over the port, from another runtime directory.
    let elsewhere = Runtime::new();
    let api = format!("tcp://{address}");
    let command = |args: &[&str], api: &str, file: Option<&str>| {
        let mut command = elsewhere.command(args);
        command.env("CLADE_API", api);
        if let Some(file) = file {
            command.env("CLADE_TOKEN_FILE", file);
        }
        crate::tool::Answer::from(command.output().unwrap())
    };
    assert_eq!(command(&["checkpoints", "--json"], &api, Some(file)).json(), Value::Array(Vec::new()));
    assert_eq!(command(&["ps", "--json"], &api, Some(file)).json(), Value::Array(Vec::new()));
    command(&["pause", "nobody"], &api, Some(file)).expect_refusal("nobody");
    command(&["ps"], &api, None).expect_refusal("CLADE_TOKEN_FILE");
    command(&["ps"], "tcp://example.com", Some(file)).expect_refusal("tcp://example.com");
    command(&["ps"], &api, Some("/nonexistent")).expect_refusal("/nonexistent");
    // Bad arguments start no supervisor.
    let other = Runtime::new();
    other.clade(&["serve", "--tcp", "0.0.0.0:0", "--token-file", file]).expect_refusal("0.0.0.0:0");
    other.clade(&["serve", "--tcp", &address, "--token-file", file]).expect_refusal(&address);
    std::fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    other.clade(&["serve", "--tcp", "127.0.0.1:0", "--token-file", file]).expect_refusal("0644");
    assert_eq!(std::fs::read_dir(other.dir()).unwrap().count(), 0);
}

/// A supervisor without a thread for a request, and one whose VM's process is silent, answer the next attempt.
#[test]
fn a_command_asks_again_when_it_is_refused_for_now() {
    let runtime = Runtime::new();
    let listener = std::os::unix::net::UnixListener::bind(runtime.api()).unwrap();
    let refusal = |kind: &str| format!(r#"{{"type":"urn:clade:{kind}","title":"","status":503,"detail":"{kind}"}}"#);
    let answers = [
        ("503 Service Unavailable", refusal("too-many")),
        ("503 Service Unavailable", refusal("no-thread")),
        ("504 Gateway Timeout", refusal("vm-silent")),
        ("200 OK", "[]".to_owned()),
    ];
    std::thread::spawn(move || {
        for (stream, (status, body)) in listener.incoming().zip(answers) {
            let mut stream = stream.unwrap();
            assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
            write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
        }
    });
    assert_eq!(runtime.clade(&["checkpoints", "--json"]).json(), Value::Array(Vec::new()));
}

/// Commands for all VMs ask the supervisor at the port, and do not read the local directory.
#[test]
fn commands_for_all_vms_go_to_the_port() {
    if !kvm() {
        return;
    }
    let mut all = Supervised { runtime: Runtime::new() };
    let token = tempfile::tempdir().unwrap();
    let file = token.path().join("token");
    let file = file.to_str().unwrap();
    let port = Port::take();
    let address = format!("127.0.0.1:{}", port.number());
    all.runtime.spawn(&["serve", "--pool", "0", "--tcp", &address, "--token-file", file]);
    wait_until("the port", || std::net::TcpStream::connect(&address).is_ok());
    let api = format!("tcp://{address}");
    let elsewhere = Runtime::new();
    let command = |args: &[&str]| {
        let mut command = elsewhere.command(args);
        command.env("CLADE_API", &api).env("CLADE_TOKEN_FILE", file);
        crate::tool::Answer::from(command.output().unwrap())
    };
    all.boot("web", &[]);
    all.fork(&["web"]);
    assert_eq!(command(&["ps", "--json"]).json().as_array().unwrap().len(), 2);
    // On a busy host a VM may be silent once.
    wait_until("the numbers of both", || command(&["stats", "--json"]).json()["vms"].as_array().unwrap().len() == 2);
    let tree = command(&["tree", "--json"]).json();
    assert_eq!(tree[0]["root"]["children"][0]["name"], "web-1", "{tree}");
    let late = command(&["wait", "--all", "--timeout", "300ms"]);
    assert!(late.code == Some(124) && late.stderr.contains("web-1"), "{late:?}");
    crate::tool::kill(all.pid_of("web-1"), rustix::process::Signal::KILL);
    wait_until("the record", || command(&["ps", "-a"]).stdout.contains("signal 9"));
    assert_eq!(command(&["ps", "-a", "--json"]).json()["ended"][0]["parent"], "web", "as the supervisor knows it");
    let logs = command(&["logs", "web-1"]);
    assert!(logs.code == Some(0) && logs.stderr.contains("signal 9"), "{logs:?}");
    let killed = command(&["wait", "web-1"]);
    assert!(killed.code == Some(1) && killed.stdout.contains("signal 9"), "{killed:?}");
    // A VM whose process stands still is among all, and is stopped with them.
    all.fork(&["web", "--name", "still"]);
    crate::tool::kill(all.pid_of("still"), rustix::process::Signal::STOP);
    let list = command(&["ps"]);
    assert!(list.stdout.lines().any(|line| line.starts_with("still ") && line.contains("no answer")), "{list:?}");
    assert!(list.stdout.contains("web"), "{list:?}");
    assert_eq!(command(&["stop", "--all", "--json"]).json().as_array().unwrap().len(), 2);
    assert_eq!(command(&["ps", "--json"]).json(), Value::Array(Vec::new()));
    all.end();
}

#[test]
fn a_boot_and_forks_with_a_key_are_done_once() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    let runtime = &all.runtime;
    let keyed = |path: &str, key: &str, body: &str| {
        let answer = raw(
            runtime,
            format!(
                "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
                 idempotency-key: {key}\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        );
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status: u16 = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str::<Value>(body).unwrap(), head.contains("idempotency-replayed: true"))
    };
    let booted = runtime.clade(&["run", "-d", "--kernel", "bare", "--mem", "32M", "--name", "web"]);
    assert_eq!(booted.code, Some(0), "{booted:?}");
    assert_eq!(runtime.clade(&["pause", "web"]).code, Some(0));
    let fork = r#"{"count": 2, "paused": true}"#;
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..8).map(|_| scope.spawn(|| keyed("/v1/vms/web/fork", "one", fork))).collect();
        let answers: Vec<_> = asked.into_iter().map(|asked| asked.join().unwrap()).collect();
        for (status, answer, _) in &answers {
            assert_eq!((*status, &answer["children"]), (200, &serde_json::json!(["web-1", "web-2"])), "{answer}");
        }
        assert_eq!(answers.iter().filter(|(_, _, is_replayed)| !is_replayed).count(), 1);
    });
    assert_eq!(runtime.names(), ["web", "web-1", "web-2"]);
    let (status, answer, _) = keyed("/v1/vms/web/fork", "one", r#"{"count": 3}"#);
    assert_eq!((status, &answer["type"]), (422, &"urn:clade:key-reused".into()));
    let first = keyed("/v1/vms/web/checkpoint", "two", "{}");
    assert_eq!((first.0, &first.1["name"], first.2), (200, &"web.1".into(), false));
    assert_eq!(keyed("/v1/vms/web/checkpoint", "two", "{}"), (200, first.1, true));
    for count in ["10001", "7472198142884970496", "18446744073709551615"] {
        let (status, answer) =
            ask(runtime, "POST", "/v1/checkpoints/web.1/prepare", &format!(r#"{{"count": {count}}}"#));
        assert_eq!((status, &answer["type"]), (400, &"urn:clade:bad-count".into()), "{count}");
    }
    // A taken name stays taken for the same request.
    for is_replayed in [false, true] {
        let (status, answer, replayed) = keyed("/v1/vms/web/fork", "three", r#"{"name": "web"}"#);
        assert_eq!((status, &answer["type"], replayed), (409, &"urn:clade:name-taken".into(), is_replayed));
    }
    for name in ["web", "web-1", "web-2"] {
        assert_eq!(runtime.clade(&["stop", name]).code, Some(0));
    }
}

#[test]
fn events_say_what_happens_also_in_other_processes() {
    if !kvm() {
        return;
    }
    let mut all = Supervised::start("0");
    let runtime = &mut all.runtime;
    let mut command = runtime.command(&["events", "--json"]);
    command.env("CLADE_LOG", "debug").stderr(std::process::Stdio::piped());
    let mut follows = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut said = std::io::BufReader::new(follows.stderr.take().unwrap()).lines();
    let lines = std::io::BufReader::new(follows.stdout.take().unwrap());
    let (to, seen) = std::sync::mpsc::channel();
    std::thread::spawn(move || lines.lines().map_while(Result::ok).all(|line| to.send(line).is_ok()));
    let next = || {
        let line = wait_for("an event", || seen.try_recv().ok());
        serde_json::from_str::<Value>(&line).unwrap()
    };
    let wait = |event: &str, name: &str| loop {
        let found = next();
        if found["event"] == event && (found["name"] == name || found["parent"] == name) {
            return found;
        }
    };
    // The stream begins once the supervisor has answered.
    assert!(said.any(|line| line.unwrap().contains("events are followed")));
    std::thread::spawn(move || said.for_each(drop));
    let boot = ["run", "-d", "--kernel", "bare", "--mem", "32M", "--name", "web"];
    assert_eq!(runtime.clade(&boot).code, Some(0));
    assert_eq!(wait("vm.created", "web")["parent"], Value::Null);
    wait("vm.booted", "web");
    assert_eq!(runtime.clade(&["pause", "web"]).code, Some(0));
    runtime.clade(&["checkpoint", "web", "cp", "--json"]).json();
    assert_eq!(wait("checkpoint.created", "cp")["vm"], "web");
    runtime.clade(&["fork", "web", "--paused", "--count", "2", "--json"]).json();
    let forked = wait("vm.forked", "web");
    assert_eq!(forked["children"], serde_json::json!(["web-1", "web-2"]));
    runtime.clade(&["rm", "cp", "--json"]).json();
    wait("checkpoint.removed", "cp");
    // A VM of another process of the directory.
    runtime.spawn(&["run", "--kernel", "bare", "--mem", "32M", "--detached", "--name", "other"]);
    wait("vm.created", "other");
    assert_eq!(runtime.clade(&["stop", "other"]).code, Some(0));
    wait("vm.ended", "other");
    for name in ["web", "web-1", "web-2"] {
        assert_eq!(runtime.clade(&["stop", name]).code, Some(0));
        assert_eq!(wait("vm.ended", name)["reason"], Value::Null);
    }
    follows.kill().unwrap();
    follows.wait().unwrap();
    // From its previous position.
    let from =
        format!("GET /v1/events HTTP/1.1\r\nhost: x\r\nlast-event-id: {}\r\n\r\n", forked["id"].as_str().unwrap());
    let mut stream = PatientStream::from(UnixStream::connect(runtime.dir().join("clade.api")).unwrap());
    stream.write_all(from.as_bytes()).unwrap();
    let mut text = String::new();
    while !text.contains("vm.ended") {
        let mut bytes = [0; 4096];
        let got = stream.read(&mut bytes).unwrap();
        assert_ne!(got, 0, "{text}");
        text.push_str(&String::from_utf8_lossy(&bytes[..got]));
    }
    assert!(text.contains("content-type: text/event-stream") && text.contains("checkpoint.removed"), "{text}");
    assert!(!text.contains("checkpoint.created") && !text.contains("event: lost"), "{text}");
    // A supervisor that ends does not wait for readers.
    runtime.signal(rustix::process::Signal::TERM);
    assert_eq!(runtime.ended(), Some(143));
}

#[test]
fn boots_that_cannot_be_are_refused_and_leave_nothing() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    let runtime = &all.runtime;
    let disk = |path: &str, queues: u64| {
        serde_json::json!({
            "disk": {"path": path, "read_only": true, "ephemeral": false, "id": null, "cache": "host",
                     "overlays": null, "latency": null},
            "device": {"queues": queues, "limits": {"bytes": null, "operations": null}},
        })
    };
    let image = runtime.dir().join("image");
    std::fs::write(&image, [0; 4096]).unwrap();
    let image = image.to_str().unwrap();
    let limits = serde_json::json!({"bytes": null, "operations": null});
    let net = |tap: &str, queues: u64| serde_json::json!({"tap": tap, "mac": null, "queues": queues, "receive": limits, "send": limits});
    let many: Vec<_> = (0..17).map(|_| disk(image, 1)).collect();
    let wild = [
        ("memory", serde_json::json!(0)),
        ("memory", serde_json::json!(4096)),
        ("memory", serde_json::json!(4097)),
        ("memory", serde_json::json!(1_u64 << 60)),
        ("memory", serde_json::json!(u64::MAX)),
        ("memory", serde_json::json!(-1)),
        ("cpus", serde_json::json!(0)),
        ("cpus", serde_json::json!(33)),
        ("cpus", serde_json::json!(256)),
        ("cpu", serde_json::json!("z80")),
        ("hide", serde_json::json!("no-such-feature")),
        ("irqchip", serde_json::json!(null)),
        ("disks", serde_json::json!([disk("/nonexistent", 1)])),
        ("disks", serde_json::json!([disk("/", 1)])),
        ("disks", serde_json::json!([disk("/dev/zero", 1)])),
        ("disks", serde_json::json!([disk(image, 0)])),
        ("disks", serde_json::json!([disk(image, 65_535)])),
        ("disks", serde_json::json!(many)),
        ("nets", serde_json::json!([net("a name that is much too long", 1)])),
        ("nets", serde_json::json!([net("clade%d", 0)])),
        ("nets", serde_json::json!([net("clade%d", 65_535)])),
        ("vsock", serde_json::json!({"cid": 0, "socket": "/nonexistent/socket"})),
        ("vsock", serde_json::json!({"cid": 7, "socket": "x".repeat(200)})),
    ];
    for (field, value) in wild {
        let mut config = serde_json::json!({
            "memory": 32 << 20, "cpus": 1, "irqchip": "split", "pit": false, "cpu": "host", "hide": "", "pmu": false,
            "acpi": false, "report_port": false, "disks": [], "nets": [], "vsock": null, "rng": null,
            "balloon": false, "virtio_console": false,
        });
        let what = format!("{field}: {value}");
        config[field] = value;
        let body = serde_json::json!({"name": "web", "config": config, "kernel": "bare"});
        let (status, answer) = ask(runtime, "POST", "/v1/vms", &body.to_string());
        expect_problem(&answer, status);
        assert!((400..500).contains(&status), "{what}: {answer}");
    }
    assert_eq!(runtime.names(), [""; 0]);
    assert_eq!(ask(runtime, "GET", "/v1/supervisor", "").1["vms"], 0);
}

#[test]
fn the_document_is_printed_without_a_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("none");
    let mut command = std::process::Command::new(CLADE);
    let answer: Answer = command.arg("openapi").env("CLADE_RUNTIME_DIR", &nowhere).output().unwrap().into();
    let document = answer.json();
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1."), "{document}");
    assert!(document["paths"]["/v1/vms"]["post"].is_object() && !nowhere.exists());
}

#[test]
fn each_route_of_the_document_is_there_and_no_other_method_is() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    let runtime = &all.runtime;
    let (status, document) = ask(runtime, "GET", "/openapi.json", "");
    assert_eq!(status, 200);
    assert_eq!(runtime.clade(&["openapi"]).json(), document);
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.contains_key("/v1/vms/{name}/pause") && paths.contains_key("/openapi.json"), "{paths:?}");
    for (path, item) in paths {
        let url = path.replace("{name}", "nobody");
        for method in ["get", "put", "post", "delete", "patch"] {
            // Such a stream has no end.
            if path == "/v1/events" && method == "get" {
                continue;
            }
            let (status, answer) = ask(runtime, &method.to_uppercase(), &url, "");
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
        let (status, answer) = ask(runtime, "GET", path, "");
        expect_problem(&answer, status);
        assert_eq!(answer["type"], "urn:clade:no-such-path", "{path}");
    }
}
