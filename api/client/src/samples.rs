//! Figures out of Prometheus' text format, version 0.0.4 (prometheus.io/docs/instrumenting/exposition_formats).

/// One figure.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Its name, such as `triarch_disk_bytes_total`.
    pub name: String,
    /// Names and values of its labels.
    pub labels: Vec<(String, String)>,
    /// The figure.
    pub value: f64,
}

impl Sample {
    /// The value of a label.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels
            .iter()
            .find(|(own, _)| own == name)
            .map(|(_, value)| value.as_str())
    }
}

/// All figures that a text has.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Samples(Vec<Sample>);

impl Samples {
    /// Takes a text apart. Lines that are no figures are left out: a newer VMM may say more than this client knows.
    pub fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(sample).collect())
    }

    /// All figures, in their order.
    pub fn iter(&self) -> impl Iterator<Item = &Sample> {
        self.0.iter()
    }

    /// The figures of this name.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.iter().filter(move |sample| sample.name == name)
    }

    /// The sum of the figures of this name that have all these labels; `None` when there are none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let fits = |sample: &&Sample| labels.iter().all(|(label, value)| sample.label(label) == Some(*value));
        let values = self.named(name).filter(fits).map(|sample| sample.value);
        values.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
    }

    /// The values that a label of the figures of this name has, each once, in their order.
    pub fn values<'a>(&'a self, name: &'a str, label: &str) -> Vec<&'a str> {
        let mut values = Vec::new();
        for value in self.named(name).filter_map(|sample| sample.label(label)) {
            // They come grouped, but nothing obliges them to.
            if values.last() != Some(&value) && !values.contains(&value) {
                values.push(value);
            }
        }
        values
    }
}

/// A line as a figure; comments and what is malformed are none.
fn sample(line: &str) -> Option<Sample> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    let end = line.find(|c: char| c == '{' || c.is_ascii_whitespace())?;
    let (name, rest) = line.split_at(end);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (Vec::new(), rest),
    };
    // A timestamp may follow.
    let value = rest.split_ascii_whitespace().next()?.parse().ok()?;
    Some(Sample {
        name: name.to_owned(),
        labels,
        value,
    })
}

type Labels = Vec<(String, String)>;

/// What stands between braces, and the text behind them.
fn labels(mut text: &str) -> Option<(Labels, &str)> {
    let mut labels = Vec::new();
    loop {
        text = text.trim_start_matches([' ', ',']);
        if let Some(rest) = text.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, rest) = text.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = rest.char_indices();
        text = loop {
            match chars.next()? {
                (at, '"') => break &rest[at + 1..],
                (_, '\\') => match chars.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, c) => value.push(c),
            }
        };
        labels.push((name.to_owned(), value));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TEXT: &str = "\
# HELP a Things.
# TYPE a counter
a{disk=\"_disk0\",queue=\"0\"} 3
a{disk=\"_disk0\",queue=\"1\"} 4.5
a{disk=\"x\\\"y\\\\z\\n\",queue=\"0\"} 1 1395066363000
b 12
h_bucket{le=\"+Inf\"} 7
broken{
nothing
";

    #[test]
    fn figures_are_found_by_name_and_label() {
        let samples = Samples::parse(TEXT);
        assert_eq!(samples.iter().count(), 5);
        assert_eq!(samples.sum("a", &[("disk", "_disk0")]), Some(7.5));
        assert_eq!(samples.sum("a", &[("disk", "_disk0"), ("queue", "1")]), Some(4.5));
        assert_eq!(samples.sum("a", &[]), Some(8.5));
        assert_eq!(samples.sum("b", &[]), Some(12.0));
        assert_eq!(samples.sum("c", &[]), None);
        assert_eq!(samples.sum("a", &[("disk", "y")]), None);
        assert_eq!(samples.values("a", "disk"), ["_disk0", "x\"y\\z\n"]);
        assert_eq!(samples.values("h_bucket", "le"), ["+Inf"]);
    }

    proptest! {
        #[test]
        fn whatever_the_text_there_is_no_panic(text in "[a-z{}=\\\\\", 0-9\n]{0,200}") {
            Samples::parse(&text);
        }
    }
}
