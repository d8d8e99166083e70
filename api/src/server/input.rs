//! What a client sent and nobody took yet: bytes, and descriptors at their place among them.

use std::collections::VecDeque;
use std::ops::Range;

use super::http::{Head, Reject};

/// Sizes a request must not exceed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    /// Bytes of its head.
    pub(super) head: usize,
    /// Bytes of its body.
    pub(super) body: usize,
    /// Descriptors with it.
    pub(super) fds: usize,
}

/// Bytes that are asked for in one go, unless a body is known to be longer.
const CHUNK: usize = 4096;
/// Bytes that are asked for at most.
const MAX_CHUNK: usize = 64 << 10;

/// A request that is there as a whole.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Whole {
    pub(super) head: Head,
    /// Where its body is.
    pub(super) body: Range<usize>,
    /// Where the next request begins.
    end: usize,
}

/// Splits a stream into requests. `F` is a descriptor.
///
/// The kernel gives descriptors with the last bytes of what one call received: it ends a call there. Before them it may have put bytes of
/// an earlier request. So descriptors belong to the request that has the last byte they came with.
pub(super) struct Input<F> {
    sizes: Sizes,
    bytes: Vec<u8>,
    /// Bytes in which the end of the head was searched for already.
    searched: usize,
    /// The head and its length, once it was complete.
    head: Option<(Head, usize)>,
    /// Descriptors, with the position behind the bytes they came with.
    fds: VecDeque<(usize, F)>,
}

impl<F> Input<F> {
    pub(super) fn new(sizes: Sizes) -> Self {
        Self {
            sizes,
            bytes: Vec::new(),
            searched: 0,
            head: None,
            fds: VecDeque::new(),
        }
    }

    /// Whether there is no part of a request.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.fds.is_empty()
    }

    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.bytes.get(range).unwrap_or_default()
    }

    /// Lets `receive` fill a buffer with the next bytes of the stream; it tells how many, and gives the descriptors that came with them.
    pub(super) fn receive<E>(
        &mut self,
        receive: impl FnOnce(&mut [u8], &mut Vec<F>) -> Result<usize, E>,
    ) -> Result<usize, E> {
        let missing = match &self.head {
            Some((head, len)) => (len + head.body_len).saturating_sub(self.bytes.len()),
            None => 0,
        };
        let old = self.bytes.len();
        self.bytes.resize(old + missing.clamp(CHUNK, MAX_CHUNK), 0);
        let mut fds = Vec::new();
        let result = receive(&mut self.bytes[old..], &mut fds);
        let count = result.as_ref().map_or(0, |n| *n);
        self.bytes.truncate(old + count);
        self.fds.extend(fds.into_iter().map(|fd| (old + count, fd)));
        result
    }

    /// The next request, if all of it is there. It stays there until it is [taken](Self::take).
    pub(super) fn next(&mut self) -> Result<Option<Whole>, Reject> {
        if self.fds.len() > self.sizes.fds {
            let message = format!("more than {} descriptors came with a request", self.sizes.fds);
            return Err(Reject::new(400, message));
        }
        if self.head.is_none() {
            self.head = self.find_head()?;
        }
        let Some((head, len)) = &self.head else {
            return Ok(None);
        };
        let body = *len..*len + head.body_len;
        if self.bytes.len() < body.end {
            return Ok(None);
        }
        // Old clients end a body with an empty line that is not part of it.
        let end = body.end + line_ends(&self.bytes[body.end..]);
        let head = head.clone();
        Ok(Some(Whole { head, body, end }))
    }

    /// Whether the client wants to hear that it should send the body. True once a request.
    pub(super) fn wants_continue(&mut self) -> bool {
        match &mut self.head {
            Some((head, len)) if self.bytes.len() < *len + head.body_len => std::mem::take(&mut head.wants_continue),
            _ => false,
        }
    }

    /// The descriptors that came with `request`.
    pub(super) fn take_fds(&mut self, request: &Whole) -> Vec<F> {
        let mut taken = Vec::new();
        while let Some((_, fd)) = self.fds.pop_front_if(|(at, _)| *at <= request.end) {
            taken.push(fd);
        }
        taken
    }

    /// Forgets `request`.
    pub(super) fn take(&mut self, request: &Whole) {
        self.discard(request.end);
        self.head = None;
        if self.bytes.is_empty() && self.bytes.capacity() > 2 * CHUNK {
            self.bytes = Vec::new();
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.bytes = Vec::new();
        self.fds.clear();
        self.head = None;
        self.searched = 0;
    }

    fn find_head(&mut self) -> Result<Option<(Head, usize)>, Reject> {
        self.discard(line_ends(&self.bytes));
        let end = head_end(&self.bytes, self.searched);
        let len = end.unwrap_or(self.bytes.len());
        if len > self.sizes.head {
            let message = format!("the head of the request is larger than {} bytes", self.sizes.head);
            return Err(Reject::new(431, message));
        }
        if end.is_none() {
            self.searched = len;
            return Ok(None);
        }
        let head = Head::parse(&self.bytes[..len], self.sizes.body)?;
        Ok(Some((head, len)))
    }

    fn discard(&mut self, count: usize) {
        if count > 0 {
            self.bytes.drain(..count);
            for (at, _) in &mut self.fds {
                *at = at.saturating_sub(count);
            }
            self.searched = 0;
        }
    }
}

