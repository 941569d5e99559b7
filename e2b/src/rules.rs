//! What a call may ask for: times, templates, and rules for a network.

use clade_devices::virtio::net::Link;
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use crate::error::{Answer, ApiError};
use crate::wire::NewSandbox;

/// The longest time, in seconds: a day.
const MAX_TIMEOUT: i64 = 86_400;

/// `seconds` later than `start`.
pub(crate) fn after(start: Timestamp, seconds: i64) -> Answer<Timestamp> {
    start.checked_add(SignedDuration::from_secs(seconds)).map_err(|error| ApiError::bad(error.to_string()))
}

/// A time to live: what is given, or `otherwise`.
pub(crate) fn seconds(given: Option<i64>, otherwise: i64) -> Answer<i64> {
    match given.unwrap_or(otherwise) {
        seconds @ 1..=MAX_TIMEOUT => Ok(seconds),
        seconds => Err(ApiError::bad(format!("timeout={seconds}: 1 to {MAX_TIMEOUT} seconds"))),
    }
}

/// The checkpoint of a template. The tag that E2B adds to its own says nothing here.
pub(crate) fn checkpoint_name(template: &str) -> &str {
    template.strip_suffix(":default").unwrap_or(template)
}

fn is_set(value: Option<&Value>) -> bool {
    value.is_some_and(|value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Object(fields) => fields.values().any(|field| is_set(Some(field))),
        Value::Array(items) => !items.is_empty(),
        _ => true,
    })
}

impl NewSandbox {
    /// Refuses what would be promised and not kept.
    pub(crate) fn check(&self) -> Answer<()> {
        let refused = [
            ("mcp", is_set(self.mcp.as_ref())),
            ("iam", is_set(self.iam.as_ref())),
            ("volumeMounts", is_set(self.volume_mounts.as_ref())),
            ("autoPauseMemory=false", self.auto_pause_memory == Some(false)),
        ];
        match refused.iter().find(|(_, is_given)| *is_given) {
            Some((field, _)) => Err(ApiError::bad(format!("{field} is not there on this host"))),
            None if self.template.contains('/') => Err(ApiError::no_template(&self.template)),
            None => Ok(()),
        }
    }
}

/// What of the rules for a network there is here: all may pass, or nothing. Without a rule it stays as it is.
pub(crate) fn link(allowed: Option<bool>, network: Option<&Value>) -> Answer<Option<Link>> {
    let mut is_denied = allowed == Some(false);
    for (field, value) in
        network.and_then(Value::as_object).into_iter().flatten().filter(|(_, value)| is_set(Some(value)))
    {
        match (field.as_str(), value.as_array().map(Vec::as_slice)) {
            ("denyOut", Some([all])) if all == "0.0.0.0/0" => is_denied = true,
            ("allow_internet_access", None) => {}
            _ => {
                return Err(ApiError::bad(format!(
                    "network: {field}={value} is not there: all may pass here, or nothing"
                )));
            }
        }
    }
    let allowed = allowed.or_else(|| network?.get("allow_internet_access")?.as_bool());
    Ok(match (is_denied, allowed) {
        (true, _) | (_, Some(false)) => Some(Link::Closed),
        (_, Some(true)) => Some(Link::Open),
        (_, None) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_templates_are_checked() {
        assert_eq!(seconds(None, 15), Ok(15));
        assert_eq!(seconds(Some(MAX_TIMEOUT), 15), Ok(MAX_TIMEOUT));
        for wrong in [0, -1, MAX_TIMEOUT + 1, i64::MAX, i64::MIN] {
            let error = seconds(Some(wrong), 15).unwrap_err();
            assert!(error.message.contains(&wrong.to_string()), "{error:?}");
        }
        assert_eq!((checkpoint_name("base:default"), checkpoint_name("base:v2")), ("base", "base:v2"));
    }

    #[test]
    fn what_is_not_there_is_refused_by_its_name() {
        let new = |text: &str| {
            let new: NewSandbox = serde_json::from_str(text).unwrap();
            new.check().and_then(|()| link(new.allow_internet_access, new.network.as_ref()))
        };
        for (text, network) in [
            (r#"{"templateID": "base", "network": {}, "iam": null, "mcp": false, "more": 1}"#, None),
            (r#"{"templateID": "base", "network": {"denyOut": [], "allowPublicTraffic": null}}"#, None),
            (r#"{"templateID": "base", "network": {"denyOut": ["0.0.0.0/0"]}}"#, Some(Link::Closed)),
            (r#"{"templateID": "base", "allow_internet_access": false}"#, Some(Link::Closed)),
            (r#"{"templateID": "base", "allow_internet_access": true}"#, Some(Link::Open)),
        ] {
            assert_eq!(new(text), Ok(network), "{text}");
        }
        for (text, field) in [
            (r#"{"templateID": "base", "network": {"denyOut": ["10.0.0.0/8"]}}"#, "denyOut"),
            (r#"{"templateID": "base", "network": {"denyOut": ["0.0.0.0/0"], "allowOut": ["1.1.1.1"]}}"#, "allowOut"),
            (r#"{"templateID": "base", "volumeMounts": [{"name": "a", "path": "/a"}]}"#, "volumeMounts"),
            (r#"{"templateID": "base", "autoPauseMemory": false}"#, "autoPauseMemory"),
            (r#"{"templateID": "team/base"}"#, "team/base"),
        ] {
            let error = new(text).unwrap_err();
            assert!(error.message.contains(field), "{error:?}");
        }
        let rules = |text: &str| link(None, Some(&serde_json::from_str(text).unwrap()));
        assert_eq!(rules(r#"{"allow_internet_access": false}"#), Ok(Some(Link::Closed)));
        assert_eq!(rules(r#"{"allow_internet_access": true, "denyOut": []}"#), Ok(Some(Link::Open)));
        assert_eq!(rules("{}"), Ok(None));
    }
}
