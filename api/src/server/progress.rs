//! What happens, and how far long work is.

use std::sync::Arc;
use std::time::Instant;

use super::http::ascii;
use super::{Response, Served, Stream};
use crate::events::{Cursor, EventLog};
use crate::jobs::JobBoard;

/// What stands behind the question mark of `vm.events`.
#[derive(Debug, PartialEq, Eq)]
struct Query {
    /// The number of the last event that the client has.
    since: Option<u64>,
    /// Whether it waits for more.
    follow: bool,
}

impl Query {
    fn read(text: &str) -> Result<Self, String> {
        let mut query = Self {
            since: None,
            follow: true,
        };
        for part in text.split('&').filter(|part| !part.is_empty()) {
            match part.split_once('=').unwrap_or((part, "")) {
                ("since", number) => match number.parse() {
                    Ok(since) => query.since = Some(since),
                    Err(_) => return Err("vm.events: since must be the number of an event".into()),
                },
                ("follow", "true") => query.follow = true,
                ("follow", "false") => query.follow = false,
                ("follow", _) => return Err("vm.events: follow must be true or false".into()),
                _ => return Err("vm.events: the query has something else than since and follow".into()),
            }
        }
        Ok(query)
    }
}

/// `vm.events`: a stream of what follows an event or the present, or what happened as an array.
pub(super) fn events(log: &Arc<EventLog>, query: &str) -> Served {
    let refuse = |message: &str| Served::Now(Response::error(400, message));
    let query = match Query::read(query) {
        Ok(query) => query,
        Err(message) => return refuse(&message),
    };
    let cursor = match query.since {
        Some(since) => log.after(since),
        None if query.follow => Ok(log.now()),
        None => log.after(0),
    };
    match cursor {
        Err(ahead) => refuse(&format!("vm.events: {ahead}")),
        Ok(cursor) if query.follow => Served::Stream(Box::new(Events {
            log: log.clone(),
            cursor,
        })),
        Ok(cursor) => Served::Now(Response::json(array(log, cursor))),
    }
}

/// All events from `cursor` on as a JSON array.
fn array(log: &EventLog, mut cursor: Cursor) -> Arc<[u8]> {
    let mut text = Vec::new();
    log.read(&mut cursor, usize::MAX, &mut text);
    text.pop();
    // No line has a newline inside.
    let inside = text.into_iter().flat_map(|byte| match byte {
        b'\n' => [Some(b','), Some(b'\n')],
        _ => [Some(byte), None],
    });
    let start = std::iter::once(b'[');
    start.chain(inside.flatten()).chain(std::iter::once(b']')).collect()
}

struct Events {
    log: Arc<EventLog>,
    cursor: Cursor,
}

impl Stream for Events {
    fn fill(&mut self, space: usize, output: &mut Vec<u8>) {
        self.log.read(&mut self.cursor, space, output);
    }

    fn due(&self) -> Option<Instant> {
        self.log.due()
    }
}

/// `vm.jobs`.
pub(super) fn jobs(board: &JobBoard) -> Response {
    // Text and numbers always serialise.
    Response::json(ascii(serde_json::to_string(&board.list()).unwrap_or_default()))
}

/// `vm.job/{id}`.
pub(super) fn job(board: &JobBoard, id: &str) -> Response {
    match id.parse().ok().and_then(|id| board.get(id)) {
        Some(job) => Response::json(ascii(serde_json::to_string(&job).unwrap_or_default())),
        None => Response::error(404, "vm.job: there is no such job; vm.jobs tells which there are"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::events::kind;

    #[test]
    fn a_query_is_understood_or_refused() {
        let query = |since, follow| Ok(Query { since, follow });
        assert_eq!(Query::read(""), query(None, true));
        assert_eq!(Query::read("since=7"), query(Some(7), true));
        assert_eq!(Query::read("follow=false&since=0"), query(Some(0), false));
        assert_eq!(Query::read("&follow=true&"), query(None, true));
        for bad in [
            "since", "since=", "since=-1", "since=x", "follow", "follow=0", "sinse=1",
        ] {
            assert!(Query::read(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_query_is_too_strange(text in ".*") {
            let _ = Query::read(&text);
        }
    }

    #[test]
    fn an_array_has_what_a_stream_has() {
        let log = EventLog::new();
        let parse =
            |cursor| -> Vec<serde_json::Value> { serde_json::from_slice(&array(&log, cursor)).expect("a JSON array") };
        assert!(parse(log.now()).is_empty());
        for _ in 0..3 {
            log.post(&kind::VM_PAUSED, &[]);
        }
        assert_eq!(parse(log.after(0).expect("the start")).len(), 3);
        assert_eq!(parse(log.after(2).expect("kept"))[0]["id"], 3);
    }
}
