//! HTTP/1.1 (RFC 9112), as much of it as a local API needs: heads of requests, and responses.

use std::sync::Arc;

/// Header fields of a request.
const MAX_FIELDS: usize = 64;

/// What a request wants done with its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// GET
    Get,
    /// PUT
    Put,
    /// HEAD
    Head,
    /// Any other.
    Other,
}

/// The head of a request, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) method: Method,
    /// Path of the target, without its query.
    pub(super) path: String,
    /// What stands behind the question mark of the target.
    pub(super) query: String,
    /// Bytes of body that follow.
    pub(super) body_len: usize,
    /// Whether the client wants to go on after the response.
    pub(super) keep_alive: bool,
    /// Whether it waits for a 100 before it sends the body.
    pub(super) wants_continue: bool,
}

/// Why bytes are no request we serve. The connection cannot be used any further.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reject {
    pub(super) status: u16,
    pub(super) message: String,
}

impl Reject {
    pub(super) fn new(status: u16, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, message }
    }

    pub(super) fn response(&self) -> Response {
        Response::error(self.status, &self.message)
    }
}

impl Head {
    /// Reads a complete head, from its first line to the empty one.
    pub(super) fn parse(bytes: &[u8], max_body: usize) -> Result<Self, Reject> {
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let mut request = httparse::Request::new(&mut fields);
        match request.parse(bytes) {
            Ok(httparse::Status::Complete(n)) if n == bytes.len() => {}
            Ok(_) => return Err(Reject::new(400, "the head of the request is not complete")),
            Err(httparse::Error::TooManyHeaders) => {
                let message = format!("the request has more than {MAX_FIELDS} header fields");
                return Err(Reject::new(431, message));
            }
            Err(error) => return Err(Reject::new(400, format!("this is no HTTP/1.1 request: {error}"))),
        }
        let newest = request.version == Some(1);
        let (path, query) = split(request.path.unwrap_or_default());
        let mut head = Self {
            method: match request.method {
                Some("GET") => Method::Get,
                Some("PUT") => Method::Put,
                Some("HEAD") => Method::Head,
                _ => Method::Other,
            },
            path: path.to_owned(),
            query: query.to_owned(),
            body_len: 0,
            keep_alive: newest,
            wants_continue: false,
        };
        let mut length = None;
        for field in request.headers.iter() {
            let value = field.value.trim_ascii();
            if field.name.eq_ignore_ascii_case("content-length") {
                let this = content_length(value, max_body)?;
                if length.is_some_and(|other| other != this) {
                    return Err(Reject::new(400, "the request has two different lengths"));
                }
                length = Some(this);
            } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
                return Err(Reject::new(
                    501,
                    "bodies with a Transfer-Encoding are not supported; send a Content-Length",
                ));
            } else if field.name.eq_ignore_ascii_case("connection") {
                head.keep_alive = keep_alive(value, head.keep_alive);
            } else if field.name.eq_ignore_ascii_case("expect") {
                if !value.eq_ignore_ascii_case(b"100-continue") {
                    return Err(Reject::new(417, "the only expectation understood is 100-continue"));
                }
                head.wants_continue = newest;
            }
        }
        head.body_len = length.unwrap_or(0);
        Ok(head)
    }
}

/// Path and query of a target in origin form (`/path?query`) or absolute form (`http://host/path?query`).
fn split(target: &str) -> (&str, &str) {
    let target = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    };
    let target = target.split('#').next().unwrap_or_default();
    target.split_once('?').unwrap_or((target, ""))
}

/// RFC 9110 section 8.6: digits only.
fn content_length(value: &[u8], max: usize) -> Result<usize, Reject> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(Reject::new(400, "the Content-Length is not a number"));
    }
    // What overflows is too large as well.
    let length = str::from_utf8(value).ok().and_then(|text| text.parse().ok());
    match length {
        Some(length) if length <= max => Ok(length),
        _ => Err(Reject::new(413, format!("the body is larger than {max} bytes"))),
    }
}

