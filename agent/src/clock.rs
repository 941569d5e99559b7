//! Times as in RFC 3339, and the clock.

use rustix::time::{ClockId, Timespec, clock_settime};

const DAY: i64 = 86_400;
pub(crate) const SECOND_NS: i128 = 1_000_000_000;

/// A time in UTC, with no fraction or three, six or nine digits, as needed.
pub(crate) fn rfc3339(seconds: i64, nanos: u32) -> String {
    let (days, second) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
    let (year, month, day) = civil(days);
    let fraction = match nanos {
        0 => String::new(),
        _ if nanos.is_multiple_of(1_000_000) => format!(".{:03}", nanos / 1_000_000),
        _ if nanos.is_multiple_of(1000) => format!(".{:06}", nanos / 1000),
        _ => format!(".{nanos:09}"),
    };
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

/// Nanoseconds since 1970.
pub(crate) fn parse_rfc3339(text: &str) -> Option<i128> {
    if !text.is_ascii() || text.len() < 20 {
        return None;
    }
    let number = |from: usize, to: usize| -> Option<i64> {
        let digits = &text[from..to];
        digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
    };
    let bytes = text.as_bytes();
    let separators = [(4, b"-"), (7, b"-"), (13, b":"), (16, b":")];
    if separators.iter().any(|(at, wanted)| bytes[*at] != wanted[0]) || !b"Tt ".contains(&bytes[10]) {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let mut rest = &text[19..];
    let mut nanos = 0i64;
    if let Some(fraction) = rest.strip_prefix('.') {
        let digits = fraction.find(|letter: char| !letter.is_ascii_digit())?;
        let kept = &fraction[..digits.min(9)];
        nanos = format!("{kept:0<9}").parse().ok().filter(|_| digits > 0)?;
        rest = &fraction[digits..];
    }
    let offset = match (rest.as_bytes(), rest.len()) {
        ([b'Z' | b'z'], 1) => 0,
        ([sign @ (b'+' | b'-'), _, _, b':', ..], 6) => {
            let at = text.len() - 5;
            let minutes = number(at, at + 2)? * 60 + number(at + 3, at + 5)?;
            if *sign == b'+' { minutes } else { -minutes }
        }
        _ => return None,
    };
    let seconds = days(year, month, day) * DAY + hour * 3600 + minute * 60 + second - offset * 60;
    Some(i128::from(seconds) * SECOND_NS + i128::from(nanos))
}

/// Year, month and day of a day since 1970, in the proleptic Gregorian calendar.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// The present time in nanoseconds since 1970.
pub(crate) fn now_ns() -> i128 {
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    i128::from(now.tv_sec) * SECOND_NS + i128::from(now.tv_nsec)
}

/// Sets the clock. Only root may.
pub(crate) fn set(nanos: i128) -> rustix::io::Result<()> {
    let seconds = i64::try_from(nanos.div_euclid(SECOND_NS)).map_err(|_| rustix::io::Errno::INVAL)?;
    // The fraction, from the remainder.
    let rest = nanos.rem_euclid(SECOND_NS) as i64;
    clock_settime(ClockId::Realtime, Timespec { tv_sec: seconds, tv_nsec: rest })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_time_is_read_as_it_was_written(seconds in -62_135_596_800i64..253_402_300_799, nanos in 0u32..1_000_000_000) {
            let text = rfc3339(seconds, nanos);
            prop_assert_eq!(parse_rfc3339(&text), Some(i128::from(seconds) * SECOND_NS + i128::from(nanos)));
        }

        #[test]
        fn any_text_is_a_time_or_none(text in "[0-9TZ:.+é-]{0,40}") {
            let _ = parse_rfc3339(&text);
        }
    }

    #[test]
    fn known_times() {
        assert_eq!(rfc3339(0, 0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_400, 5_000_000), "2000-02-29T00:00:00.005Z");
        assert_eq!(parse_rfc3339("2026-01-02T03:04:05.5+01:00"), Some(1_767_319_445_500_000_000));
        for wrong in ["", "2026-01-02", "2026-13-02T03:04:05Z", "2026-01-02T03:04:05", "2026-01-02T03:04:05.Z"] {
            assert_eq!(parse_rfc3339(wrong), None, "{wrong}");
        }
    }
}
