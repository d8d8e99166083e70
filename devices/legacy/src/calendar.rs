//! The civil calendar (UTC, no leap seconds), for the RTC.

/// A date and time of day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Civil {
    pub(crate) year: i64,
    /// 1 to 12.
    pub(crate) month: u8,
    /// 1 to 31.
    pub(crate) day: u8,
    pub(crate) hour: u8,
    pub(crate) minute: u8,
    pub(crate) second: u8,
}

const DAY: i64 = 86_400;
/// Days in 400 years: the calendar repeats after them.
const ERA: i64 = 146_097;
/// Days from 0000-03-01, where the counting here starts so that leap days come last in a year, to 1970-01-01.
const EPOCH: i64 = 719_468;

impl Civil {
    /// The moment `seconds` after 1970-01-01 00:00.
    pub(crate) fn from_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(DAY) + EPOCH;
        let (era, day) = (days.div_euclid(ERA), days.rem_euclid(ERA));
        // Each of these last days is one more than its cycle is long: 4, 100 and 400 years.
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        // Months from March on follow a pattern of 153 days in five months.
        let month = (5 * day + 2) / 153;
        let time = seconds.rem_euclid(DAY);
        Self {
            year: era * 400 + year + i64::from(month >= 10),
            month: if month < 10 { month + 3 } else { month - 9 } as u8,
            day: (day - (153 * month + 2) / 5 + 1) as u8,
            hour: (time / 3600) as u8,
            minute: (time / 60 % 60) as u8,
            second: (time % 60) as u8,
        }
    }

    /// Seconds since 1970-01-01 00:00. Fields out of range carry over; no combination of them is an error.
    pub(crate) fn to_unix(self) -> i64 {
        let months = self.year * 12 + i64::from(self.month) - 3;
        let (year, month) = (months.div_euclid(12), months.rem_euclid(12));
        let days = 365 * year + year.div_euclid(4) - year.div_euclid(100)
            + year.div_euclid(400)
            + (153 * month + 2) / 5
            + i64::from(self.day)
            - 1
            - EPOCH;
        days * DAY + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }

    /// 1 for Sunday to 7 for Saturday, as the RTC counts.
    pub(crate) fn weekday(self) -> u8 {
        // 1970-01-01 was a Thursday.
        ((self.to_unix().div_euclid(DAY) + 4).rem_euclid(7) + 1) as u8
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn date(seconds: i64) -> (i64, u8, u8, u8) {
        let c = Civil::from_unix(seconds);
        (c.year, c.month, c.day, c.weekday())
    }

    #[test]
    fn known_days() {
        assert_eq!(date(0), (1970, 1, 1, 5));
        assert_eq!(date(951_782_400), (2000, 2, 29, 3));
        assert_eq!(date(951_868_800), (2000, 3, 1, 4));
        assert_eq!(date(4_107_542_399), (2100, 2, 28, 1));
        assert_eq!(date(4_107_542_400), (2100, 3, 1, 2));
        assert_eq!(date(-1), (1969, 12, 31, 4));
        assert_eq!(date(1_735_689_599), (2024, 12, 31, 3));
        let c = Civil::from_unix(1_700_000_000);
        assert_eq!((c.hour, c.minute, c.second), (22, 13, 20));
    }

    proptest! {
        #[test]
        fn back_and_forth(seconds in -100_000_000_000i64..1_000_000_000_000) {
            let civil = Civil::from_unix(seconds);
            prop_assert!((1..=12).contains(&civil.month) && (1..=31).contains(&civil.day));
            prop_assert_eq!(civil.to_unix(), seconds);
        }
    }
}
