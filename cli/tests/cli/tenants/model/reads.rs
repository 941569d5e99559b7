//! A tenant's calls that change nothing: each answer agrees with the model.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{Actor, Own, nanoseconds};
use crate::tenants::caller::{OVERLOAD, Plane};
use crate::tenants::http::Request;

impl Actor {
    pub(super) fn show(&mut self) {
        let Some(id) = self.pick(|_| true) else { return };
        let request = self.caller.get(format!("/sandboxes/{id}"));
        let answer = self.caller.api("own GET /sandboxes/{id}", &request);
        assert_eq!(answer.status, 200, "{id}: {}", answer.text());
        self.agrees(&id, &answer.json());
    }

    /// Checks one sandbox of an answer.
    fn agrees(&mut self, id: &str, shown: &Value) {
        let own = self.own.get_mut(id).unwrap_or_else(|| panic!("{id} is not {}'s: {shown}", self.caller.me.owner));
        let end = nanoseconds(shown["endAt"].as_str().unwrap_or_default()).unwrap_or_default();
        let state = if own.is_paused { "paused" } else { "running" };
        let is_same = shown["state"] == state && shown["metadata"] == json!(own.metadata);
        assert!(is_same && (own.end.0..=own.end.1).contains(&end), "{shown} is not {own:?}, ends at {end}");
        own.end = (end, end);
    }

    pub(super) fn list(&mut self) {
        let marker = self.caller.me.marker.clone();
        let is_filtered = self.caller.random.below(2) == 0;
        let filter = if is_filtered { format!("metadata=of%3D{marker}&") } else { String::new() };
        let path = ["/sandboxes", "/v2/sandboxes"][self.caller.random.below(2) as usize];
        let request = self.caller.get(format!("{path}?{filter}limit=1000"));
        let answer = self.caller.api(&format!("own GET {path}"), &request);
        assert_eq!(answer.status, 200, "{}", answer.text());
        // The older path lists sandboxes that run.
        let is_such =
            |own: &Own| (!is_filtered || own.metadata["of"] == marker) && (path != "/sandboxes" || !own.is_paused);
        self.lists(&answer.json(), is_such);
    }

    /// Checks that a list has such sandboxes of the model, and no others.
    fn lists(&mut self, list: &Value, is_such: impl Fn(&Own) -> bool) {
        let all = list.as_array().unwrap_or_else(|| panic!("a list: {list}"));
        for shown in all {
            self.agrees(shown["sandboxID"].as_str().unwrap_or_default(), shown);
        }
        let count = self.own.values().filter(|own| is_such(own)).count();
        assert_eq!(all.len(), count, "{list}: {:?}", self.own);
    }

    /// Reads the list by pages, some of which begin behind the other's sandboxes.
    pub(super) fn pages(&mut self) {
        let others = self.caller.other.known().pages.clone();
        if let Some(token) = self.caller.any(&others).filter(|_| self.caller.random.below(2) == 0) {
            let at: i128 = token.split('-').next().and_then(|at| at.parse().ok()).unwrap_or_default();
            let unused = format!("{at}-{}", self.caller.unused(token.split_once('-').map_or("", |(_, name)| name)));
            let [one, other] = [&token, &unused].map(|token| {
                let request = self.caller.get(format!("/v2/sandboxes?limit=100&nextToken={token}"));
                self.caller.api("foreign GET /v2/sandboxes?nextToken", &request)
            });
            assert_eq!(one, other, "a page behind {token}, and behind {unused}");
            return;
        }
        let (mut all, mut token) = (Vec::new(), String::new());
        loop {
            let request = self.caller.get(format!("/v2/sandboxes?limit=2&nextToken={token}"));
            let answer = self.caller.api("own GET /v2/sandboxes?nextToken", &request);
            assert_eq!(answer.status, 200, "{}", answer.text());
            all.extend(answer.json().as_array().into_iter().flatten().cloned());
            match answer.header("x-next-token") {
                Some(next) => token = next.to_owned(),
                None => break,
            }
            let pages = &mut self.caller.me.known().pages;
            pages.push(token.clone());
            let surplus = pages.len().saturating_sub(16);
            pages.drain(..surplus);
        }
        self.lists(&Value::Array(all), |_| true);
    }