fn keep_alive(value: &[u8], current: bool) -> bool {
    let has = |option: &str| {
        let mut options = value.split(|b| *b == b',');
        options.any(|o| o.trim_ascii().eq_ignore_ascii_case(option.as_bytes()))
    };
    if has("close") {
        false
    } else {
        current || has("keep-alive")
    }
}

/// What tells a client to go on with the body (RFC 9110 section 15.2.1).
pub(super) const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// The type of most bodies.
const JSON: &str = "application/json";

/// A response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    status: u16,
    /// Methods the target has, for 405.
    allow: Option<&'static str>,
    content_type: &'static str,
    body: Option<Arc<[u8]>>,
}

impl Response {
    /// 204: done, nothing to tell.
    pub fn done() -> Self {
        Self {
            status: 204,
            allow: None,
            content_type: JSON,
            body: None,
        }
    }

    /// 200 with this JSON text, which should be ASCII (see [`ascii`]).
    pub fn json(body: Arc<[u8]>) -> Self {
        Self {
            status: 200,
            allow: None,
            content_type: JSON,
            body: Some(body),
        }
    }

    /// 200 with a text of this type.
    pub fn text(content_type: &'static str, text: String) -> Self {
        Self {
            content_type,
            ..Self::json(text.into_bytes().into())
        }
    }

    /// An error: `{"error": message}`.
    pub fn error(status: u16, message: &str) -> Self {
        let text = serde_json::json!({ "error": message }).to_string();
        Self {
            status,
            allow: None,
            content_type: JSON,
            body: Some(ascii(text)),
        }
    }

    /// 405: the target has only the method `allow`.
    pub fn wrong_method(allow: &'static str, message: &str) -> Self {
        Self {
            allow: Some(allow),
            ..Self::error(405, message)
        }
    }

    /// Its head alone, as HEAD wants it.
    pub(super) fn without_body(self) -> Self {
        Self { body: None, ..self }
    }

    /// The HTTP status.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// The body, empty if there is none.
    pub fn body(&self) -> &[u8] {
        self.body.as_deref().unwrap_or_default()
    }

    /// Appends it to `output` as it goes over the wire. `Content-Length` is spelled as clients search for it; a 204 must not have one. There
    /// is no reason phrase, only the space before it (RFC 9112 section 4): Cloud Hypervisor's client, which Kata's Rust runtime and
    /// ch-remote speak through, takes all that stands behind the version for the number.
    pub(super) fn write(&self, output: &mut Vec<u8>, keep_alive: bool) {
        use std::io::Write;
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let status = self.status;
        // Writing to a vector does not fail.
        let _ = write!(
            output,
            "HTTP/1.1 {status} \r\nServer: Triarch API\r\nConnection: {connection}\r\n"
        );
        if let Some(allow) = self.allow {
            let _ = write!(output, "Allow: {allow}\r\n");
        }
        match &self.body {
            Some(body) => {
                let (kind, length) = (self.content_type, body.len());
                let _ = write!(output, "Content-Type: {kind}\r\nContent-Length: {length}\r\n\r\n");
                output.extend_from_slice(body);
            }
            None => output.extend_from_slice(b"\r\n"),
        }
    }
}

/// Appends the head of a response that goes on until the connection is closed (RFC 9112 section 6.3, item 8): it has no length, and is not
/// chunked either, which some clients do not understand.
pub(super) fn write_stream_head(output: &mut Vec<u8>) {
    output.extend_from_slice(
        b"HTTP/1.1 200 \r\nServer: Triarch API\r\nConnection: close\r\nContent-Type: application/x-ndjson\r\n\r\n",
    );
}

