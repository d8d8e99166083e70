//! `trictl events`.

use std::time::Duration;

use serde_json::Value;
use triarch_api::server::Method;
use triarch_client::{Client, Event};

use crate::cli::Events;
use crate::output::{Failure, print};
use crate::units::clean;

const HEAD: &str = "        TIME     ID  SOURCE         EVENT         PROPERTIES";

/// Shows events: those that are kept, those to come, or both.
pub(crate) fn run(client: &mut Client, arguments: &Events, json: bool) -> Result<(), Failure> {
    if arguments.no_follow {
        return kept(client, arguments.since.unwrap_or(0), json);
    }
    let target = match arguments.since {
        Some(since) => format!("vm.events?since={since}"),
        None => "vm.events".to_owned(),
    };
    let mut stream = client.follow(&target)?;
    if !json {
        print(HEAD)?;
    }
    // A VMM ends its streams when it ends.
    while let Some(text) = stream.line(Duration::ZERO)? {
        if text.is_empty() {
            continue;
        }
        if json {
            print(&text)?;
        } else {
            print(&line(&Event::parse(&text)?))?;
        }
    }
    Ok(())
}

fn kept(client: &mut Client, since: u64, json: bool) -> Result<(), Failure> {
    let target = format!("vm.events?follow=false&since={since}");
    if json {
        return print(&client.call(Method::Get, &target, None)?.body);
    }
    let events: Vec<Event> = client.get_as(&target)?;
    let lines = events.iter().map(line);
    let text: Vec<String> = std::iter::once(HEAD.to_owned()).chain(lines).collect();
    print(&text.join("\n"))
}

/// An event in one line.
fn line(event: &Event) -> String {
    let time = format!("{}.{:06}", event.timestamp.secs, event.timestamp.nanos / 1000);
    let id = event.id.map_or_else(|| "-".to_owned(), |id| id.to_string());
    let properties: Vec<String> = event
        .properties
        .iter()
        .flatten()
        .map(|(name, value)| match value {
            Value::String(text) if text.contains(' ') => format!("{name}={text:?}"),
            Value::String(text) => format!("{name}={text}"),
            other => format!("{name}={other}"),
        })
        .collect();
    let Event { source, event, .. } = event;
    let text = format!(
        "{time:>12}  {id:>5}  {source:<13}  {event:<12}  {}",
        properties.join(" ")
    );
    clean(text.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_aligned_line() {
        let shown = |text: &str| line(&Event::parse(text).expect("an event"));
        assert_eq!(
            shown(
                r#"{"id":7,"timestamp":{"secs":1,"nanos":50000},"source":"virtio-device","event":"reset",
                   "properties":{"id":"_disk0","suppressed":12}}"#
            ),
            "    1.000050      7  virtio-device  reset         id=_disk0 suppressed=12"
        );
        assert_eq!(
            shown(r#"{"timestamp":{"secs":0,"nanos":0},"source":"vm","event":"booted","properties":null}"#),
            "    0.000000      -  vm             booted"
        );
        let hostile = r#"{"timestamp":{"secs":0,"nanos":0},"source":"job","event":"failed","properties":{"error":"a b\u001b[2J"}}"#;
        let text = shown(hostile);
        assert!(text.contains(r#"error="a b"#) && !text.contains('\u{1b}'), "{text}");
        assert_eq!(HEAD.find("SOURCE"), shown(hostile).find("job"));
        assert_eq!(HEAD.find("EVENT"), shown(hostile).find("failed"));
    }
}
