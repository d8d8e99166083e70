//! Prometheus' text format, version 0.0.4 (prometheus.io/docs/instrumenting/exposition_formats). Whatever values of labels are, the
//! text stays well-formed; numbers are written without a detour through floating point.

use std::fmt::{self, Display, Write};

use super::Latencies;

/// Content type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What samples of a family mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
    /// How often values below some bounds were seen.
    Histogram,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// The description of a family of samples.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// Its name.
    pub name: &'static str,
    /// What its samples mean.
    pub kind: Kind,
    /// Names of the labels each sample has.
    pub labels: &'static [&'static str],
    /// One line, without a backslash.
    pub help: &'static str,
}

/// A sample's value.
#[derive(Debug, Clone, Copy)]
pub enum Value {
    /// A number.
    Number(u64),
    /// Nanoseconds, shown as seconds.
    Time(u64),
}

impl Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Number(n) => n.fmt(f),
            Self::Time(nanos) => {
                let (seconds, rest) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
                if rest == 0 {
                    return seconds.fmt(f);
                }
                let digits = format!("{rest:09}");
                write!(f, "{seconds}.{}", digits.trim_end_matches('0'))
            }
        }
    }
}

/// Writes the samples of one family. Its head comes with the first of them.
pub struct Samples<'a> {
    output: &'a mut String,
    family: Family,
    begun: bool,
}

impl<'a> Samples<'a> {
    /// Appends samples of `family` to `output`.
    pub fn new(output: &'a mut String, family: Family) -> Self {
        Self {
            output,
            family,
            begun: false,
        }
    }

    /// Adds a sample of a counter or gauge with these values of the family's labels.
    pub fn add(&mut self, labels: &[&dyn Display], value: Value) {
        self.begin();
        self.line("", labels, None, value);
    }

    /// Adds a histogram, unless nothing was counted.
    pub fn histogram(&mut self, labels: &[&dyn Display], latencies: &Latencies) {
        let count = latencies.count();
        if count == 0 {
            return;
        }
        self.begin();
        let mut below = 0;
        for (bound, bucket) in latencies.bounds.iter().zip(&latencies.buckets) {
            below += bucket;
            let bound = Value::Time(*bound);
            self.line("_bucket", labels, Some(&bound), Value::Number(below));
        }
        self.line("_bucket", labels, Some(&"+Inf"), Value::Number(count));
        self.line("_sum", labels, None, Value::Time(latencies.sum));
        self.line("_count", labels, None, Value::Number(count));
    }

    fn begin(&mut self) {
        if !std::mem::replace(&mut self.begun, true) {
            let Family { name, kind, help, .. } = self.family;
            let kind = kind.name();
            // Writing to a string does not fail, here and below.
            let _ = write!(self.output, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        }
    }

    fn line(&mut self, suffix: &str, labels: &[&dyn Display], bound: Option<&dyn Display>, value: Value) {
        debug_assert_eq!(self.family.labels.len(), labels.len(), "{}", self.family.name);
        self.output.push_str(self.family.name);
        self.output.push_str(suffix);
        let own = self.family.labels.iter().zip(labels);
        let mut opening = '{';
        for (name, value) in own.map(|(n, v)| (*n, *v)).chain(bound.map(|b| ("le", b))) {
            self.output.push(opening);
            opening = ',';
            self.output.push_str(name);
            self.output.push_str("=\"");
            let _ = write!(Escaped(self.output), "{value}");
            self.output.push('"');
        }
        if opening == ',' {
            self.output.push('}');
        }
        let _ = writeln!(self.output, " {value}");
    }
}

/// Writes the value of a label.
struct Escaped<'a>(&'a mut String);

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            match c {
                '\\' => self.0.push_str("\\\\"),
                '"' => self.0.push_str("\\\""),
                '\n' => self.0.push_str("\\n"),
                other => self.0.push(other),
            }
        }
        Ok(())
    }
}