/// JSON text with everything beyond ASCII escaped: some clients decode what one read gave them, which may end inside of a character.
pub(crate) fn ascii(text: String) -> Arc<[u8]> {
    if text.is_ascii() {
        return text.into_bytes().into();
    }
    let mut escaped = String::with_capacity(text.len() * 2);
    for c in text.chars() {
        if c.is_ascii() {
            escaped.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                escaped.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    escaped.into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Result<Head, u16> {
        Head::parse(text.as_bytes(), 1000).map_err(|reject| reject.status)
    }

    #[test]
    fn a_head_tells_what_is_wanted() {
        let text = "PUT http://localhost/api/v1/vm.create?x=1 HTTP/1.1\r\nHost: a\r\ncontent-LENGTH: 12 \r\nExpect: 100-continue\r\n\r\n";
        let expected = Head {
            method: Method::Put,
            path: "/api/v1/vm.create".into(),
            query: "x=1".into(),
            body_len: 12,
            keep_alive: true,
            wants_continue: true,
        };
        assert_eq!(head(text), Ok(expected));
    }

    #[test]
    fn a_connection_is_kept_as_the_version_and_the_client_say() {
        let kept = |version: &str, field: &str| {
            head(&format!("GET / HTTP/{version}\r\n{field}\r\n\r\n"))
                .expect("a head")
                .keep_alive
        };
        assert!(kept("1.1", "A: b"));
        assert!(!kept("1.1", "Connection: te, CLOSE"));
        assert!(!kept("1.0", "A: b"));
        assert!(kept("1.0", "Connection: Keep-Alive"));
    }

    #[test]
    fn lengths_are_numbers_within_the_limit() {
        let length = |fields: &str| head(&format!("PUT / HTTP/1.1\r\n{fields}\r\n")).map(|h| h.body_len);
        assert_eq!(length(""), Ok(0));
        assert_eq!(length("Content-Length: 1000\r\n"), Ok(1000));
        assert_eq!(length("Content-Length: 7\r\nContent-Length: 7\r\n"), Ok(7));
        assert_eq!(length("Content-Length: 7\r\nContent-Length: 8\r\n"), Err(400));
        assert_eq!(length("Content-Length: 1001\r\n"), Err(413));
        assert_eq!(length("Content-Length: 99999999999999999999999999\r\n"), Err(413));
        for bad in ["", "-1", "+1", "1,1", "0x1", "1 1"] {
            assert_eq!(length(&format!("Content-Length: {bad}\r\n")), Err(400), "{bad}");
        }
        assert_eq!(length("Transfer-Encoding: chunked\r\n"), Err(501));
        assert_eq!(length("Expect: miracles\r\n"), Err(417));
    }

    #[test]
    fn what_is_no_head_is_rejected() {
        assert_eq!(head("hello\r\n\r\n"), Err(400));
        assert_eq!(head("GET / HTTP/2.0\r\n\r\n"), Err(400));
        assert_eq!(head("GET / HTTP/1.1\r\nno colon\r\n\r\n"), Err(400));
        let many = "a: b\r\n".repeat(MAX_FIELDS + 1);
        assert_eq!(head(&format!("GET / HTTP/1.1\r\n{many}\r\n")), Err(431));
    }

    #[test]
    fn responses_are_spelled_as_clients_read_them() {
        let wire = |response: Response, keep| {
            let mut output = Vec::new();
            response.write(&mut output, keep);
            String::from_utf8(output).expect("ASCII")
        };
        assert_eq!(
            wire(Response::done(), true),
            "HTTP/1.1 204 \r\nServer: Triarch API\r\nConnection: keep-alive\r\n\r\n"
        );
        let error = wire(Response::error(500, "Größe \u{1f980}"), false);
        assert!(error.contains("Connection: close\r\n"));
        let body = r#"{"error":"Gr\u00f6\u00dfe \ud83e\udd80"}"#;
        assert!(
            error.ends_with(&format!("Content-Length: {}\r\n\r\n{body}", body.len())),
            "{error}"
        );
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(body).expect("JSON")["error"],
            "Größe \u{1f980}"
        );
        assert!(wire(Response::wrong_method("GET", "no"), true).starts_with("HTTP/1.1 405 \r\n"));
        assert!(wire(Response::wrong_method("GET", "no"), true).contains("Allow: GET\r\n"));
    }
}
