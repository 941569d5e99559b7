//! Checks of a call's fields: times, templates, and rules for a network.

use std::net::IpAddr;

use clade_api::check_name;
use clade_devices::virtio::net::{EgressError, EgressRule, Link};
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use crate::error::{Answer, GatewayError};
use crate::wire::{AskedNetwork, NewSandbox};

/// The longest time, in seconds: a day.
const MAX_TIMEOUT: i64 = 86_400;
/// All addresses, in E2B's notation. They include those of IPv6.
const ALL: &str = "0.0.0.0/0";

/// Returns the time `seconds` after `start`.
pub(crate) fn after(start: Timestamp, seconds: i64) -> Answer<Timestamp> {
    start.checked_add(SignedDuration::from_secs(seconds)).map_err(|error| GatewayError::bad(error.to_string()))
}

/// Returns a time to live: the given one, or `otherwise`.
pub(crate) fn seconds(given: Option<i64>, otherwise: i64) -> Answer<i64> {
    match given.unwrap_or(otherwise) {
        seconds @ 1..=MAX_TIMEOUT => Ok(seconds),
        seconds => Err(GatewayError::bad(format!("timeout={seconds}: 1 to {MAX_TIMEOUT} seconds"))),
    }
}

/// Returns the checkpoint of a template. E2B adds a tag to its own templates, which has no meaning
/// here.
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
    /// Refuses fields that this host does not support.
    pub(crate) fn check(&self) -> Answer<()> {
        let refused = [
            ("mcp", is_set(self.mcp.as_ref())),
            ("iam", is_set(self.iam.as_ref())),
            ("volumeMounts", is_set(self.volume_mounts.as_ref())),
            ("autoPauseMemory=false", self.auto_pause_memory == Some(false)),
        ];
        match refused.iter().find(|(_, is_given)| *is_given) {
            Some((field, _)) => Err(GatewayError::bad(format!("{field} is not there on this host"))),
            // The name becomes part of a path to the supervisor.
            None => check_name(checkpoint_name(&self.template)).map_err(|_| GatewayError::no_template(&self.template)),
        }
    }
}

/// The requested network of a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Network {
    /// None leaves it unchanged.
    pub(crate) link: Option<Link>,
    /// The requested egress rules.
    pub(crate) egress: Vec<EgressRule>,
    /// Whether its ports require its token.
    pub(crate) is_private: bool,
    pub(crate) masked_host: Option<String>,
    pub(crate) asked: AskedNetwork,
}

/// Returns the entries of a list. Null is an empty list.
fn entries(field: &str, value: &Value) -> Answer<Vec<String>> {
    let texts = serde_json::from_value::<Option<Vec<String>>>(value.clone());
    texts.map(Option::unwrap_or_default).map_err(|_| not_there(field, value))
}

fn not_there(field: &str, value: &Value) -> GatewayError {
    GatewayError::bad(format!("network: {field}={value} is not there on this host"))
}

/// Parses one entry as a rule: an address or a CIDR block, without the other parts of a rule.
fn rule(verdict: &str, entry: &str) -> Answer<EgressRule> {
    let (address, prefix) = entry.split_once('/').unwrap_or((entry, ""));
    let is_block = address.parse::<IpAddr>().is_ok() && prefix.bytes().all(|b| b.is_ascii_digit());
    let refused = |why: &str| GatewayError::bad(format!("network: {entry:?}: {why}"));
    if !is_block {
        return Err(refused("an address or a CIDR block is wanted; names are not known here"));
    }
    format!("{verdict}:{entry}").parse().map_err(|error: EgressError| refused(&error.to_string()))
}

/// Whether an entry is all addresses: also one that spells [`ALL`] otherwise.
fn is_all(entry: &str) -> bool {
    rule("deny", entry).is_ok_and(|rule| String::from(rule) == format!("deny:{ALL}"))
}

/// Returns the rules for an allow list and a deny list: the allow list wins.
fn egress(allowed: &[String], denied: &[String]) -> Answer<Vec<EgressRule>> {
    let mut rules = Vec::new();
    for (verdict, entries) in [("allow", allowed), ("deny", denied)] {
        for entry in entries {
            rules.push(rule(verdict, entry)?);
        }
    }
    // An allow list drops the rest, unless that is allowed too.
    if !allowed.is_empty() && !denied.iter().any(|entry| is_all(entry)) {
        rules.push(rule("allow", ALL)?);
        rules.push(rule("allow", "::/0")?);
    }
    Ok(rules)
}

/// Checks a host for a header, with `${PORT}` once.
fn masked_host(mask: &str) -> Answer<String> {
    let plain = mask.replacen("${PORT}", "1", 1);
    let is_host = !plain.is_empty() && plain.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:".contains(&b));
    let refused = || GatewayError::bad(format!("network: maskRequestHost={mask:?} is no host"));
    (is_host && mask.len() <= 255).then(|| mask.to_owned()).ok_or_else(refused)
}

