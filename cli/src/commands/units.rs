//! Sizes, durations and ages, parsed and printed the same way everywhere.

use std::time::Duration;

use humantime::DurationError;

/// The longest accepted duration: a century. Clocks can count it.
const MAX_DURATION: Duration = Duration::from_secs(100 * 365 * 86_400);
/// Maximum number of digits in a duration: a century in milliseconds has 13.
const MAX_DIGITS: usize = 15;

/// Parses a size: a number and an optional unit, K, M, G or T, also as KiB or KB. The units are
/// powers of 1024. Returns bytes.
///
/// A fraction is accepted if the result is whole bytes: `0.5G`, `1.5M`.
///
/// # Errors
/// A single line that contains the text.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let no_size = || format!("{text:?} is not a size such as 512M, 512MiB or 0.5G");
    let upper = text.trim().to_ascii_uppercase();
    let digits = upper.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &upper[digits.len()..] {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(no_size()),
    };
    let digits = digits.trim_end();
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let is_number = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !is_number(whole) || !is_number(fraction) || digits.ends_with('.') || fraction.len() > 9 {
        return Err(no_size());
    }
    let too_large = || format!("{text:?} is more than 64 bits of bytes");
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let scale = 10u128.pow(fraction.len() as u32);
    let parts = u128::from(whole) * scale + fraction.parse::<u128>().unwrap_or(0);
    let scaled = parts << shift;
    if !scaled.is_multiple_of(scale) {
        return Err(format!("{text:?} is not a whole number of bytes"));
    }
    u64::try_from(scaled / scale).map_err(|_| too_large())
}

/// Parses a size. Returns MiB.
///
/// # Errors
/// As [`parse_size`], and if the size is not a multiple of 1 MiB.
pub(crate) fn parse_mib(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if !bytes.is_multiple_of(1 << 20) {
        return Err(format!("{text:?} is not a number of whole MiB, such as 64M"));
    }
    Ok(bytes >> 20)
}

/// Parses a duration: whole numbers with a unit each, such as ms, s, m, h, d or w, as in `90s` or
/// `1h30m`. The units are those of [`humantime`], without `M` for a month.
///
/// # Errors
/// A single line that contains the text.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let no_duration = || format!("{text:?} is not a time such as 90s, 5m or 1h30m");
    let too_long = || format!("{text:?} is more than can be counted");
    if !text.bytes().all(|byte| byte.is_ascii_digit() || byte.is_ascii_lowercase()) {
        return Err(no_duration());
    }
    // humantime 2.4 panics when its last carry exceeds 64 bits of seconds, which takes more digits.
    if text.bytes().filter(u8::is_ascii_digit).count() > MAX_DIGITS {
        return Err(too_long());
    }
    match humantime::parse_duration(text) {
        Ok(time) if time.is_zero() => Err(no_duration()),
        Ok(time) if time <= MAX_DURATION => Ok(time),
        Ok(_) | Err(DurationError::NumberOverflow) => Err(too_long()),
        Err(_) => Err(no_duration()),
    }
}

/// Formats bytes with up to three digits: `512M`, `1.5G`, `20K`.
pub(crate) fn show_size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "K", "M", "G", "T"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value < 10.0 && value.fract() > 0.05 {
        format!("{value:.1}{}", UNITS[unit])
    } else {
        format!("{value:.0}{}", UNITS[unit])
    }
}

/// Formats a duration in its two largest units: `7s`, `3m12s`, `5h2m`, `2d3h`.
pub(crate) fn show_age(seconds: f64) -> String {
    let all = seconds.max(0.0) as u64;
    let (minutes, hours, days) = (all / 60, all / 3600, all / 86400);
    match all {
        0..60 => format!("{all}s"),
        60..3600 => format!("{minutes}m{}s", all % 60),
        3600..86400 => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

/// Formats the microseconds of a pause: `0.78 ms`, `12 ms`, `1.3 s`.
pub(crate) fn show_pause(us: f64) -> String {
    match us {
        ..10_000.0 => format!("{:.2} ms", us / 1e3),
        ..1e6 => format!("{:.0} ms", us / 1e3),
        _ => format!("{:.1} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let good = [
            ("4096", 4096),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("512 MB", 512 << 20),
            ("2g", 2 << 30),
            ("0.5G", 512 << 20),
            ("1.5m", 3 << 19),
            ("0.25T", 256 << 30),
            ("7B", 7),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, bytes) in good {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "M", "-1", ".5G", "5.G", "1.2.3M", "0x10", "12Q", "1e3", "+5M", "M5", "1.0000000001G", "٣M"] {
            assert!(parse_size(bad).unwrap_err().contains(&format!("{bad:?}")), "{bad}");
        }
        assert!(parse_size("0.3K").unwrap_err().contains("whole"));
        for large in ["99999999999T", "18446744073709551616", "18446744073709551615K"] {
            assert!(parse_size(large).unwrap_err().contains("64 bits"), "{large}");
        }
        assert_eq!((parse_mib("64M"), parse_mib("1G")), (Ok(64), Ok(1024)));
        assert!(parse_mib("64").unwrap_err().contains("64M"));
    }

    #[test]
    fn durations() {
        let good = [
            ("300ms", 300),
            ("90s", 90_000),
            ("5m", 300_000),
            ("1h30m", 5_400_000),
            ("1d", 86_400_000),
            ("2w", 1_209_600_000),
            ("1hour30min", 5_400_000),
            ("2000us", 2),
        ];
        good.iter().for_each(|(text, ms)| assert_eq!(parse_duration(text), Ok(Duration::from_millis(*ms)), "{text}"));
        for bad in ["", "5", "m", "0s", "-1s", "1.5h", "1 h", "5x", "s5", "1M", "1\u{b5}s", "0", "0ns"] {
            assert!(parse_duration(bad).unwrap_err().contains(&format!("{bad:?}")), "{bad}");
        }
        for long in ["99999999999999999999s", "18446744073709551615d", "40000d", "18446744073709551615s1000ms"] {
            assert!(parse_duration(long).unwrap_err().contains("counted"), "{long}");
        }
    }

    #[test]
    fn what_is_shown() {
        let sizes =
            [(0, "0B"), (999, "999B"), (20 << 10, "20K"), (3 << 19, "1.5M"), (512 << 20, "512M"), (1 << 30, "1G")];
        sizes.iter().for_each(|(bytes, text)| assert_eq!(show_size(*bytes), *text));
        let ages = [(0.4, "0s"), (59.9, "59s"), (192.0, "3m12s"), (18120.0, "5h2m"), (183_600.0, "2d3h")];
        let pauses = [(0.0, "0.00 ms"), (784.0, "0.78 ms"), (8758.0, "8.76 ms"), (12_345.0, "12 ms"), (1.3e6, "1.3 s")];
        pauses.iter().for_each(|(us, text)| assert_eq!(show_pause(*us), *text));
        ages.iter().for_each(|(age, text)| assert_eq!(show_age(*age), *text));
    }
}
