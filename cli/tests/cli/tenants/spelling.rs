//! Spellings of a name: escapes, dots, blanks, and other characters around it.

/// Number of spellings. The first few are the name itself to a server that decodes a path once.
pub(super) const SPELLINGS: u64 = 34;
/// Bytes of a long name: more than a head may have.
const LONG: usize = 70_000;

fn escaped(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}

fn value(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}

/// Decodes escapes once.
pub(super) fn decoded(text: &[u8]) -> Vec<u8> {
    let (mut plain, mut rest) = (Vec::new(), text);
    while let Some((&first, tail)) = rest.split_first() {
        let escape = match tail {
            [high, low, ..] if first == b'%' => value(*high).zip(value(*low)),
            _ => None,
        };
        plain.push(escape.map_or(first, |(high, low)| high << 4 | low));
        rest = if escape.is_some() { &tail[2..] } else { tail };
    }
    plain
}

/// Returns a spelling of a name as a part of a path, and whether HTTP does not allow it. Names of one
/// form have spellings of one form.
pub(super) fn spelled(name: &str, number: u64) -> (String, bool) {
    let (first, rest) = name.split_at(1);
    let text = match number {
        0 => name.to_owned(),
        1 => format!("{}{rest}", escaped(first)),
        2 => escaped(name),
        3 => format!("{name}?x=1"),
        4 => format!("{name}#x"),
        5 => format!("%25{:02x}{rest}", name.as_bytes()[0]),
        6 => escaped(name).replace('%', "%25"),
        7 => format!("{name}/"),
        8 => format!("{name}%2f"),
        9 => format!("../sandboxes/{name}"),
        10 => format!("..%2fsandboxes%2f{name}"),
        11 => format!("%2e%2e%2f%2e%2e%2fv1%2fvms%2f{name}"),
        12 => format!("./{name}"),
        13 => format!("/{name}"),
        14 => format!("{name};x=1"),
        15 => format!("{name}%00"),
        16 => format!("{name}\0"),
        17 => name.to_ascii_uppercase(),
        18 => format!("{name}."),
        19 => format!("{name}%2e%2e"),
        20 => format!("{name}{}", "a".repeat(4_000)),
        21 => format!("{name}{}", "a".repeat(LONG)),
        22 => format!("{name}\u{e9}"),
        23 => format!("{name}%ff"),
        24 => format!("%ef%bd%89{rest}"),
        25 => format!("{name}%0d%0ax-api-key:%20x"),
        26 => format!("%20{name}"),
        27 => format!("{name}+"),
        28 => format!("{name}%09"),
        29 => format!("{name}:default"),
        30 => format!("%7b{name}%7d"),
        31 => format!("{name}%3ftimeout=1"),
        32 => name[..name.len() / 2].to_owned(),
        _ => format!("{name},{name}"),
    };
    let is_broken = matches!(number, 16 | 21 | 22);
    (text, is_broken)
}

/// Returns the forms in which an answer may repeat a spelling of a name, the longest first.
pub(super) fn repeated(name: &str, number: u64) -> Vec<Vec<u8>> {
    let raw = spelled(name, number).0.into_bytes();
    let (once, twice) = (decoded(&raw), decoded(&decoded(&raw)));
    // The text behind a name's first letter, for spellings that replace the letter.
    let digits = name.as_bytes()[1..].to_vec();
    let half = name.as_bytes()[..name.len() / 2].to_vec();
    let mut forms =
        vec![raw, once, twice, name.as_bytes().to_vec(), name.to_ascii_uppercase().into_bytes(), digits, half];
    forms.sort_by_key(|form| std::cmp::Reverse(form.len()));
    forms.dedup();
    forms
}

/// Replaces each of the forms.
pub(super) fn without(text: &[u8], forms: &[Vec<u8>]) -> Vec<u8> {
    let (mut plain, mut at) = (Vec::new(), 0);
    while at < text.len() {
        match forms.iter().find(|form| !form.is_empty() && text[at..].starts_with(form)) {
            Some(form) => {
                plain.push(b'#');
                at += form.len();
            }
            None => {
                plain.push(text[at]);
                at += 1;
            }
        }
    }
    plain
}

#[test]
fn spellings_of_two_names_differ_by_the_names_alone() {
    let (one, other) = ("i0123456789abcdef01", "ifedcba987654321010");
    for number in 0..SPELLINGS {
        let (a, b) = (spelled(one, number), spelled(other, number));
        assert_eq!((a.0.len(), a.1), (b.0.len(), b.1), "{number}");
        for text in [a.0.as_bytes(), &decoded(a.0.as_bytes()), &decoded(&decoded(a.0.as_bytes()))] {
            let twin = match text {
                text if text == a.0.as_bytes() => b.0.as_bytes().to_vec(),
                text if text == decoded(a.0.as_bytes()) => decoded(b.0.as_bytes()),
                _ => decoded(&decoded(b.0.as_bytes())),
            };
            assert_eq!(without(text, &repeated(one, number)), without(&twin, &repeated(other, number)), "{number}");
        }
    }
    assert_eq!(decoded(b"%69%2569%4"), b"i%69%4");
}
