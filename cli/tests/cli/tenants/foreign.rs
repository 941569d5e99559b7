//! Calls that name another tenant's things, and requests for its sandboxes' ports. A call is answered
//! as the same call for a name that nothing has.

use std::collections::VecDeque;
use std::io::Write;
use std::net::TcpStream;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use serde_json::json;

use super::caller::{Caller, Plane, shown};
use super::http::{Answer, Request};
use super::spelling::{SPELLINGS, repeated, spelled, without};

/// Requests that are held half-sent at a time.
const MAX_HELD: usize = 16;

/// A client that makes foreign calls alone.
pub(super) struct Stranger {
    pub(super) caller: Caller,
    held: VecDeque<TcpStream>,
}

/// A call, and its weight.
type Turn = (u64, fn(&mut Stranger));
/// The route of a list, a name of the other's, and the target that has the name.
type Filter = (&'static str, String, fn(&str) -> String);

/// The calls. Those that wait for a guest are few: its kernel may be interpreted.
const TURNS: [Turn; 10] = [
    (40, Stranger::by_path),
    (8, Stranger::by_body),
    (10, Stranger::by_query),
    (8, Stranger::by_snapshot),
    (12, Stranger::without_a_key),
    (12, Stranger::by_closed_port),
    (2, Stranger::by_port),
    (1, Stranger::hold),
    (6, Stranger::elsewhere),
    (4, Stranger::in_noise),
];

/// Calls for one sandbox, with valid bodies.
const OF_A_SANDBOX: [(&str, &str, &str); 16] = [
    ("GET", "", ""),
    ("HEAD", "", ""),
    ("DELETE", "", ""),
    ("POST", "/timeout", r#"{"timeout":1}"#),
    ("POST", "/refreshes", r#"{"duration":1}"#),
    ("POST", "/pause", "{}"),
    ("POST", "/resume", r#"{"timeout":1}"#),
    ("POST", "/connect", r#"{"timeout":1}"#),
    ("POST", "/fork", r#"{"count":2}"#),
    ("POST", "/snapshots", r#"{"name":"mine"}"#),
    ("GET", "/metrics", ""),
    ("GET", "/logs", ""),
    ("GET", "/network", ""),
    ("PUT", "/network", r#"{"allow_internet_access":false}"#),
    ("PATCH", "", r#"{"metadata":{}}"#),
    ("POST", "", "{"),
];

/// Paths of the agent, and spellings of the host's paths.
const AT_A_PORT: [(&str, &str, &str); 13] = [
    ("GET", "/envs", ""),
    ("GET", "/metrics", ""),
    ("GET", "/health", ""),
    ("GET", "/files?path=/etc/passwd", ""),
    ("GET", "/files?path=/etc/passwd&username=root&signature=v1_x&signature_expiration=9999999999", ""),
    ("POST", "/files?path=/tmp/x&username=root", "x"),
    ("POST", "/process.Process/List", "{}"),
    ("POST", "/process.Process/Start", r#"{"process":{"cmd":"true"}}"#),
    ("POST", "/filesystem.Filesystem/ListDir", r#"{"path":"/"}"#),
    ("POST", "//clade/shutdown", "{}"),
    ("POST", "/x/../clade/generation", "{}"),
    ("POST", "/%63lade/shutdown", "{}"),
    ("POST", "/clade%2fshutdown", "{}"),
];
const OF_THE_HOST: [(&str, &str, &str); 4] = [
    ("POST", "/init", r#"{"accessToken":"mine"}"#),
    ("POST", "/clade/shutdown", "{}"),
    ("POST", "/clade/generation", "{}"),
    ("GET", "/clade", ""),
];

impl Stranger {
    pub(super) fn new(caller: Caller) -> Self {
        Self { caller, held: VecDeque::new() }
    }

    pub(super) fn turn(&mut self) {
        let sum: u64 = TURNS.iter().map(|(weight, _)| weight).sum();
        let mut left = self.caller.random.below(sum);
        let act = TURNS.iter().find(|(weight, _)| {
            let is_it = left < *weight;
            left = left.saturating_sub(*weight);
            is_it
        });
        act.into_iter().for_each(|(_, act)| act(self));
    }

    /// Drops all connections.
    pub(super) fn rest(&mut self) {
        self.held.clear();
        self.caller.client.rest();
    }

    /// Returns the name of a sandbox of the other.
    fn sandbox(&mut self) -> Option<String> {
        let all: Vec<String> = self.caller.other.known().sandboxes.iter().map(|(id, _)| id.clone()).collect();
        self.caller.any(&all)
    }

    /// Sends a call with a name of the other's, and with an unused one: both answers are the same.
    fn twins(&mut self, route: &str, name: &str, spelling: u64, call: impl Fn(&str) -> Request) -> Option<Answer> {
        let unused = self.caller.unused(name);
        let [one, other] = [name, &unused].map(|name| {
            let (text, is_broken) = spelled(name, spelling);
            let request = call(&text);
            let is_broken = request.is_broken || is_broken;
            let request = request.broken(is_broken);
            let answer = self.caller.call(Plane::Api, route, &request)?;
            let forms = repeated(name, spelling);
            Some((without(&answer.bytes(), &forms), answer, shown(&request)))
        });
        if let (Some((bytes, answer, request)), Some((others, unknown, _))) = (&one, &other) {
            let is_same = answer.status == unknown.status && bytes == others;
            assert!(
                is_same,
                "{} sent {request}\nand got {} {:?} {}\nbut for {unused} {} {:?} {}",
                self.caller.me.owner,
                answer.status,
                answer.head,
                answer.text(),
                unknown.status,
                unknown.head,
                unknown.text()
            );
        }
        one.map(|(_, answer, _)| answer)
    }

    /// Returns a key of this tenant's: the one that only reads, now and then.
    fn key(&mut self) -> String {
        let is_read = self.caller.random.below(4) == 0;
        if is_read { self.caller.me.read.clone() } else { self.caller.me.manage.clone() }
    }

    fn spelling(&mut self) -> u64 {
        if self.caller.random.below(2) == 0 { 0 } else { self.caller.random.below(SPELLINGS) }
    }

    fn by_path(&mut self) {
        let (Some(id), spelling, key) = (self.sandbox(), self.spelling(), self.key()) else { return };
        let (method, action, body) = self.caller.any(&OF_A_SANDBOX).unwrap_or_default();
        let root = ["/sandboxes/", "/v2/sandboxes/"][usize::from(self.caller.random.below(5) == 0)];
        let route = format!("foreign {method} {root}{{id}}{action}");
        let answer = self.twins(&route, &id, spelling, |name| {
            Request::new(method, format!("{root}{name}{action}")).header("x-api-key", &key).body(body)
        });
        if let Some(answer) = answer {
            assert!(answer.status >= 400, "{route} of {id}, spelling {spelling}: {} {}", answer.status, answer.text());
        }
    }

    /// Names the other's things in the body of a call that makes a sandbox, or in its headers.
    fn by_body(&mut self) {
        let Some(id) = self.sandbox() else { return };
        let (key, marker) = (self.key(), self.caller.other.marker.clone());
        let others = self.caller.other.known().repeats.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>();
        let repeat = self.caller.any(&others);
        let bodies: [fn(&str) -> String; 5] = [
            |id| json!({ "templateID": id }).to_string(),
            |id| json!({ "templateID": format!("{id}:default") }).to_string(),
            |id| json!({ "templateID": "base", "volumeMounts": [{"name": id, "path": "/x"}] }).to_string(),
            |id| json!({ "templateID": "base", "network": {"maskRequestHost": format!("{id}/x")} }).to_string(),
            |id| json!({ "templateID": "base", "timeout": 0, "metadata": {"of": id}, "sandboxID": id }).to_string(),
        ];
        let Some(body) = self.caller.any(&bodies) else { return };
        let has_repeat = self.caller.random.below(2) == 0;
        let me = Arc::clone(&self.caller.me);
        let _stays = me.naming.read().unwrap_or_else(PoisonError::into_inner);
        let answer = self.twins("foreign POST /sandboxes", &id, 0, |id| {
            let request = Request::new("POST", "/sandboxes").header("x-api-key", &key).body(body(id));
            match &repeat {
                Some(repeat) if has_repeat => request.header("idempotency-key", repeat).header("x-marker", &marker),
                _ => request,
            }
        });
        assert!(answer.is_some_and(|answer| answer.status >= 400), "a sandbox of {id}");
    }

    /// Lists that have filters for the other's things.
    fn by_query(&mut self) {
        let (Some(id), key) = (self.sandbox(), self.key()) else { return };
        let (marker, pids) = (self.caller.other.marker.clone(), self.caller.other.known().pids.clone());
        let pid = self.caller.any(&pids).unwrap_or_else(|| "1".to_owned());
        let targets: [Filter; 9] = [
            ("/v2/sandboxes?metadata", marker.clone(), |name| format!("/v2/sandboxes?metadata=of%3D{name}")),
            ("/sandboxes?metadata", marker, |name| format!("/sandboxes?metadata=of%253D{name}&limit=1")),
            ("/v2/sandboxes?template", id.clone(), |name| format!("/v2/sandboxes?template={name}&state=paused")),
            ("/sandboxes/metrics", id.clone(), |name| format!("/sandboxes/metrics?sandbox_ids={name}")),
            ("/sandboxes/metrics", id.clone(), |name| format!("/sandboxes/metrics?sandbox_ids=,{name},,{name}%2c")),
            ("/snapshots?sandboxID", id.clone(), |name| format!("/snapshots?sandboxID={name}")),
            ("/templates/aliases/{id}", id.clone(), |name| format!("/templates/aliases/{name}")),
            ("/v2/sandboxes?order", id, |name| format!("/v2/sandboxes?order={name}")),
            ("/sandboxes/{pid}", pid, |name| format!("/sandboxes/{name}")),
        ];
        let Some((route, name, target)) = self.caller.any(&targets) else { return };
        self.twins(&format!("foreign GET {route}"), &name, 0, |name| {
            Request::new("GET", target(name)).header("x-api-key", &key)
        });
    }

    /// Names a snapshot of the other's.
    fn by_snapshot(&mut self) {
        let others = self.caller.other.known().snapshots.clone();
        let (Some(name), spelling, key) = (self.caller.any(&others), self.spelling(), self.key()) else { return };
        let me = Arc::clone(&self.caller.me);
        let _stays = me.naming.read().unwrap_or_else(PoisonError::into_inner);
        let answer = match self.caller.random.below(6) {
            4 => self.twins("foreign POST /snapshots/{id}/fork", &name, spelling, |name| {
                Request::new("POST", format!("/snapshots/{name}/fork")).header("x-api-key", &key).body("{}")
            }),
            0 => self.twins("foreign POST /sandboxes, of a snapshot", &name, 0, |name| {
                let body = json!({ "templateID": name, "timeout": 60 }).to_string();
                Request::new("POST", "/v2/sandboxes").header("x-api-key", &key).body(body)
            }),
            1 => self.twins("foreign DELETE /templates/{id}", &name, spelling, |name| {
                Request::new("DELETE", format!("/templates/{name}")).header("x-api-key", &key)
            }),
            2 => self.twins("foreign GET /templates/aliases/{id}", &name, spelling, |name| {
                Request::new("GET", format!("/templates/aliases/{name}")).header("x-api-key", &key)
            }),
            3 => {
                let route = "foreign GET /snapshots?name";
                let call =
                    |name: &str| Request::new("GET", format!("/snapshots?name={name}")).header("x-api-key", &key);
                let answer = self.twins(route, &name, 0, call);
                return assert!(answer.is_some_and(|answer| answer.text() == "[]"), "{name} is the other's");
            }
            _ => {
                let route = "foreign GET /sandboxes?template";
                let call = |name: &str| {
                    Request::new("GET", format!("/sandboxes?template={name}&limit=9")).header("x-api-key", &key)
                };
                return drop(self.twins(route, &name, 0, call));
            }
        };
        let status = answer.map_or(400, |answer| answer.status);
        assert!(status >= 400, "{name} is the other's, spelling {spelling}: {status}");
    }

    /// Calls without a key, with a wrong one, or with this tenant's key in the wrong place.
    fn without_a_key(&mut self) {
        let Some(id) = self.sandbox() else { return };
        let (method, action, body) = self.caller.any(&OF_A_SANDBOX).unwrap_or_default();
        let (own, read, digits) = (self.caller.me.manage.clone(), self.caller.me.read.clone(), self.caller.digits(40));
        let (other, number) = (self.caller.other.owner.clone(), self.caller.random.below(12));
        let answer = self.twins("foreign call without a key", &id, 0, |id| {
            let request = Request::new(method, format!("/sandboxes/{id}{action}")).body(body);
            match number {
                0 => request,
                1 => request.header("x-api-key", ""),
                2 => request.header("x-api-key", &format!("e2b_{digits}")),
                3 => request.header("x-api-key", &format!("{own}x")),
                4 => request.header("x-api-key", &own[1..]),
                5 => request.header("authorization", &format!("Bearer {own}")),
                6 => request.header("authorization", &format!("Bearer e2b_{digits}")).header("x-team", &other),
                7 => request.header("x-api-key", &other).header("x-api-key", &own),
                8 => request.header("x-api-key", &format!("e2b_{digits}")).header("x-access-token", &digits),
                9 => request.header("x-api-key", &format!("{own}, {read}")),
                10 => request.header("x-api-key", &own).header("origin", "http://localhost"),
                _ => request.header("x_api_key", &own).header("cookie", &format!("x-api-key={own}")),
            }
        });
        let status = answer.map_or(0, |answer| answer.status);
        assert!([401, 403].contains(&status), "{method} {action} without a key ({number}): {status}");
    }

    /// Requests for a port of the other's sandbox, without its token.
    fn by_port(&mut self) {
        let own = self.caller.me.known().sandboxes.clone();
        let (Some(id), Some((own, token))) = (self.sandbox(), self.caller.any(&own)) else { return };
        let (method, path, body) = self.caller.any(&AT_A_PORT).unwrap_or_default();
        let port = [49983, 49983, 49983, 8000, 22][self.caller.random.below(5) as usize];
        let request = Request::new(method, path).body(body);
        let request = match self.caller.random.below(6) {
            0 | 1 => request.header("host", &format!("{port}-{id}.box.test")),
            2 => request.header("host", &format!("{port}-{}.BOX.test:80", id.to_ascii_uppercase())),
            3 | 4 => request.header("e2b-sandbox-id", &id).header("e2b-sandbox-port", &port.to_string()),
            _ => Request { target: format!("http://{port}-{own}.box.test{path}"), ..request }
                .header("e2b-sandbox-id", &id),
        };
        let request = self.with_a_token(request, &token);
        let answer = self.at_a_port(&format!("foreign port {method} {path}"), &request);
        // The agent's health is open to all who know a sandbox's name.
        let is_open = path == "/health" && answer.status == 204;
        assert!(answer.status >= 400 || is_open, "{}: {answer:?}", shown(&request));
    }

    /// Adds tokens, none of which opens a sandbox of the other.
    fn with_a_token(&mut self, request: Request, token: &str) -> Request {
        let digits = self.caller.digits(64);
        match self.caller.random.below(8) {
            0 => request,
            1..=3 => request.header("x-access-token", token),
            4 => request.header("x-access-token", &digits).header("e2b-traffic-access-token", &digits),
            5 => request.header("x-access-token", token).header("x-access-token", &digits),
            6 => request.header("authorization", &format!("Bearer {token}")).header("e2b-traffic-access-token", token),
            _ => request
                .header("connection", "upgrade")
                .header("upgrade", "websocket")
                .header("sec-websocket-key", "eA=="),
        }
    }

    fn at_a_port(&mut self, route: &str, request: &Request) -> Answer {
        self.caller.call(Plane::Port, route, request).unwrap_or_else(|| panic!("no answer to {}", shown(request)))
    }

    /// The same where the host refuses them, and no guest is asked.
    fn by_closed_port(&mut self) {
        let (own, private) = (self.caller.me.known().sandboxes.clone(), self.caller.other.known().private.clone());
        let (Some(id), Some((own, token)), Some(private)) =
            (self.sandbox(), self.caller.any(&own), self.caller.any(&private))
        else {
            return;
        };
        let (host, digits, key) = (format!("49983-{own}.box.test"), self.caller.digits(18), self.key());
        let (method, path, body) = self.caller.any(&OF_THE_HOST).unwrap_or_default();
        let (request, wanted) = match self.caller.random.below(8) {
            0 => (Request::new("GET", "/").header("host", &format!("8000-{private}.box.test")), 403),
            1 => (Request::new("GET", "/").header("e2b-sandbox-id", &private).header("e2b-sandbox-port", "22"), 403),
            2 => (Request::new(method, path).body(body).header("host", &format!("49983-{id}.box.test")), 403),
            3 => (Request::new(method, path).body(body).header("e2b-sandbox-id", &id), 403),
            4 => (Request::new("GET", "/envs").header("host", &host).header("e2b-sandbox-id", &id), 400),
            5 => (Request::new("GET", "/envs").header("e2b-sandbox-id", &own).header("e2b-sandbox-id", &id), 400),
            6 => (Request::new("GET", "/envs").header("e2b-sandbox-id", &format!("i{digits}")), 502),
            // With a key it is a call, which has no such path.
            _ => (Request::new("GET", "/envs").header("e2b-sandbox-id", &id).header("x-api-key", &key), 404),
        };
        let request = self.with_a_token(request, &token);
        let status = self.at_a_port("foreign port, refused by the host", &request).status;
        assert!(status == wanted || status == 400, "{} is answered {status}", shown(&request));
    }

    /// Sends the beginning of a request, and holds the connection.
    fn hold(&mut self) {
        let (Some(id), key) = (self.sandbox(), self.key()) else { return };
        let number = self.caller.random.below(4);
        let text = match number {
            0 => format!(
                "POST /sandboxes/{id}/fork HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\ncontent-length: 9\r\n\r\n{{"
            ),
            1 => format!("POST /files HTTP/1.1\r\nhost: 49983-{id}.box.test\r\ncontent-length: 99999\r\n\r\nx"),
            2 => format!("GET /envs HTTP/1.1\r\nhost: 49983-{id}.box.test\r\n"),
            _ => format!("GET / HTTP/1.1\r\nhost: 8000-{id}.box.test\r\ntransfer-encoding: chunked\r\n\r\n1\r\n"),
        };
        let mut stream = self.caller.client.connect();
        let _ = stream.write_all(text.as_bytes());
        self.held.push_back(stream);
        if self.held.len() > MAX_HELD {
            self.held.pop_front();
        }
        self.caller.note("foreign request, half-sent", 0, Duration::ZERO);
    }

    /// Paths that the API lacks, some of which are the supervisor's or those of E2B's volumes and teams.
    fn elsewhere(&mut self) {
        let (Some(id), key) = (self.sandbox(), self.key()) else { return };
        let roots = [
            "/volumes/",
            "/volumemounts/",
            "/secrets/",
            "/teams/",
            "/nodes/",
            "/admin/",
            "/api-keys/",
            "/v1/vms/",
            "/v1/checkpoints/",
            "/v1/supervisor?",
            "/metrics?",
            "/openapi.json?",
            "/sandboxes/..%2f..%2fv1%2fvms%2f",
            "/templates/",
            "/v2/templates/",
            "/v3/templates/",
            "/events/sandboxes/",
            "/sandboxes/snapshots/",
            "/e2b/",
        ];
        let (root, method) =
            (self.caller.any(&roots).unwrap_or("/"), self.caller.any(&["GET", "POST", "PUT"]).unwrap_or("GET"));
        let answer = self.twins("foreign call elsewhere", &id, 0, |id| {
            Request::new(method, format!("{root}{id}")).header("x-api-key", &key).body(json!({ "id": id }).to_string())
        });
        assert!(answer.is_some_and(|answer| answer.status >= 400), "{method} {root}{id}");
    }

    /// Bytes that are a request in part.
    fn in_noise(&mut self) {
        let (Some(id), key) = (self.sandbox(), self.key()) else { return };
        let (number, noise) = (self.caller.random.below(6), self.caller.digits(40));
        self.twins("foreign broken request", &id, 0, |id| {
            let request = Request::new("GET", format!("/sandboxes/{id}")).header("x-api-key", &key);
            let request = match number {
                0 => request.header("content-length", "5").header("content-length", "6"),
                1 => request.header("transfer-encoding", "chunked").header("x", &noise).body("zz\r\n"),
                2 => request.header("x", &"y".repeat(80_000)),
                3 => Request { method: "GE T".to_owned(), ..request },
                4 => request.header("host", &format!("49983-{id}.box.test")).header("host", "x"),
                _ => Request { target: format!("/sandboxes/{id} x"), ..request },
            };
            request.broken(true)
        });
    }
}