/// Parses a requested network. Unsupported fields are refused by name.
pub(crate) fn network(allowed: Option<bool>, rules: Option<&Value>) -> Answer<Network> {
    let (mut allowed, mut network) = (allowed, Network::default());
    let (mut allow, mut deny) = (Vec::new(), Vec::new());
    let fields = match rules {
        None => None,
        Some(Value::Object(fields)) => Some(fields),
        Some(other) => return Err(GatewayError::bad(format!("network: {other} is not an object"))),
    };
    for (field, value) in fields.into_iter().flatten() {
        match (field.as_str(), value) {
            // The second as an answer spells it.
            ("allow_internet_access" | "allowInternetAccess", Value::Bool(is_allowed)) => {
                allowed = Some(allowed.unwrap_or(true) && *is_allowed);
            }
            ("allowPublicTraffic", Value::Bool(is_public)) => network.is_private = !is_public,
            ("maskRequestHost", Value::String(mask)) => network.masked_host = Some(masked_host(mask)?),
            ("allowOut", value) => allow = entries(field, value)?,
            ("denyOut", value) => deny = entries(field, value)?,
            // A boolean that is false may forbid something.
            (_, value) if !is_set(Some(value)) && !value.is_boolean() => {}
            (field, value) => return Err(not_there(field, value)),
        }
    }
    let is_allowed = allowed;
    network.asked = AskedNetwork { is_allowed, allow_out: allow.clone(), deny_out: deny.clone() };
    if allowed == Some(false) && !deny.iter().any(|entry| is_all(entry)) {
        deny.push(ALL.to_owned());
    }
    if !allow.is_empty() && deny.is_empty() {
        let why = "network: allowOut without denyOut denies nothing: name in denyOut what is not to pass";
        return Err(GatewayError::bad(why));
    }
    network.link = match allowed {
        _ if allow.is_empty() && deny.iter().any(|entry| is_all(entry)) => Some(Link::Closed),
        Some(true) => Some(Link::Open),
        _ => None,
    };
    if network.link != Some(Link::Closed) {
        network.egress = egress(&allow, &deny)?;
    }
    Ok(network)
}

