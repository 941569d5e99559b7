//! An egress rule: its text's form as a pattern.

use std::borrow::Cow;

use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

use super::EgressRule;

const DESCRIPTION: &str = "An egress rule. No bit of the address is set behind its prefix, and the first port of a \
                           range is no larger than the last.";

/// Returns a pattern for all texts with a rule's form. The description has the conditions beyond a
/// pattern.
fn pattern() -> String {
    // Numbers may begin with zeros, except those within an address.
    let octet = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])";
    let v4 = format!("{octet}(\\.{octet}){{3}}");
    let word = "[0-9A-Fa-f]{1,4}";
    // Up to `words` of them; an IPv4 address may be the last two.
    let tail = |words: usize| match words {
        0 => String::new(),
        1 => format!("({word})?"),
        _ => format!("(({word}:){{0,{}}}{word}|({word}:){{0,{}}}{v4})?", words - 1, words - 2),
    };
    let mut v6 = vec![format!("({word}:){{7}}{word}"), format!("({word}:){{6}}{v4}"), format!("::{}", tail(7))];
    // `::` stands for at least one word of zeros.
    v6.extend((1..8).map(|head| format!("{word}(:{word}){{{}}}::{}", head - 1, tail(7 - head))));
    let v4 = format!("{v4}(/0*(3[0-2]|[12]?[0-9]))?");
    let v6 = format!("({})(/0*(12[0-8]|1[01][0-9]|[1-9]?[0-9]))?", v6.join("|"));
    let port = "0*(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5]?[0-9]{1,4})";
    // IPv6 with a port is in brackets. ICMP has no port.
    format!("^(allow|deny):({v6}(/(tcp|udp|icmp))?|({v4}|\\[({v4}|{v6})\\])((:{port}(-{port})?)?(/(tcp|udp))?|/icmp))$")
}

impl PartialSchema for EgressRule {
    fn schema() -> RefOr<Schema> {
        let rule = ObjectBuilder::new().schema_type(Type::String).description(Some(DESCRIPTION));
        let examples = ["allow:10.0.0.0/8:443/tcp", "deny:[2001:db8::/32]:25-26"];
        rule.pattern(Some(pattern())).examples(examples).into()
    }
}

impl ToSchema for EgressRule {
    fn name() -> Cow<'static, str> {
        "EgressRule".into()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use proptest::string::string_regex;
    use regex::Regex;

    use super::*;

    static PATTERN: LazyLock<Regex> = LazyLock::new(|| Regex::new(&pattern()).unwrap());

    /// Returns whether the parser accepts it, and otherwise whether only for a condition beyond a
    /// pattern.
    fn parsed(text: &str) -> (bool, bool) {
        let Err(error) = text.parse::<EgressRule>() else { return (true, false) };
        let error = error.to_string();
        (false, error.contains("no bit of the address") || error.contains("the first and the last of a range"))
    }

    /// An address in each of its notations.
    fn address() -> impl Strategy<Value = (bool, String)> {
        let six = (any::<[u16; 8]>(), any::<u8>(), 0u8..5).prop_map(|(mut words, zeros, kind)| {
            // Words of zeros, for `::`.
            (0..8).filter(|at| zeros >> at & 1 == 1).for_each(|at| words[at] = 0);
            if kind == 1 {
                words[..5].fill(0);
                words[5] = 0xffff;
            }
            let address = Ipv6Addr::from(words);
            match kind {
                2 => words.map(|word| format!("{word:04X}")).join(":"),
                3 => words[..6].iter().map(|word| format!("{word:x}:")).collect::<String>() + "192.0.2.1",
                4 => {
                    words[..usize::from(zeros % 8)].iter().map(|word| format!("{word:x}")).collect::<Vec<_>>().join(":")
                        + "::"
                }
                _ => address.to_string(),
            }
        });
        prop_oneof![
            any::<Ipv4Addr>().prop_map(|address| (false, address.to_string())),
            six.prop_map(|address| (true, address)),
        ]
    }

    fn number(most: u32) -> impl Strategy<Value = String> {
        let near = most.saturating_sub(2)..most + 3;
        (prop_oneof![0..most + 1, near, Just(0)], 0usize..3)
            .prop_map(|(number, zeros)| "0".repeat(zeros) + &number.to_string())
    }

    prop_compose! {
        /// A rule, most often; with parts missing or of another kind, sometimes.
        fn text()(
            verdict in prop_oneof![6 => Just("allow"), 6 => Just("deny"), 1 => Just("Allow"), 1 => Just("")],
            (six, address) in address(),
            prefix in prop::option::of(prop_oneof![number(32), number(128)]),
            ports in prop::option::of((number(65535), prop::option::of(number(65535)))),
            bracketed in any::<bool>(),
            protocol in prop_oneof![4 => Just(""), 2 => Just("/tcp"), 2 => Just("/udp"), 2 => Just("/icmp"), 1 => Just("/sctp")],
            change in prop::option::weighted(0.3, (any::<prop::sample::Index>(), "[0-9a-f:./\\[\\]\\-+ \n]", any::<bool>())),
        ) -> String {
            let _ = six;
            let prefix = prefix.map_or(String::new(), |prefix| format!("/{prefix}"));
            let ports = ports.map_or(String::new(), |(first, last)| {
                format!(":{first}{}", last.map_or(String::new(), |last| format!("-{last}")))
            });
            let cidr = if bracketed { format!("[{address}{prefix}]") } else { format!("{address}{prefix}") };
            let mut text = format!("{verdict}:{cidr}{ports}{protocol}");
            if let Some((at, with, replaces)) = change {
                let at = at.index(text.len());
                text.replace_range(at..at + usize::from(replaces), &with);
            }
            text
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]
        #[test]
        fn the_pattern_takes_what_the_parser_takes(text in text()) {
            let (taken, is_beyond) = parsed(&text);
            let matches = PATTERN.is_match(&text);
            prop_assert!(!taken || matches, "{text:?} is taken, and has not the form");
            prop_assert!(!matches || taken || is_beyond, "{text:?} has the form, and is not taken");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]
        #[test]
        fn what_is_made_of_the_pattern_is_taken(text in string_regex(pattern().trim_matches(['^', '$'])).unwrap()) {
            let (taken, is_beyond) = parsed(&text);
            prop_assert!(taken || is_beyond, "{text:?}");
        }
    }

    #[test]
    fn examples_have_the_form() {
        let schema = serde_json::to_value(EgressRule::schema()).unwrap();
        let pattern = Regex::new(schema["pattern"].as_str().unwrap()).unwrap();
        for example in schema["examples"].as_array().unwrap() {
            let example = example.as_str().unwrap();
            assert!(pattern.is_match(example) && parsed(example).0, "{example}");
        }
        for (text, wanted) in [
            ("allow:::/0/icmp", true),
            ("deny:0.0.0.0/0:0-65535/udp", true),
            ("allow:[10.0.0.0/8]:80", true),
            ("allow:1:2:3:4:5:6:7::", true),
            ("allow:1:2:3:4:5:6:7:8::", false),
            ("allow:10.0.0.1:80/icmp", false),
            ("allow:10.0.0.01", false),
            ("allow:10.0.0.1\n", false),
            ("allow:[::1]:65536", false),
        ] {
            assert_eq!((pattern.is_match(text), parsed(text).0), (wanted, wanted), "{text:?}");
        }
    }
}
