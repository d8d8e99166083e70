//! An event as text.

use std::fmt::Write;
use std::time::Duration;

use super::Kind;

/// Bytes of a line at most, without its newline. What goes into a pipe in one piece is 4096 bytes long at most (PIPE_BUF), and clients have
/// buffers of that size.
pub const MAX_LINE: usize = 3000;
/// Of these, for the properties' values.
const MAX_VALUES: usize = 2000;
/// How text that was cut ends.
const CUT: &str = "...";

/// What a property is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// Text; what is too long is cut.
    Text(&'a str),
    /// A number.
    Number(u64),
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(text)
    }
}

impl From<u64> for Value<'_> {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

/// The JSON object of an event, in one line of ASCII.
pub(super) fn format(id: u64, at: Duration, kind: &Kind, properties: &[(&str, Value<'_>)]) -> String {
    let (secs, nanos) = (at.as_secs(), at.subsec_nanos());
    let Kind { source, event, .. } = kind;
    let mut line = format!(
        r#"{{"id":{id},"timestamp":{{"secs":{secs},"nanos":{nanos}}},"source":"{source}","event":"{event}","properties":"#
    );
    if properties.is_empty() {
        line.push_str("null}");
        return line;
    }
    let mut room = MAX_VALUES;
    for (at, (name, value)) in properties.iter().enumerate() {
        line.push(if at == 0 { '{' } else { ',' });
        // Writing to a string does not fail; names are our own and need no escape.
        let _ = match value {
            Value::Number(number) => write!(line, r#""{name}":{number}"#),
            Value::Text(text) => {
                let _ = write!(line, r#""{name}":""#);
                room -= escape(text, room, &mut line);
                line.write_char('"')
            }
        };
    }
    line.push_str("}}");
    line
}

/// Appends `text` as the inside of a JSON string, cut to `room` bytes; how many it took. Braces are escaped too: clients find the end of
/// an object by counting them.
fn escape(text: &str, room: usize, output: &mut String) -> usize {
    let start = output.len();
    for c in text.chars() {
        let before = output.len();
        match c {
            '"' | '\\' => output.extend(['\\', c]),
            ' '..='~' if !matches!(c, '{' | '}') => output.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a string does not fail.
                    let _ = write!(output, "\\u{unit:04x}");
                }
            }
        }
        if output.len() - start + CUT.len() > room {
            output.truncate(before);
            if room >= CUT.len() {
                output.push_str(CUT);
            }
            break;
        }
    }
    output.len() - start
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::kind::{DEVICE_RESET, JOB_FAILED, VM_BOOTED};
    use super::*;

    #[test]
    fn lines_have_the_form_of_the_event_monitor() {
        let at = Duration::new(3, 7);
        assert_eq!(
            format(1, at, &VM_BOOTED, &[]),
            r#"{"id":1,"timestamp":{"secs":3,"nanos":7},"source":"vm","event":"booted","properties":null}"#
        );
        let line = format(
            2,
            at,
            &JOB_FAILED,
            &[("job", 4.into()), ("error", "no \"Größe\" {\n".into())],
        );
        assert!(line.is_ascii());
        let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(value["properties"], json!({"job": 4, "error": "no \"Größe\" {\n"}));
    }

    proptest! {
        #[test]
        fn whatever_is_in_it_a_line_is_short_and_its_braces_match(a in ".{0,4000}", b in ".{0,4000}") {
            let properties = [("id", Value::Text(&a)), ("error", Value::Text(&b)), ("job", u64::MAX.into())];
            let line = format(u64::MAX, Duration::MAX, &DEVICE_RESET, &properties);
            prop_assert!(line.len() <= MAX_LINE, "{} bytes", line.len());
            prop_assert!(line.is_ascii() && !line.contains('\n'));
            prop_assert_eq!(line.matches('{').count(), 3);
            prop_assert_eq!(line.matches('}').count(), 3);
            let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            let id = value["properties"]["id"].as_str().expect("text");
            prop_assert!(id == a || id.ends_with(CUT) && a.starts_with(&id[..id.len() - CUT.len()]));
        }
    }
}
