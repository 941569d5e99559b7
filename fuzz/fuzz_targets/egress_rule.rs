//! Any text as an egress rule: refused, or a rule whose printed and saved forms are the same rule.
#![no_main]

use clade_devices::virtio::net::EgressRule;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(rule) = text.parse::<EgressRule>() else {
        assert!(serde_json::from_value::<EgressRule>(text.into()).is_err());
        return;
    };
    let shown = rule.to_string();
    assert_eq!(shown.parse().as_ref(), Ok(&rule), "{text:?} is shown as {shown:?}");
    assert_eq!(shown.parse::<EgressRule>().map(|again| again.to_string()).as_ref(), Ok(&shown));
    let saved = serde_json::to_value(&rule).expect("a text");
    assert_eq!(saved.as_str(), Some(shown.as_str()));
    assert_eq!(serde_json::from_value::<EgressRule>(saved).ok(), Some(rule));
    // No part is lost on the way: the verdict and the protocol are those of the text.
    let verdict = |text: &str| text.split(':').next().map(str::to_owned);
    assert_eq!(verdict(text), verdict(&shown));
    for protocol in ["/tcp", "/udp", "/icmp"] {
        assert_eq!(text.ends_with(protocol), shown.ends_with(protocol));
    }
});
