//! The way from bytes to requests, for random input.

use super::input::{Input, Sizes};

/// Small, so that random input meets them.
const SIZES: Sizes = Sizes {
    head: 300,
    body: 2000,
    fds: 8,
};

/// What came of a stream: each request's path and body, then the status it was rejected with, if it was.
pub(crate) type Outcome = (Vec<(String, Vec<u8>)>, Option<u16>);

/// Gives `stream` to a connection's input in pieces of `size` bytes and takes what comes out.
pub(crate) fn requests(stream: &[u8], size: usize) -> Outcome {
    let mut input = Input::<u32>::new(SIZES);
    let mut taken = Vec::new();
    for (number, piece) in stream.chunks(size).enumerate() {
        let mut rest = piece;
        while !rest.is_empty() {
            let received = input.receive::<()>(|buffer, fds| {
                let count = buffer.len().min(rest.len());
                buffer[..count].copy_from_slice(&rest[..count]);
                rest = &rest[count..];
                // One, so that requests and not their descriptors are what is rejected.
                fds.extend((number == 0).then_some(7));
                Ok(count)
            });
            assert!(received.is_ok_and(|count| count > 0));
            loop {
                match input.next() {
                    Ok(Some(whole)) => {
                        drop(input.take_fds(&whole));
                        taken.push((whole.head.path.clone(), input.bytes(whole.body.clone()).to_vec()));
                        input.take(&whole);
                    }
                    Ok(None) => break,
                    Err(reject) => return (taken, Some(reject.status)),
                }
            }
            input.wants_continue();
        }
    }
    (taken, None)
}
