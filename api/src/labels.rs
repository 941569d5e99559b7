//! Labels of VMs: words by which their owners tell them apart. Children inherit their parent's
//! unless they are given others.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Most labels of a VM.
const MAX_LABELS: usize = 32;
/// Most bytes of a key or a value.
const MAX_BYTES: usize = 63;

/// Reason why a label is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LabelError {
    /// There is no `=`.
    #[error("{text:?} is not a label such as tier=web")]
    NoPair {
        /// The text given.
        text: String,
    },
    /// The key has characters that a key cannot have, or is too long.
    #[error(
        "{key:?} is not a key of a label: 1 to {MAX_BYTES} letters, digits, '-', '_', '.' or '/', starting with a \
         letter or digit"
    )]
    Key {
        /// The key given.
        key: String,
    },
    /// The value has characters that cannot be printed, or is too long.
    #[error("{value:?} is not a value of a label: up to {MAX_BYTES} printable characters of ASCII")]
    Value {
        /// The value given.
        value: String,
    },
    /// There are too many labels.
    #[error("{count} labels: a VM has {MAX_LABELS} at most")]
    Count {
        /// Their number.
        count: usize,
    },
}

/// One label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    key: String,
    value: String,
}

impl FromStr for Label {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        let (key, value) = text.split_once('=').ok_or_else(|| LabelError::NoPair { text: text.to_owned() })?;
        let label = Self { key: key.to_owned(), value: value.to_owned() };
        check(key, value).map(|()| label)
    }
}

fn check(key: &str, value: &str) -> Result<(), LabelError> {
    let first = key.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if !first || key.len() > MAX_BYTES || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b)) {
        return Err(LabelError::Key { key: key.to_owned() });
    }
    if value.len() > MAX_BYTES || !value.bytes().all(|b| b == b' ' || b.is_ascii_graphic()) {
        return Err(LabelError::Value { value: value.to_owned() });
    }
    Ok(())
}

/// The labels of a VM, by key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>")]
pub struct Labels(BTreeMap<String, String>);

impl TryFrom<BTreeMap<String, String>> for Labels {
    type Error = LabelError;

    fn try_from(labels: BTreeMap<String, String>) -> Result<Self, LabelError> {
        if labels.len() > MAX_LABELS {
            return Err(LabelError::Count { count: labels.len() });
        }
        labels.iter().try_for_each(|(key, value)| check(key, value))?;
        Ok(Self(labels))
    }
}

impl Labels {
    /// Collects labels. The last one of a key counts.
    ///
    /// # Errors
    /// When there are too many.
    pub fn of(labels: &[Label]) -> Result<Self, LabelError> {
        labels.iter().map(|label| (label.key.clone(), label.value.clone())).collect::<BTreeMap<_, _>>().try_into()
    }

    /// Whether there are no labels.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `label` is among them.
    #[must_use]
    pub fn has(&self, label: &Label) -> bool {
        self.0.get(&label.key) == Some(&label.value)
    }

    /// Whether a label of this key is among them.
    #[must_use]
    pub fn has_key(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// Formats the labels as `key=value`, with commas between.
    #[must_use]
    pub fn text(&self) -> String {
        self.0.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_a_key_and_a_value_within_bounds() {
        let long = "x".repeat(64);
        for good in ["tier=web", "a/b.c-d_e=", "k=a=b, c", "1=2"] {
            assert!(good.parse::<Label>().is_ok(), "{good}");
        }
        for (bad, named) in [
            ("tier", "\"tier\"".to_owned()),
            ("=web", "\"\"".to_owned()),
            ("-a=b", "\"-a\"".to_owned()),
            ("a b=c", "\"a b\"".to_owned()),
            ("a=\u{7}", "\"\\u{7}\"".to_owned()),
            (&format!("{long}=v"), format!("{long:?}")),
            (&format!("k={long}"), format!("{long:?}")),
        ] {
            let error = bad.parse::<Label>().unwrap_err().to_string();
            assert!(error.contains(&named), "{bad}: {error}");
        }
    }

    #[test]
    fn the_last_of_a_key_counts_and_json_is_checked() {
        let label = |text: &str| text.parse::<Label>().unwrap();
        let labels = Labels::of(&[label("b=1"), label("a=x"), label("b=2")]).unwrap();
        assert_eq!(labels.text(), "a=x,b=2");
        assert!(labels.has(&label("b=2")) && !labels.has(&label("b=1")));
        let json = serde_json::to_string(&labels).unwrap();
        assert_eq!((json.as_str(), serde_json::from_str::<Labels>(&json).unwrap()), (r#"{"a":"x","b":"2"}"#, labels));
        let refused = serde_json::from_str::<Labels>(r#"{"a b": "x"}"#).unwrap_err();
        assert!(refused.to_string().contains("\"a b\""), "{refused}");
        let many: Vec<Label> = (0..33).map(|n| label(&format!("k{n}=v"))).collect();
        assert_eq!(Labels::of(&many), Err(LabelError::Count { count: 33 }));
    }
}
