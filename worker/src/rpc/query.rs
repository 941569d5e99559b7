//! The parameters of a request's query.

use std::ops::RangeInclusive;

use clade_api::ProblemKind;
use clade_api::http::ApiError;
use thiserror::Error;

/// Reason why a query is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum QueryError {
    #[error("unknown parameter {key:?}: known are {known}")]
    Unknown { key: String, known: String },
    #[error("{key}={value:?} is not a number")]
    NotANumber { key: &'static str, value: String },
    #[error("{key}={value:?}: {choices}")]
    NotAChoice { key: &'static str, value: String, choices: &'static str },
    #[error("{key}={value}: {first} to {last}")]
    OutOfRange { key: &'static str, value: u64, first: u64, last: u64 },
    #[error("{key} is missing")]
    Missing { key: &'static str },
    #[error("{key}: {reason}")]
    NotHere { key: &'static str, reason: &'static str },
}

impl From<QueryError> for ApiError {
    fn from(error: QueryError) -> Self {
        Self::new(ProblemKind::BadRequest, error.to_string())
    }
}

/// Parses a query of the parameters called `keys`, each value by `parse_value`. Of a parameter that is given twice,
/// both values must be valid, and the last one counts.
pub(super) fn parse<T, const N: usize>(
    text: &str,
    keys: [&'static str; N],
    parse_value: impl Fn(&'static str, &str) -> Result<T, QueryError>,
) -> Result<[Option<T>; N], QueryError> {
    let mut values = [const { None }; N];
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match keys.iter().position(|known| *known == key) {
            Some(at) => values[at] = Some(parse_value(keys[at], value)?),
            None => return Err(QueryError::Unknown { key: key.to_owned(), known: keys.join(", ") }),
        }
    }
    Ok(values)
}

/// The same, of numbers.
pub(super) fn parse_numbers<const N: usize>(
    text: &str,
    keys: [&'static str; N],
) -> Result<[Option<u64>; N], QueryError> {
    parse(text, keys, |key, value| value.parse().map_err(|_| QueryError::NotANumber { key, value: value.to_owned() }))
}

/// Returns `value` if it is in `range`.
pub(super) fn within(key: &'static str, value: u64, range: RangeInclusive<u64>) -> Result<u64, QueryError> {
    let (first, last) = (*range.start(), *range.end());
    if range.contains(&value) { Ok(value) } else { Err(QueryError::OutOfRange { key, value, first, last }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_known_once_and_numbers() {
        let both = |text| parse_numbers(text, ["from", "count"]);
        assert_eq!(both(""), Ok([None, None]));
        assert_eq!(both("&count=18446744073709551615&"), Ok([None, Some(u64::MAX)]));
        assert_eq!(both("from=1&count=2&from=3"), Ok([Some(3), Some(2)]));
        for (text, message) in [
            ("form=1", r#"unknown parameter "form": known are from, count"#),
            ("from=-1", r#"from="-1" is not a number"#),
            ("from=-1&from=1", r#"from="-1" is not a number"#),
            ("count", r#"count="" is not a number"#),
            ("count=18446744073709551616", r#"count="18446744073709551616" is not a number"#),
        ] {
            assert_eq!(both(text).unwrap_err().to_string(), message, "{text}");
        }
        assert_eq!(within("count", 3, 1..=3), Ok(3));
        assert_eq!(within("count", 4, 1..=3).unwrap_err().to_string(), "count=4: 1 to 3");
        let texts = parse("line=a=b&line=c=d", ["line"], |_, value| Ok(value.to_owned()));
        assert_eq!(texts, Ok([Some("c=d".to_owned())]));
    }
}
