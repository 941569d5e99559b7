//! A tenant's own calls, and a model of its sandboxes that each list must agree with.

mod reads;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::caller::{Caller, OVERLOAD};
use super::http::Answer;

/// Sandboxes and snapshots at a time.
const MAX_SANDBOXES: usize = 6;
const MAX_SNAPSHOTS: usize = 3;
/// Own calls between two comparisons of the model with the lists.
const EVERY: u64 = 20;
const SECOND: i128 = 1_000_000_000;

/// A sandbox as its tenant knows it.
#[derive(Clone, Debug)]
struct Own {
    token: String,
    metadata: BTreeMap<String, String>,
    is_paused: bool,
    /// The earliest and the latest time of its end, in nanoseconds.
    end: (i128, i128),
    /// Whether it stays to the end of the test.
    is_kept: bool,
}

/// A tenant with its model.
pub(super) struct Actor {
    pub(super) caller: Caller,
    own: BTreeMap<String, Own>,
    snapshots: BTreeSet<String>,
    turns: u64,
}

fn now() -> i128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as i128
}

/// Parses a time in the form of RFC 3339, in UTC.
fn nanoseconds(text: &str) -> Option<i128> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let numbers =
        |text: &str, by: char| text.split(by).map(|part| part.parse::<i128>().ok()).collect::<Option<Vec<_>>>();
    let (seconds, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let [year, month, day] = numbers(date, '-')?.try_into().ok()?;
    let [hour, minute, second] = numbers(seconds, ':')?.try_into().ok()?;
    // Years that begin in March have their leap day at the end.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 719_469;
    let fraction: i128 = format!("{fraction:0<9}").parse().ok()?;
    Some((((days * 24 + hour) * 60 + minute) * 60 + second) * SECOND + fraction)
}

/// A call, and its weight.
type Turn = (u64, fn(&mut Actor));

/// The calls. Those that wait for a guest are few: its kernel may be interpreted.
const TURNS: [Turn; 18] = [
    (400, Actor::show),
    (250, Actor::list),
    (120, Actor::pages),
    (120, Actor::set_timeout),
    (60, Actor::refresh),
    (40, Actor::set_network),
    (40, Actor::look),
    (3, Actor::load),
    (5, Actor::envs),
    (6, Actor::create),
    (5, Actor::end),
    (5, Actor::pause),
    (5, Actor::connect),
    (2, Actor::fork),
    (4, Actor::snapshot),
    (4, Actor::remove_snapshot),
    (3, Actor::repeat_of_the_other),
    (4, Actor::name_of_the_others_snapshot),
];

impl Actor {
    pub(super) fn new(caller: Caller) -> Self {
        Self { caller, own: BTreeMap::new(), snapshots: BTreeSet::new(), turns: 0 }
    }

    /// Makes one call or a few, and compares now and then.
    pub(super) fn turn(&mut self) {
        let sum: u64 = TURNS.iter().map(|(weight, _)| weight).sum();
        let mut left = self.caller.random.below(sum);
        let act = TURNS.iter().find(|(weight, _)| {
            let is_it = left < *weight;
            left = left.saturating_sub(*weight);
            is_it
        });
        act.into_iter().for_each(|(_, act)| act(self));
        self.turns += 1;
        if self.turns.is_multiple_of(EVERY) {
            self.compare();
        }
    }

    fn pick(&mut self, is_such: impl Fn(&Own) -> bool) -> Option<String> {
        let such: Vec<String> = self.own.iter().filter(|(_, own)| is_such(own)).map(|(id, _)| id.clone()).collect();
        self.caller.any(&such)
    }

    /// Sends a call for a sandbox; returns None if the host has no room or time for it, or fails. The
    /// model then has the state that the host shows.
    fn change(
        &mut self,
        route: &str,
        id: &str,
        action: &str,
        body: &str,
        wanted: &[u16],
    ) -> Option<(Answer, i128, i128)> {
        let method = if action == "/network" { "PUT" } else { "POST" };
        let request = self.caller.manage(method, format!("/sandboxes/{id}{action}")).body(body);
        let before = now();
        let answer = self.caller.api(route, &request);
        let after = now();
        if OVERLOAD.contains(&answer.status) {
            self.adopt(id);
            return None;
        }
        if !wanted.contains(&answer.status) {
            let shown = || format!("{route} of {id} {body}: {} {}", answer.status, answer.text());
            self.caller.me.find(&format!("{route} is answered {}", answer.status), shown);
            self.adopt(id);
            return None;
        }
        Some((answer, before, after))
    }

