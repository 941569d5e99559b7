//! Times of a tenant's valid calls.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::caller::{Caller, OVERLOAD};

/// The pause between two calls: less than a key's rate allows.
const PACE: Duration = Duration::from_millis(12);
/// Reads for each sandbox that is made and ended.
const READS: usize = 4;

/// Times by call.
#[derive(Debug, Default)]
pub(super) struct Times(BTreeMap<&'static str, Vec<Duration>>);

impl Times {
    fn add(&mut self, what: &'static str, begun: Instant) {
        self.0.entry(what).or_default().push(begun.elapsed());
    }

    fn part(&self, what: &str, part: f64) -> f64 {
        let mut all = self.0.get(what).cloned().unwrap_or_default();
        all.sort_unstable();
        let at = ((all.len() as f64 * part).ceil() as usize).clamp(1, all.len().max(1)) - 1;
        all.get(at).map_or(0.0, |time| time.as_secs_f64() * 1e3)
    }
}

/// Lists, shows, makes and ends sandboxes, so many times.
pub(super) fn measure(caller: &mut Caller, rounds: usize) -> Times {
    let mut times = Times::default();
    let body = json!({ "templateID": "base", "timeout": 3600, "metadata": {"of": caller.me.marker} }).to_string();
    for _ in 0..rounds {
        let begun = Instant::now();
        let request = caller.manage("POST", "/sandboxes").body(&*body);
        let answer = caller.api("measured POST /sandboxes", &request);
        if answer.status != 201 {
            if !OVERLOAD.contains(&answer.status) {
                caller.me.find("a sandbox is not made", || format!("{body}: {} {}", answer.status, answer.text()));
            }
            continue;
        }
        times.add("POST /sandboxes", begun);
        let made = answer.json();
        let (id, token) = made["sandboxID"].as_str().zip(made["envdAccessToken"].as_str()).unwrap_or_else(|| {
            panic!("a sandbox that was made: {} {made}", answer.status);
        });
        caller.me.made(id, &[token]);
        for _ in 0..READS {
            for (what, target) in
                [("GET /v2/sandboxes", "/v2/sandboxes".to_owned()), ("GET /sandboxes/{id}", format!("/sandboxes/{id}"))]
            {
                thread::sleep(PACE);
                let request = caller.manage("GET", target);
                let begun = Instant::now();
                let answer = caller.api("measured GET", &request);
                times.add(what, begun);
                assert_eq!(answer.status, 200, "{what}: {}", answer.text());
            }
        }
        let begun = Instant::now();
        let request = caller.manage("DELETE", format!("/sandboxes/{id}"));
        let answer = caller.api("measured DELETE /sandboxes/{id}", &request);
        times.add("DELETE /sandboxes/{id}", begun);
        assert_eq!(answer.status, 204, "{id}: {}", answer.text());
        caller.me.ended(id);
        thread::sleep(PACE);
    }
    times
}

/// Prints both tables side by side. The times decide nothing.
pub(super) fn print(alone: &Times, beside: &Times) {
    println!("{:<24} {:>22} {:>22} {:>8}", "ms (p50, p99)", "alone", "beside the other", "p99 x");
    for what in alone.0.keys() {
        let [alone, beside] = [alone, beside].map(|times| (times.part(what, 0.5), times.part(what, 0.99)));
        let ratio = beside.1 / alone.1.max(1e-6);
        let mark = if ratio > 2.0 { " more than twice" } else { "" };
        let shown = |(half, most): (f64, f64)| format!("{half:.2}, {most:.2}");
        println!("{what:<24} {:>22} {:>22} {ratio:>8.2}{mark}", shown(alone), shown(beside));
    }
}
