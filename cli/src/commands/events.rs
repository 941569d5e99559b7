//! `clade events`: the events of VMs and checkpoints as they happen.

use std::io::{self, Write};

use serde_json::{Map, Value};

use crate::commands::args::EventsArgs;
use crate::commands::remote::ask;
use crate::commands::{Failure, Outcome};
use clade_api::Client;

pub(super) fn main(args: &EventsArgs) -> Outcome {
    let mut written = Ok(());
    ask(Client::default().follow(|data| {
        let line = if args.json { data.to_owned() } else { describe(data) };
        written = writeln!(io::stdout(), "{line}").and_then(|()| io::stdout().flush());
        written.is_ok()
    }))?;
    written.map_err(Failure::run)?;
    Err(Failure::Run(anyhow::anyhow!("the supervisor has ended")))
}

/// Formats an event in a line: the time of day (UTC), its kind, and its values.
fn describe(data: &str) -> String {
    let mut fields: Map<String, Value> = serde_json::from_str(data).unwrap_or_default();
    fields.remove("id");
    let at = fields.remove("at").and_then(|at| at.as_f64()).map(|at| {
        let second = at as u64 % 86_400;
        format!("{:02}:{:02}:{:02} ", second / 3600, second / 60 % 60, second % 60)
    });
    let event = fields.remove("event");
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Array(all) => all.iter().map(|one| one.as_str().unwrap_or_default()).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    };
    let values = fields.iter().filter(|(_, value)| !value.is_null());
    let values: String = values.map(|(name, value)| format!(" {name}={}", text(value))).collect();
    format!("{}{}{values}", at.unwrap_or_default(), event.as_ref().map(text).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_a_line() {
        let forked =
            r#"{"at":3723.5,"children":["a-1","a-2"],"event":"vm.forked","id":"x-1","parent":"a","pause_us":7.5}"#;
        assert_eq!(describe(forked), "01:02:03 vm.forked children=a-1,a-2 parent=a pause_us=7.5");
        assert_eq!(describe(r#"{"event":"lost","count":null}"#), "lost");
    }
}