    fn adopt(&mut self, id: &str) {
        let request = self.caller.manage("GET", format!("/sandboxes/{id}"));
        let shown = self.caller.api("own GET /sandboxes/{id}", &request).json();
        let end = nanoseconds(shown["endAt"].as_str().unwrap_or_default());
        let own = self.own.get_mut(id).unwrap_or_else(|| panic!("{id} is not {}'s", self.caller.me.owner));
        own.is_paused = shown["state"] == "paused";
        own.end = end.map_or_else(|| panic!("{id}: {shown}"), |end| (end, end));
    }

    fn add(&mut self, made: &Value, own: Own) -> String {
        let [id, token, traffic] =
            ["sandboxID", "envdAccessToken", "trafficAccessToken"].map(|name| made[name].as_str());
        let (id, token) = id.zip(token).unwrap_or_else(|| panic!("a sandbox that was made: {made}"));
        self.caller.me.made(id, &[Some(token), traffic].into_iter().flatten().collect::<Vec<_>>());
        let other = self.own.insert(id.to_owned(), Own { token: token.to_owned(), ..own });
        assert!(other.is_none(), "{id} was made twice");
        id.to_owned()
    }

    fn timeout(&mut self) -> i128 {
        i128::from(5_000 + self.caller.random.below(80_000))
    }

    /// Makes a sandbox with these fields, and a key for repetition if one is given.
    pub(super) fn make(&mut self, more: &Value, key: Option<&str>, is_kept: bool) -> Option<String> {
        let (number, timeout) = (self.caller.digits(6), self.timeout());
        // The other repeats a call that has a key, and would have the marker in its own lists.
        let marker = if key.is_some() { "anybody" } else { self.caller.me.marker.as_str() };
        let metadata = BTreeMap::from([("of".to_owned(), marker.to_owned()), ("number".to_owned(), number)]);
        let mut fields = json!({
            "templateID": "base", "timeout": timeout as u64, "metadata": metadata, "envVars": {"SECRET": marker},
        });
        let more = more.as_object().into_iter().flatten();
        more.for_each(|(name, value)| fields[name] = value.clone());
        let body = fields.to_string();
        self.make_of(
            &body,
            key,
            Own { token: String::new(), metadata, is_paused: false, end: (0, 0), is_kept },
            timeout,
        )
    }

