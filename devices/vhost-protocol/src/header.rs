//! What each message begins with ("Header").

/// Bytes of a header.
pub const HEADER: usize = 12;
/// Flag: the message answers another one.
pub const REPLY: u32 = 1 << 2;
/// Flag: the sender wants to hear whether it worked (protocol feature REPLY_ACK).
pub const NEED_REPLY: u32 = 1 << 3;
/// Version 1, the only one, in the lowest two bits of the flags.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;

/// A header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Number of the request, also in its answer.
    pub request: u32,
    /// [`REPLY`], [`NEED_REPLY`] and the version.
    pub flags: u32,
    /// Bytes of the payload that follows.
    pub size: u32,
}

impl Header {
    /// The header in these bytes, whatever it says.
    pub fn decode(bytes: &[u8; HEADER]) -> Self {
        let mut values = [0; 3];
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *value = u32::from_le_bytes(*bytes);
        }
        let [request, flags, size] = values;
        Self { request, flags, size }
    }

    /// Whether it is of the version that exists.
    pub fn is_known_version(&self) -> bool {
        self.flags & VERSION_MASK == VERSION
    }

    /// Whether it answers another message.
    pub fn is_reply(&self) -> bool {
        self.flags & REPLY != 0
    }

    /// Whether its sender wants to hear whether it worked.
    pub fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }
}

/// A whole message: the header for `payload`, with `flags` beside the version, and `payload`.
pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let head = [request, VERSION | flags, payload.len() as u32];
    let head = head.iter().flat_map(|v| v.to_le_bytes());
    head.chain(payload.iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_begins_with_its_header() {
        let bytes = message(24, NEED_REPLY, &[7, 8, 9]);
        assert_eq!(bytes, [24, 0, 0, 0, 9, 0, 0, 0, 3, 0, 0, 0, 7, 8, 9]);
        let header = Header::decode(bytes[..HEADER].try_into().expect("12 bytes"));
        assert_eq!((header.request, header.flags, header.size), (24, 9, 3));
        assert!(header.is_known_version() && header.needs_reply() && !header.is_reply());
    }

    #[test]
    fn other_versions_are_told_apart() {
        let of = |flags: u32| Header {
            request: 1,
            flags,
            size: 0,
        };
        for flags in [0, 2, 3, 2 | REPLY] {
            assert!(!of(flags).is_known_version(), "{flags}");
        }
        // Flags that nobody knows yet do not make it another version.
        assert!(of(1 | 1 << 31).is_known_version());
        assert!(of(1 | REPLY).is_reply());
    }
}
