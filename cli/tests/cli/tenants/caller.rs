//! A tenant, and a client of it that judges each answer.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use clade_test_support::Random;

use super::http::{Answer, Client, Request};
use super::oracle::{STEM, Secrets};

/// Statuses of a call for which the host has no room or time.
pub(super) const OVERLOAD: [u16; 3] = [503, 504, 507];
/// The same of a request for a sandbox's port, with those of a port that cannot be reached.
const OF_A_PORT: [u16; 5] = [501, 502, 503, 504, 507];
/// The pause after a refusal because of a key's rate.
const PACE: Duration = Duration::from_millis(10);

/// The names that every tenant knows of another. Keys and tokens are not among them.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Sandboxes, with their tokens, which the tenant itself uses.
    pub(super) sandboxes: Vec<(String, String)>,
    /// Those of them whose ports need a token.
    pub(super) private: Vec<String>,
    /// Snapshots by their own names, and by those of their checkpoints.
    pub(super) snapshots: Vec<String>,
    /// Tokens of pages of the list of sandboxes.
    pub(super) pages: Vec<String>,
    /// Idempotency keys, each with its body.
    pub(super) repeats: Vec<(String, String)>,
    pub(super) pids: Vec<String>,
}

type Tally = BTreeMap<(String, u16), (u64, Duration)>;

/// The owner of two keys.
#[derive(Debug)]
pub(super) struct Tenant {
    pub(super) owner: String,
    pub(super) address: String,
    /// The key that makes all calls, and the one that only reads.
    pub(super) manage: String,
    pub(super) read: String,
    pub(super) marker: String,
    pub(super) secrets: Secrets,
    known: Mutex<Known>,
    /// Held for writing while the tenant uses a snapshot's name or an idempotency key of another's.
    pub(super) naming: RwLock<()>,
    pub(super) calls: AtomicU64,
    pub(super) foreign: AtomicU64,
    pub(super) limited: AtomicU64,
    pub(super) overloaded: AtomicU64,
    /// The number of calls by route and status, and their time together.
    tally: Mutex<Tally>,
    /// Answers that are wrong, but reveal and change nothing: by kind, with the first one and their number.
    findings: Mutex<BTreeMap<String, (String, u64)>>,
}

impl Tenant {
    pub(super) fn new(owner: &str, address: &str, [manage, read]: [String; 2], marker: &str) -> Self {
        let secrets = Secrets::new(&[marker, owner]);
        [&manage, &read].into_iter().for_each(|key| secrets.add(key));
        Self {
            owner: owner.to_owned(),
            address: address.to_owned(),
            manage,
            read,
            marker: marker.to_owned(),
            secrets,
            known: Mutex::default(),
            naming: RwLock::default(),
            calls: AtomicU64::new(0),
            foreign: AtomicU64::new(0),
            limited: AtomicU64::new(0),
            overloaded: AtomicU64::new(0),
            tally: Mutex::default(),
            findings: Mutex::default(),
        }
    }

    pub(super) fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a sandbox that was made.
    pub(super) fn made(&self, id: &str, tokens: &[&str]) {
        self.secrets.add(id);
        tokens.iter().for_each(|token| self.secrets.add(token));
        let token = tokens.first().copied().unwrap_or_default();
        let mut known = self.known();
        known.sandboxes.push((id.to_owned(), token.to_owned()));
        if tokens.len() > 1 {
            known.private.push(id.to_owned());
        }
    }

    pub(super) fn ended(&self, id: &str) {
        let mut known = self.known();
        known.sandboxes.retain(|(own, _)| own != id);
        known.private.retain(|own| own != id);
    }

    pub(super) fn count(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a wrong answer. The test goes on, and fails at its end.
    pub(super) fn find(&self, kind: &str, first: impl FnOnce() -> String) {
        let mut findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        findings.entry(kind.to_owned()).or_insert_with(|| (first(), 0)).1 += 1;
    }

    /// Returns the wrong answers.
    pub(super) fn findings(&self) -> Vec<String> {
        let findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        findings.iter().map(|(kind, (first, count))| format!("{kind}, {count} times: {first}")).collect()
    }

    /// Prints the calls by route and status.
    pub(super) fn print(&self) {
        let (calls, foreign) = (self.count(), self.foreign.load(Ordering::Relaxed));
        let [limited, overloaded] = [&self.limited, &self.overloaded].map(|count| count.load(Ordering::Relaxed));
        println!(
            "{}: {calls} calls, {:.0} % foreign; {limited} more refused by a key's rate; {overloaded} for lack of room or time",
            self.owner,
            foreign as f64 * 100.0 / calls.max(1) as f64
        );
        let mut routes = BTreeMap::<String, (Vec<String>, u64, Duration)>::new();
        for ((route, status), (count, sum)) in &*self.tally() {
            let of_route = routes.entry(route.clone()).or_default();
            of_route.0.push(format!("{status}: {count}"));
            (of_route.1, of_route.2) = (of_route.1 + count, of_route.2 + *sum);
        }
        for (route, (statuses, count, sum)) in routes {
            let mean = sum.as_secs_f64() * 1e3 / count.max(1) as f64;
            println!("  {route:<52} {mean:>9.2} ms  {}", statuses.join(", "));
        }
    }
}

/// Where a request goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plane {
    Api,
    Port,
}

