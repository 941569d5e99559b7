//! The JSON mapping of protobuf, where it is not serde's.

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

const ENGINE: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// Reads a message. An empty text is the empty message. A field that is null has its default.
///
/// # Errors
/// When the text is invalid JSON, or a field has a value outside its type.
pub fn decode<T: DeserializeOwned>(text: &[u8]) -> Result<T, serde_json::Error> {
    if text.iter().all(u8::is_ascii_whitespace) {
        return T::deserialize(Value::Object(serde_json::Map::new()));
    }
    let mut value: Value = serde_json::from_slice(text)?;
    if !value.is_object() {
        return Err(serde_json::Error::custom("a message is an object"));
    }
    drop_nulls(&mut value);
    T::deserialize(value)
}

/// Reads a list, which protobuf does not count as a message.
///
/// # Errors
/// When the text is not a list.
pub fn decode_list<T: DeserializeOwned>(text: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(text)
}

/// Serde_json's limit on nesting bounds the recursion.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// Writes a message.
#[must_use]
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Messages have strings as keys, and no maps that could fail.
    serde_json::to_vec(message).unwrap_or_else(|_| b"{}".to_vec())
}

/// Bytes, as base64. Both alphabets are accepted, with or without padding.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Base64(pub Vec<u8>);

impl Serialize for Base64 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&ENGINE.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut text = String::deserialize(deserializer)?.into_bytes();
        for byte in &mut text {
            match byte {
                b'-' => *byte = b'+',
                b'_' => *byte = b'/',
                _ => {}
            }
        }
        ENGINE.decode(&text).map(Self).map_err(D::Error::custom)
    }
}

/// An integer, written as a number and read as a number or a string.
pub(crate) mod number {
    use super::{Deserialize, Deserializer, Value};
    use serde::de::Error;

    pub(crate) fn integer<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let read = match &value {
            // Integers may be written as 1.0 and 1e3.
            Value::Number(number) => number.as_i64().or_else(|| {
                number.as_f64().filter(|real| real.fract() == 0.0 && real.abs() < 9e15).map(|real| real as i64)
            }),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        read.ok_or_else(|| D::Error::custom(format_args!("{value} is no integer")))
    }

    pub(crate) fn deserialize<'de, D, N>(deserializer: D) -> Result<N, D::Error>
    where
        D: Deserializer<'de>,
        N: TryFrom<i64>,
    {
        let value = integer(deserializer)?;
        N::try_from(value).map_err(|_| D::Error::custom(format_args!("{value} is out of range")))
    }

    pub(crate) fn optional<'de, D, N>(deserializer: D) -> Result<Option<N>, D::Error>
    where
        D: Deserializer<'de>,
        N: TryFrom<i64>,
    {
        deserialize(deserializer).map(Some)
    }
}

/// A 64-bit integer, written as a string.
pub(crate) mod long {
    use serde::Serializer;

    pub(crate) use super::number::deserialize;

    pub(crate) fn serialize<S: Serializer>(value: &i64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }
}

pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{SendInputRequest, StartRequest};

    #[test]
    fn nulls_unknown_fields_and_empty_texts_are_defaults() {
        let text = br#"{"process":{"cmd":"ls","args":null,"cwd":null,"new":[1]},"stdin":null,"later":{"a":null}}"#;
        let request: StartRequest = decode(text).unwrap();
        assert_eq!(request.process.cmd, "ls");
        assert_eq!((request.process.cwd, request.stdin), (None, None));
        assert_eq!(decode::<StartRequest>(b" \n").unwrap(), StartRequest::default());
        for wrong in ["[]", "3", "{", "{\"process\":3}", "{\"stdin\":1}"] {
            decode::<StartRequest>(wrong.as_bytes()).unwrap_err();
        }
    }

    #[test]
    fn bytes_are_read_in_both_alphabets() {
        for text in ["-_8=", "+/8=", "+/8", "-_8"] {
            let json = format!(r#"{{"process":{{"pid":"7"}},"input":{{"stdin":"{text}"}}}}"#);
            let request: SendInputRequest = decode(json.as_bytes()).unwrap();
            assert_eq!(request.input.stdin.unwrap().0, [0xfb, 0xff]);
            assert_eq!(request.process.pid, Some(7));
        }
        decode::<SendInputRequest>(br#"{"input":{"stdin":"?"}}"#).unwrap_err();
    }

    #[test]
    fn numbers_may_be_texts_and_are_in_range() {
        let pid = |text: &str| {
            decode::<SendInputRequest>(format!(r#"{{"process":{{"pid":{text}}}}}"#).as_bytes()).map(|it| it.process.pid)
        };
        assert_eq!(pid("5").unwrap(), Some(5));
        assert_eq!(pid("5.0").unwrap(), Some(5));
        for wrong in ["-1", "4294967296", "1.5", "true", "\"x\"", "1e300"] {
            pid(wrong).unwrap_err();
        }
    }
}