    /// Reads something of the tenant's own that the model does not have.
    pub(super) fn look(&mut self) {
        let Some(id) = self.pick(|own| !own.is_paused) else { return };
        let targets = [
            ("own GET /sandboxes/{id}/logs", format!("/sandboxes/{id}/logs")),
            ("own GET /templates", "/v2/templates".to_owned()),
            ("own GET /templates/aliases/{id}", "/templates/aliases/base:default".to_owned()),
        ];
        let (route, target) = targets[self.caller.random.below(3) as usize].clone();
        let request = self.caller.get(target);
        let status = self.caller.api(route, &request).status;
        assert!(status == 200 || OVERLOAD.contains(&status), "{route} of {id}: {status}");
    }

    /// Reads the load of a guest, beside that of the other's.
    pub(super) fn load(&mut self) {
        let Some(id) = self.pick(|own| !own.is_paused) else { return };
        let others = self.caller.other.known().sandboxes.clone();
        let other = self.caller.any(&others).map_or_else(String::new, |(other, ..)| other);
        let request = self.caller.get(format!("/sandboxes/metrics?sandbox_ids={other},{id},{other}"));
        let answer = self.caller.api("foreign GET /sandboxes/metrics, with an own", &request);
        let loads = answer.json()["sandboxes"].as_object().cloned().unwrap_or_default();
        // A guest whose host is busy may be silent.
        assert!(answer.status == 200 && loads.keys().all(|one| *one == id), "{id}, {other}: {}", answer.text());
    }

    /// Asks the agent of a sandbox for its variables.
    pub(in super::super) fn envs(&mut self) {
        let Some(id) = self.pick(|own| !own.is_paused) else { return };
        let request = Request::new("GET", "/envs")
            .header("host", &format!("49983-{id}.box.test"))
            .header("x-access-token", &self.own[&id].token);
        let answer = self.caller.call(Plane::Port, "own port GET /envs", &request).unwrap_or_else(|| panic!("{id}"));
        // A fork of a snapshot has the variables of its own call.
        // A guest whose host is busy may be silent.
        let is_silent = [502, 504].contains(&answer.status);
        assert!(is_silent || answer.status == 200 && answer.json()["SECRET"].is_string(), "{id}: {}", answer.text());
    }

    /// Compares the model with the lists of sandboxes and of snapshots.
    pub(in super::super) fn compare(&mut self) {
        let request = self.caller.get("/v2/sandboxes?limit=1000&state=running,paused");
        let list = self.caller.api("own GET /v2/sandboxes", &request).json();
        self.lists(&list, |_| true);
        let request = self.caller.get("/snapshots?limit=1000");
        let list = self.caller.api("own GET /snapshots", &request).json();
        let names = list.as_array().into_iter().flatten().filter_map(|one| one["snapshotID"].as_str());
        let names: BTreeSet<String> = names.map(str::to_owned).collect();
        assert_eq!(names, self.snapshots, "the snapshots of {}: {list}", self.caller.me.owner);
    }

    /// Returns all that this tenant's calls show of its sandboxes and snapshots.
    pub(in super::super) fn portrait(&mut self) -> Vec<String> {
        let ids: Vec<String> = self.own.keys().cloned().collect();
        let mut targets: Vec<String> = ids.iter().map(|id| format!("/sandboxes/{id}")).collect();
        targets.extend(["/v2/sandboxes?limit=1000", "/sandboxes", "/snapshots"].map(str::to_owned));
        let show = |target: String| {
            let request = self.caller.manage("GET", target.as_str());
            format!("{target}: {}", self.caller.api("own portrait", &request).text())
        };
        targets.into_iter().map(show).collect()
    }
}