    fn make_of(&mut self, body: &str, key: Option<&str>, own: Own, timeout: i128) -> Option<String> {
        let path = ["/sandboxes", "/v2/sandboxes"][self.caller.random.below(2) as usize];
        let mut request = self.caller.manage("POST", path).body(body);
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
            self.caller.me.known().repeats.push((key.to_owned(), body.to_owned()));
        }
        let before = now();
        let answer = self.caller.api(&format!("own POST {path}"), &request);
        let end = (before + timeout * SECOND, now() + timeout * SECOND);
        if OVERLOAD.contains(&answer.status) {
            return None;
        }
        if answer.status != 201 {
            self.caller.me.find("a sandbox is not made", || format!("{body}: {} {}", answer.status, answer.text()));
            return None;
        }
        let id = self.add(&answer.json(), Own { end, ..own });
        if key.is_some() {
            let again = self.caller.api("own POST, repeated", &request);
            assert_eq!((again.status, again.json()), (201, answer.json()), "a repetition of {body}");
        }
        Some(id)
    }

    fn create(&mut self) {
        if self.own.len() >= MAX_SANDBOXES {
            return self.end();
        }
        let key = (self.caller.random.below(3) == 0).then(|| format!("again-{}", self.caller.digits(18)));
        let of_snapshot = self.caller.random.below(3) == 0;
        let snapshots: Vec<String> = self.snapshots.iter().cloned().collect();
        let template = self.caller.any(&snapshots).filter(|_| of_snapshot).unwrap_or_else(|| "base".to_owned());
        self.make(&json!({ "templateID": template }), key.as_deref(), false);
    }

    /// Makes a call that the other has made, with its key for repetition and its body: the tenant gets a
    /// sandbox of its own.
    fn repeat_of_the_other(&mut self) {
        let repeats = self.caller.other.known().repeats.clone();
        let Some((key, body)) = self.caller.any(&repeats).filter(|_| self.own.len() < MAX_SANDBOXES) else { return };
        let mut fields: Value = serde_json::from_str(&body).unwrap_or_default();
        // The other's snapshots are not there.
        if fields["templateID"] != "base" || self.caller.me.known().repeats.iter().any(|(own, _)| *own == key) {
            return;
        }
        let timeout = i128::from(fields["timeout"].as_u64().unwrap_or_default());
        let metadata: BTreeMap<String, String> = serde_json::from_value(fields["metadata"].take()).unwrap_or_default();
        let own = Own { token: String::new(), metadata, is_paused: false, end: (0, 0), is_kept: false };
        let me = Arc::clone(&self.caller.me);
        let _alone = me.naming.write().unwrap_or_else(PoisonError::into_inner);
        self.make_of(&body, Some(&key), own, timeout);
    }

    fn end(&mut self) {
        if let Some(id) = self.pick(|own| !own.is_kept) {
            self.end_one(&id);
        }
    }

    fn end_one(&mut self, id: &str) {
        let request = self.caller.manage("DELETE", format!("/sandboxes/{id}"));
        let answer = self.caller.api("own DELETE /sandboxes/{id}", &request);
        if OVERLOAD.contains(&answer.status) {
            return;
        }
        assert_eq!(answer.status, 204, "{id}: {}", answer.text());
        self.own.remove(id);
        self.caller.me.ended(id);
        let again = self.caller.api("own DELETE /sandboxes/{id}", &request);
        assert_eq!(again.status, 404, "{id} has ended: {}", again.text());
    }

    fn set_timeout(&mut self) {
        let (Some(id), timeout) = (self.pick(|_| true), self.timeout()) else { return };
        let (route, body) = ("own POST /sandboxes/{id}/timeout", format!(r#"{{"timeout":{timeout}}}"#));
        let Some((_, before, after)) = self.change(route, &id, "/timeout", &body, &[204]) else { return };
        self.ends(&id, (before + timeout * SECOND, after + timeout * SECOND));
    }

    fn ends(&mut self, id: &str, end: (i128, i128)) {
        self.own.get_mut(id).unwrap_or_else(|| panic!("{id}")).end = end;
    }

    /// Prolongs a sandbox that runs, which never shortens its time.
    fn prolong(&mut self, route: &str, action: &str, status: u16) {
        let (Some(id), timeout) = (self.pick(|own| !own.is_paused), self.timeout()) else { return };
        let field = if action == "/refreshes" { "duration" } else { "timeout" };
        let body = format!(r#"{{"{field}":{timeout}}}"#);
        let Some((_, before, after)) = self.change(route, &id, action, &body, &[status]) else { return };
        let end = self.own[&id].end;
        self.ends(&id, (end.0.max(before + timeout * SECOND), end.1.max(after + timeout * SECOND)));
    }

    fn refresh(&mut self) {
        match self.caller.random.below(2) {
            0 => self.prolong("own POST /sandboxes/{id}/refreshes", "/refreshes", 204),
            _ => self.prolong("own POST /sandboxes/{id}/connect", "/connect", 200),
        }
    }

    fn pause(&mut self) {
        if let Some(id) = self.pick(|own| !own.is_kept) {
            self.pause_one(&id);
        }
    }

    pub(super) fn pause_one(&mut self, id: &str) {
        let status = if self.own[id].is_paused { 409 } else { 204 };
        if self.change("own POST /sandboxes/{id}/pause", id, "/pause", "{}", &[status]).is_some() {
            self.own.get_mut(id).unwrap_or_else(|| panic!("{id}")).is_paused = true;
        }
    }

    fn connect(&mut self) {
        let (Some(id), timeout) = (self.pick(|own| own.is_paused && !own.is_kept), self.timeout()) else { return };
        let action = ["/connect", "/resume"][self.caller.random.below(2) as usize];
        let (route, body) = (format!("own POST /sandboxes/{{id}}{action}"), format!(r#"{{"timeout":{timeout}}}"#));
        let Some((_, before, after)) = self.change(&route, &id, action, &body, &[201]) else { return };
        self.own.get_mut(&id).unwrap_or_else(|| panic!("{id}")).is_paused = false;
        self.ends(&id, (before + timeout * SECOND, after + timeout * SECOND));
    }

    fn fork(&mut self) {
        let (Some(id), timeout) = (self.pick(|_| true), self.timeout()) else { return };
        if self.own.len() >= MAX_SANDBOXES {
            return self.end();
        }
        // A paused sandbox stays paused, and its fork runs.
        let (route, body) = ("own POST /sandboxes/{id}/fork", format!(r#"{{"timeout":{timeout}}}"#));
        let Some((answer, before, after)) = self.change(route, &id, "/fork", &body, &[201]) else { return };
        let end = (before + timeout * SECOND, after + timeout * SECOND);
        for forked in answer.json().as_array().into_iter().flatten() {
            if let Some(code) = forked["error"]["code"].as_u64() {
                assert!(OVERLOAD.map(u64::from).contains(&code), "{forked}");
                continue;
            }
            let own = Own { is_kept: false, is_paused: false, end, ..self.own[&id].clone() };
            self.add(&forked["sandbox"], own);
        }
    }

    fn snapshot(&mut self) {
        if self.snapshots.len() >= MAX_SNAPSHOTS {
            return self.remove_snapshot();
        }
        let name = format!("kept-{}", self.caller.digits(18));
        let name = (self.caller.random.below(2) == 0).then_some(name);
        self.take(name.as_deref());
    }

    /// Takes a snapshot of a sandbox that runs.
    pub(super) fn take(&mut self, name: Option<&str>) -> Option<String> {
        let id = self.pick(|own| !own.is_paused)?;
        let (answer, ..) = self.change(
            "own POST /sandboxes/{id}/snapshots",
            &id,
            "/snapshots",
            &json!({ "name": name }).to_string(),
            &[201],
        )?;
        let taken = answer.json()["snapshotID"].as_str().unwrap_or_default().to_owned();
        assert!(name.is_none_or(|name| name == taken), "{}", answer.text());
        self.caller.me.secrets.add(&taken);
        self.caller.me.known().snapshots.push(taken.clone());
        self.snapshots.insert(taken.clone());
        Some(taken)
    }

    /// Gives a snapshot the name of one of the other's.
    fn name_of_the_others_snapshot(&mut self) {
        let names: Vec<String> =
            self.caller.other.known().snapshots.iter().filter(|name| name.starts_with("kept-")).cloned().collect();
        let (Some(name), Some(id)) = (self.caller.any(&names), self.pick(|own| !own.is_paused)) else { return };
        let (route, body) = ("foreign POST /sandboxes/{own}/snapshots", json!({ "name": name }).to_string());
        let me = Arc::clone(&self.caller.me);
        let _alone = me.naming.write().unwrap_or_else(PoisonError::into_inner);
        if self.change(route, &id, "/snapshots", &body, &[201]).is_some() {
            self.remove(&name);
        }
    }

    fn remove_snapshot(&mut self) {
        let all: Vec<String> = self.snapshots.iter().cloned().collect();
        if let Some(name) = self.caller.any(&all).filter(|_| self.snapshots.len() > 2) {
            self.remove(&name);
            self.snapshots.remove(&name);
            self.caller.me.known().snapshots.retain(|own| *own != name);
        }
    }

    fn remove(&mut self, name: &str) {
        let request = self.caller.manage("DELETE", format!("/templates/{name}"));
        let answer = self.caller.api("own DELETE /templates/{id}", &request);
        assert_eq!(answer.status, 204, "{name}: {}", answer.text());
    }

    fn set_network(&mut self) {
        let Some(id) = self.pick(|own| !own.is_paused) else { return };
        let (route, body) = ("own PUT /sandboxes/{id}/network", r#"{"allow_internet_access":false}"#);
        self.change(route, &id, "/network", body, &[204, 400, 409]);
    }

    pub(super) fn ids(&self) -> Vec<String> {
        self.own.keys().cloned().collect()
    }

    /// Ends all sandboxes and removes all snapshots.
    pub(super) fn end_all(&mut self) {
        while let Some(id) = self.own.keys().next().cloned() {
            self.end_one(&id);
        }
        for name in std::mem::take(&mut self.snapshots) {
            self.remove(&name);
        }
        self.compare();
    }
}

#[test]
fn a_time_is_read_as_it_is_written() {
    assert_eq!(nanoseconds("1970-01-01T00:00:00Z"), Some(0));
    assert_eq!(nanoseconds("2000-02-29T23:59:59.5Z"), Some(951_868_799 * SECOND + SECOND / 2));
    assert_eq!(nanoseconds("2026-11-26T07:10:58.000000001Z"), Some(1_795_677_058 * SECOND + 1));
}