/// The same for a running sandbox. Absent fields reset their settings.
pub(crate) fn new_network(rules: &Value) -> Answer<Network> {
    let asked = network(None, Some(rules))?;
    if asked.is_private || asked.masked_host.is_some() {
        return Err(GatewayError::bad(format!("network: {rules}: of a sandbox that runs, rules alone can be changed")));
    }
    Ok(Network { link: asked.link.or(Some(Link::Open)), ..asked })
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
            new.check().and_then(|()| network(new.allow_internet_access, new.network.as_ref())).map(|asked| asked.link)
        };
        for (text, link) in [
            (r#"{"templateID": "base", "network": {}, "iam": null, "mcp": false, "more": 1}"#, None),
            (r#"{"templateID": "base", "network": {"denyOut": [], "allowPublicTraffic": null}}"#, None),
            (r#"{"templateID": "base", "network": {"denyOut": ["0.0.0.0/0"]}}"#, Some(Link::Closed)),
            (r#"{"templateID": "base", "network": {"denyOut": ["0.0.0.0/00"]}}"#, Some(Link::Closed)),
            (r#"{"templateID": "base", "network": {"allowInternetAccess": false}}"#, Some(Link::Closed)),
            (r#"{"templateID": "base", "allow_internet_access": false}"#, Some(Link::Closed)),
            (r#"{"templateID": "base", "allow_internet_access": true}"#, Some(Link::Open)),
        ] {
            assert_eq!(new(text), Ok(link), "{text}");
        }
        for (text, field) in [
            (r#"{"templateID": "base", "network": {"denyOut": ["example.com"]}}"#, "example.com"),
            (r#"{"templateID": "base", "network": {"denyOut": "10.0.0.0/8"}}"#, "denyOut"),
            (r#"{"templateID": "base", "network": {"allowOut": ["1.1.1.1"]}}"#, "allowOut"),
            (r#"{"templateID": "base", "network": {"httpsPorts": [443]}}"#, "httpsPorts"),
            (r#"{"templateID": "base", "network": {"allowDns": false}}"#, "allowDns"),
            (r#"{"templateID": "base", "network": ["denyOut"]}"#, "not an object"),
            (r#"{"templateID": "base", "network": {"maskRequestHost": "a\r\nb"}}"#, "maskRequestHost"),
            (r#"{"templateID": "base", "network": {"maskRequestHost": ""}}"#, "maskRequestHost"),
            (r#"{"templateID": "base", "network": {"allowPublicTraffic": "no"}}"#, "allowPublicTraffic"),
            (r#"{"templateID": "base", "volumeMounts": [{"name": "a", "path": "/a"}]}"#, "volumeMounts"),
            (r#"{"templateID": "base", "autoPauseMemory": false}"#, "autoPauseMemory"),
            (r#"{"templateID": "team/base"}"#, "team/base"),
            (r#"{"templateID": "base?x"}"#, "base?x"),
            (r#"{"templateID": "base:default#"}"#, "base:default#"),
            (r#"{"templateID": "a b"}"#, "a b"),
            (r#"{"templateID": ".."}"#, ".."),
            (r#"{"templateID": ""}"#, "\"\""),
        ] {
            let error = new(text).unwrap_err();
            assert!(error.message.contains(field), "{error:?}");
        }
    }

    fn asked(text: &str) -> Answer<Network> {
        network(None, Some(&serde_json::from_str(text).unwrap()))
    }

    #[test]
    fn what_is_allowed_wins_over_what_is_denied() {
        for (text, rules) in [
            (r#"{"denyOut": ["10.0.0.0/8", "1.1.1.1"]}"#, "deny:10.0.0.0/8 deny:1.1.1.1/32"),
            (r#"{"denyOut": ["0.0.0.0/0"], "allowOut": ["1.1.1.1"]}"#, "allow:1.1.1.1/32 deny:0.0.0.0/0"),
            (r#"{"allow_internet_access": false, "allowOut": ["1.1.1.1"]}"#, "allow:1.1.1.1/32 deny:0.0.0.0/0"),
            (
                r#"{"denyOut": ["10.0.0.0/8"], "allowOut": ["10.0.0.1"]}"#,
                "allow:10.0.0.1/32 deny:10.0.0.0/8 allow:0.0.0.0/0 allow:::/0",
            ),
            (r#"{"denyOut": ["fd00::/8"]}"#, "deny:fd00::/8"),
        ] {
            let asked = asked(text).unwrap();
            let shown: Vec<String> = asked.egress.into_iter().map(String::from).collect();
            assert_eq!((shown.join(" ").as_str(), asked.link), (rules, None), "{text}");
        }
        // An entry holds nothing but addresses.
        for wrong in ["1.1.1.1:80", "1.1.1.1/tcp", "1.1.1.1/32/tcp", "10.0.0.1/8", "1.1.1.1/33", "", "*.example.com"] {
            let error = asked(&format!(r#"{{"denyOut": ["{wrong}"]}}"#)).unwrap_err();
            assert!(error.message.contains(&format!("{wrong:?}")), "{error:?}");
        }
    }

    #[test]
    fn ports_are_public_unless_it_is_said() {
        assert_eq!(asked("{}"), Ok(Network::default()));
        assert!(!asked(r#"{"allowPublicTraffic": true}"#).unwrap().is_private);
        let private =
            asked(r#"{"allowPublicTraffic": false, "maskRequestHost": "${PORT}-app.example.com:80"}"#).unwrap();
        assert!(private.is_private && private.link.is_none());
        assert_eq!(private.masked_host.as_deref(), Some("${PORT}-app.example.com:80"));
    }

    #[test]
    fn a_sandbox_that_runs_gets_the_rules_that_are_given_and_no_others() {
        let changed = |text: &str| {
            new_network(&serde_json::from_str(text).unwrap()).map(|asked| {
                let rules: Vec<String> = asked.egress.into_iter().map(String::from).collect();
                (asked.link, rules.join(" "))
            })
        };
        let (open, closed) = (Some(Link::Open), Some(Link::Closed));
        for (text, link, rules) in [
            (r#"{"allow_internet_access": false}"#, closed, ""),
            (r#"{"allow_internet_access": true, "denyOut": []}"#, open, ""),
            ("{}", open, ""),
            (r#"{"denyOut": ["10.0.0.0/8"]}"#, open, "deny:10.0.0.0/8"),
            (r#"{"denyOut": ["0.0.0.0/0"], "allowOut": ["1.1.1.1"]}"#, open, "allow:1.1.1.1/32 deny:0.0.0.0/0"),
        ] {
            assert_eq!(changed(text), Ok((link, rules.to_owned())), "{text}");
        }
        for wrong in ["null", "[]", "5", r#""closed""#] {
            assert!(changed(wrong).unwrap_err().message.contains("not an object"), "{wrong}");
        }
        for wrong in [r#"{"maskRequestHost": "a"}"#, r#"{"allowPublicTraffic": false}"#] {
            assert!(changed(wrong).unwrap_err().message.contains("runs"), "{wrong}");
        }
    }

    #[test]
    fn what_was_asked_is_kept_as_it_was_written() {
        let given = asked(r#"{"denyOut": ["10.0.0.0/8"], "allowOut": ["10.0.0.1"]}"#).unwrap().asked;
        let shown = serde_json::to_value(&given).unwrap();
        assert_eq!(shown, serde_json::json!({"allowOut": ["10.0.0.1"], "denyOut": ["10.0.0.0/8"]}));
        let closed = network(Some(false), None).unwrap().asked;
        assert_eq!(closed, AskedNetwork { is_allowed: Some(false), ..AskedNetwork::default() });
    }
}