/// A client of a tenant.
pub(super) struct Caller {
    pub(super) me: Arc<Tenant>,
    pub(super) other: Arc<Tenant>,
    pub(super) client: Client,
    pub(super) random: Random,
}

impl Caller {
    pub(super) fn new(me: &Arc<Tenant>, other: &Arc<Tenant>, seed: u64) -> Self {
        let client = Client::new(&me.address);
        Self { me: Arc::clone(me), other: Arc::clone(other), client, random: Random::new(seed) }
    }

    /// Sends a request and judges its answer. None if the request was broken and got no answer.
    pub(super) fn call(&mut self, plane: Plane, route: &str, request: &Request) -> Option<Answer> {
        loop {
            let begun = Instant::now();
            let answer = self.client.send(request);
            let took = begun.elapsed();
            let Some(answer) = answer else {
                assert!(request.is_broken, "{} was cut: {}", self.me.owner, shown(request));
                self.note(route, 0, took);
                return None;
            };
            self.judge(plane, request, &answer);
            // An answer to HEAD has no body that names the reason.
            let is_of_rate = answer.text().contains("too many calls with this key") || request.method == "HEAD";
            if answer.status == 429 && is_of_rate {
                self.me.limited.fetch_add(1, Ordering::Relaxed);
                thread::sleep(PACE);
                continue;
            }
            self.note(route, answer.status, took);
            return Some(answer);
        }
    }

    pub(super) fn note(&self, route: &str, status: u16, took: Duration) {
        self.me.calls.fetch_add(1, Ordering::Relaxed);
        let is_foreign = route.starts_with("foreign");
        self.me.foreign.fetch_add(u64::from(is_foreign), Ordering::Relaxed);
        self.me.overloaded.fetch_add(u64::from(OVERLOAD.contains(&status)), Ordering::Relaxed);
        let mut tally = self.me.tally();
        let (count, sum) = tally.entry((route.to_owned(), status)).or_default();
        (*count, *sum) = (*count + 1, *sum + took);
    }

    fn judge(&self, plane: Plane, request: &Request, answer: &Answer) {
        let (status, text) = (answer.status, answer.text());
        let told = || format!("{} sent {}\nand got {status} {:?}\n{text}", self.me.owner, shown(request), answer.head);
        let leaked = self.other.secrets.leaked(&request.bytes(), &answer.bytes());
        assert!(leaked.is_empty(), "an answer has {leaked:?} of {}: {}", self.other.owner, told());
        let is_known = match plane {
            Plane::Api => (200..500).contains(&status) || OVERLOAD.contains(&status),
            Plane::Port => (200..500).contains(&status) || OF_A_PORT.contains(&status),
        };
        if !is_known {
            self.me.find(&format!("the status {status}"), told);
        }
        if status < 400 || request.method == "HEAD" || request.is_broken && answer.body.is_empty() {
            return;
        }
        let body = answer.json();
        let is_formed = body["code"] == status && body["message"].as_str().is_some_and(|text| !text.is_empty());
        if !is_formed {
            self.me.find(&format!("an error {status} of another form"), told);
        }
        if status == 429 && answer.header("retry-after").is_none() {
            self.me.find("429 without Retry-After", told);
        }
    }

    /// Sends a call that must have an answer.
    pub(super) fn api(&mut self, route: &str, request: &Request) -> Answer {
        self.call(Plane::Api, route, request).unwrap_or_else(|| panic!("no answer to {}", shown(request)))
    }

    /// Returns a call with the key that makes all calls.
    pub(super) fn manage(&self, method: &str, target: impl Into<String>) -> Request {
        Request::new(method, target).header("x-api-key", &self.me.manage)
    }

    /// Returns a call with either key.
    pub(super) fn get(&mut self, target: impl Into<String>) -> Request {
        let is_read = self.random.below(2) == 0;
        let key = if is_read { &self.me.read } else { &self.me.manage };
        Request::new("GET", target).header("x-api-key", key)
    }

    pub(super) fn digits(&mut self, count: usize) -> String {
        (0..count).filter_map(|_| char::from_digit(self.random.below(16) as u32, 16)).collect()
    }

    /// Returns a name of the same form that nothing has: each row of digits is replaced.
    pub(super) fn unused(&mut self, name: &str) -> String {
        let Some(at) = (0..name.len().saturating_sub(STEM - 1)).find(|at| is_stem(name, *at)) else {
            // Without such a row, the last character is replaced.
            let last = name.len() - 1;
            let digit = if name.ends_with('7') { "8" } else { "7" };
            return format!("{}{digit}", &name[..last]);
        };
        let digits = self.digits(STEM);
        format!("{}{digits}{}", &name[..at], &name[at + STEM..])
    }

    /// Returns one of these, if there is one.
    pub(super) fn any<T: Clone>(&mut self, all: &[T]) -> Option<T> {
        all.get(self.random.below(all.len().max(1) as u64) as usize).cloned()
    }
}

fn is_stem(name: &str, at: usize) -> bool {
    name.get(at..at + STEM).is_some_and(|part| part.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Returns a request as a text of bounded length.
pub(super) fn shown(request: &Request) -> String {
    let bytes = request.bytes();
    String::from_utf8_lossy(&bytes[..bytes.len().min(1_500)]).escape_debug().to_string()
}