/// How many bytes of line ends there are at the start.
fn line_ends(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count()
}

/// Where the head ends: behind the first empty line. The first `searched` bytes have no end.
fn head_end(bytes: &[u8], searched: usize) -> Option<usize> {
    // An empty line may begin in the last three bytes that were searched.
    let mut from = searched.saturating_sub(3);
    while let Some(at) = bytes.get(from..)?.iter().position(|b| *b == b'\n') {
        let rest = &bytes[from + at + 1..];
        let empty_line = match rest {
            [b'\n', ..] => 1,
            [b'\r', b'\n', ..] => 2,
            _ => 0,
        };
        from += at + 1;
        if empty_line > 0 {
            return Some(from + empty_line);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const SIZES: Sizes = Sizes {
        head: 300,
        body: 2000,
        fds: 8,
    };

    fn push(input: &mut Input<u32>, bytes: &[u8], fds: &[u32]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let _ = input.receive::<()>(|buffer, into| {
                let n = buffer.len().min(rest.len());
                buffer[..n].copy_from_slice(&rest[..n]);
                rest = &rest[n..];
                into.extend(fds.iter().filter(|_| rest.is_empty()));
                Ok(n)
            });
        }
    }

    /// Path, body, descriptors.
    type Taken = (String, Vec<u8>, Vec<u32>);

    /// Everything that can be taken now.
    fn take_all(input: &mut Input<u32>) -> Result<Vec<Taken>, Reject> {
        let mut all = Vec::new();
        while let Some(whole) = input.next()? {
            let fds = input.take_fds(&whole);
            all.push((whole.head.path.clone(), input.bytes(whole.body.clone()).to_vec(), fds));
            input.take(&whole);
        }
        Ok(all)
    }

    fn request(path: &str, body: &[u8]) -> Vec<u8> {
        let mut bytes = format!("PUT /{path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes();
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn descriptors_belong_to_the_request_with_the_last_byte_they_came_with() {
        let mut input = Input::new(SIZES);
        let (a, b) = (request("a", b"1"), request("b", b"23"));
        // What the kernel makes of: a without descriptors, then the head of b with two, then the rest of b with one.
        let (b1, b2) = b.split_at(10);
        push(&mut input, &[a.as_slice(), b1].concat(), &[1, 2]);
        assert_eq!(
            take_all(&mut input).expect("requests"),
            [("/a".into(), b"1".to_vec(), vec![])]
        );
        push(&mut input, b2, &[3]);
        push(&mut input, &a, &[4]);
        let expected = [
            ("/b".into(), b"23".to_vec(), vec![1, 2, 3]),
            ("/a".into(), b"1".to_vec(), vec![4]),
        ];
        assert_eq!(take_all(&mut input).expect("requests"), expected);
        assert!(input.is_empty());
    }

    #[test]
    fn descriptors_with_the_empty_line_behind_a_body_belong_to_it() {
        let mut input = Input::new(SIZES);
        push(&mut input, &[request("a", b"1").as_slice(), b"\r\n"].concat(), &[1]);
        assert_eq!(
            take_all(&mut input).expect("requests"),
            [("/a".into(), b"1".to_vec(), vec![1])]
        );
        assert!(input.is_empty());
    }

    #[test]
    fn limits_hold() {
        let status = |bytes: &[u8], fds: &[u32]| {
            let mut input = Input::new(SIZES);
            push(&mut input, bytes, fds);
            input.next().map_err(|reject| reject.status)
        };
        assert_eq!(status(&[b'a'; 301], &[]), Err(431));
        assert_eq!(
            status(format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(300)).as_bytes(), &[]),
            Err(431)
        );
        assert_eq!(status(&[b'a'; 300], &[]), Ok(None));
        assert_eq!(status(b"PUT / HTTP/1.1\r\nContent-Length: 2001\r\n\r\n", &[]), Err(413));
        assert_eq!(status(b"GET", &[0; 9]), Err(400));
    }

    #[test]
    fn a_client_is_told_once_to_continue() {
        let mut input = Input::new(SIZES);
        push(
            &mut input,
            b"PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n",
            &[],
        );
        assert_eq!(input.next(), Ok(None));
        assert!(input.wants_continue());
        assert!(!input.wants_continue());
        push(&mut input, b"x", &[]);
        assert!(!input.wants_continue());
        assert_eq!(take_all(&mut input).expect("requests").len(), 1);
    }

    /// Pieces of requests, so that random input gets deeper than the first line.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            3 => vec(any::<u8>(), 0..40),
            1 => vec(any::<u8>(), 0..600),
            2 => Just(b"GET / HTTP/1.1\r\n".to_vec()),
            2 => Just(b"PUT /a HTTP/1.0\r\n".to_vec()),
            2 => Just(b"Content-Length: 5\r\n".to_vec()),
            1 => Just(b"Content-Length: 99999999999999999999\r\n".to_vec()),
            1 => Just(b"Transfer-Encoding: chunked\r\n".to_vec()),
            3 => Just(b"\r\n".to_vec()),
            1 => Just(b"\n".to_vec()),
        ];
        vec(piece, 0..12).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn random_bytes_neither_panic_nor_grow_it(pieces in vec((bytes(), 0usize..4), 0..20)) {
            let mut input = Input::new(SIZES);
            for (bytes, fds) in pieces {
                push(&mut input, &bytes, &vec![7; fds]);
                if take_all(&mut input).is_err() {
                    break;
                }
                // What is left is a part of one request.
                prop_assert!(input.bytes.len() <= SIZES.head + SIZES.body);
                prop_assert!(input.bytes.capacity() <= 2 * (SIZES.head + SIZES.body + MAX_CHUNK));
                prop_assert!(input.fds.len() <= SIZES.fds);
            }
        }

        #[test]
        fn requests_are_the_same_wherever_the_stream_is_cut(
            bodies in vec(vec(any::<u8>(), 0..200), 1..6),
            cuts in vec(any::<prop::sample::Index>(), 0..6),
        ) {
            // A body that begins with a line end is fine; one behind a body is swallowed, so the bodies here are what they are.
            let stream: Vec<u8> = bodies.iter().flat_map(|body| request("x", body)).collect();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len())).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let mut input = Input::new(SIZES);
            let mut got = Vec::new();
            for (number, cut) in cuts.windows(2).enumerate() {
                push(&mut input, &stream[cut[0]..cut[1]], &[number as u32]);
                let taken = take_all(&mut input);
                prop_assert!(taken.is_ok());
                got.extend(taken.unwrap_or_default());
            }
            prop_assert!(input.is_empty());
            let got_bodies: Vec<_> = got.iter().map(|(_, body, _)| body.clone()).collect();
            prop_assert_eq!(got_bodies, bodies);
            // Every descriptor arrives, in order.
            let fds: Vec<u32> = got.iter().flat_map(|(_, _, fds)| fds.clone()).collect();
            let sent: Vec<u32> = cuts.windows(2).enumerate().filter(|(_, c)| c[0] < c[1]).map(|(n, _)| n as u32).collect();
            prop_assert_eq!(fds, sent);
        }
    }
}
