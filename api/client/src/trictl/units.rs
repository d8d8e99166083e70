//! Figures as people read them.

use std::time::Duration;

const BINARY: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
const DECIMAL: [&str; 5] = ["k", "M", "G", "T", "P"];

/// Text from elsewhere, harmless on a terminal: what would move the cursor is a question mark.
pub(crate) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Bytes: `512 MiB`, `1.5 GiB`. Whole units have no fraction.
pub(crate) fn bytes(count: u64) -> String {
    if count < 1024 {
        return format!("{count} B");
    }
    let mut unit = 0;
    let mut scale = 1024u64;
    while count / scale >= 1024 && unit + 1 < BINARY.len() {
        scale *= 1024;
        unit += 1;
    }
    let name = BINARY[unit];
    if count.is_multiple_of(scale) {
        return format!("{} {name}", count / scale);
    }
    // Tenths, cut: never more than there is.
    let tenths = u128::from(count) * 10 / u128::from(scale);
    format!("{}.{} {name}", tenths / 10, tenths % 10)
}

/// Bytes of a rate, in five digits at most: `0`, `812 B`, `3.1 MiB`.
pub(crate) fn byte_rate(rate: f64) -> String {
    if !rate.is_finite() || rate < 0.5 {
        return "0".to_owned();
    }
    let (mut rate, mut unit) = (rate, "B");
    for next in BINARY {
        if rate < 999.5 {
            break;
        }
        (rate, unit) = (rate / 1024.0, next);
    }
    format!("{} {unit}", digits(rate, unit == "B"))
}

/// Something that happens so often: `0`, `12`, `3.4k`.
pub(crate) fn rate(rate: f64) -> String {
    scaled(rate, "")
}

/// Bits a second: `12 bit`, `3.4 Mbit`.
pub(crate) fn bit_rate(rate: f64) -> String {
    if !rate.is_finite() || rate < 0.5 {
        return "0".to_owned();
    }
    format!("{}bit", scaled(rate, " "))
}

fn scaled(rate: f64, space: &str) -> String {
    if !rate.is_finite() || rate <= 0.0 {
        return "0".to_owned();
    }
    let (mut rate, mut unit) = (rate, "");
    for next in DECIMAL {
        if rate < 999.5 {
            break;
        }
        (rate, unit) = (rate / 1000.0, next);
    }
    format!("{}{space}{unit}", digits(rate, unit.is_empty() && rate >= 9.5))
}

/// Three digits, of a small number one behind the point.
fn digits(value: f64, whole: bool) -> String {
    if whole || value >= 99.95 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

/// A duration in seconds as a person says it: `61 µs`, `1.2 ms`, `3.0 s`.
pub(crate) fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".to_owned();
    }
    let micros = seconds * 1e6;
    if micros < 999.5 {
        format!("{micros:.0} µs")
    } else if micros < 999_500.0 {
        format!("{} ms", digits(micros / 1e3, false))
    } else if seconds < 99.95 {
        format!("{seconds:.1} s")
    } else {
        whole_seconds(Duration::from_secs_f64(seconds.min(1e15)))
    }
}

fn whole_seconds(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours}:{minutes:02}:{:02}", seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_in_the_largest_unit_and_never_too_many() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (512 << 20, "512 MiB"),
            ((1 << 30) - 1, "1023.9 MiB"),
            (3 << 40, "3 TiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn rates_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (0.5, "0.5"),
            (9.46, "9.5"),
            (12.3, "12"),
            (999.4, "999"),
            (999.6, "1.0k"),
            (34_512.0, "34.5k"),
            (345_120.0, "345k"),
            (2e6, "2.0M"),
            (f64::NAN, "0"),
            (-1.0, "0"),
        ] {
            assert_eq!(rate(value), text, "{value}");
        }
        assert_eq!(byte_rate(3.1 * 1048576.0), "3.1 MiB");
        assert_eq!(byte_rate(812.0), "812 B");
        assert_eq!(byte_rate(1000.0), "1.0 KiB");
        assert_eq!(bit_rate(9.4e8), "940 Mbit");
        assert_eq!(bit_rate(12.0), "12 bit");
        assert!(byte_rate(1e30).len() > 5, "absurd, but no panic");
    }

    #[test]
    fn durations_are_in_the_unit_people_use() {
        for (seconds, text) in [
            (0.0, "0 µs"),
            (0.000_061, "61 µs"),
            (0.001_24, "1.2 ms"),
            (0.25, "250 ms"),
            (0.9997, "1.0 s"),
            (99.0, "99.0 s"),
            (3725.0, "1:02:05"),
            (f64::INFINITY, "-"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn text_cannot_move_the_cursor() {
        assert_eq!(clean("a\u{1b}[2Jb\r\nc\u{9b}d ü"), "a?[2Jb??c?d ü");
    }
}
