//! Payloads as one run of bytes, for whoever sends them elsewhere.

use crate::payload::Payload;
use crate::{PayloadError, Payloads};

impl Payloads {
    /// All of them, to be read by [`from_bytes`](Self::from_bytes): a JSON array as in `state.json`.
    ///
    /// # Errors
    /// One of them is nothing that JSON can tell.
    pub fn into_bytes(self) -> Result<Vec<u8>, PayloadError> {
        serde_json::to_vec(&self.into_list()).map_err(PayloadError::Sent)
    }

    /// Reads what [`into_bytes`](Self::into_bytes) wrote. Whoever calls bounds the number of bytes.
    ///
    /// # Errors
    /// The bytes are something else, or there are two of the same.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, PayloadError> {
        let list: Vec<Payload> = serde_json::from_slice(bytes).map_err(PayloadError::Sent)?;
        let mut payloads = Self::default();
        list.into_iter().try_for_each(|one| payloads.insert(one))?;
        Ok(payloads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    const KIND: Kind = Kind::new("test", 3);

    #[test]
    fn payloads_arrive_as_they_were_sent() {
        let mut payloads = Payloads::default();
        payloads.put(KIND, "", &1).expect("put");
        payloads.put(KIND, "second", &vec!["a", "b"]).expect("put");
        let sent = payloads.clone().into_bytes().expect("bytes");
        assert_eq!(Payloads::from_bytes(&sent).expect("read"), payloads);
    }

    #[test]
    fn what_is_something_else_is_refused() {
        let one = r#"{"kind":"a","version":1,"state":0}"#;
        assert!(Payloads::from_bytes(format!("[{one}]").as_bytes()).is_ok());
        for bad in [
            "",
            "{}",
            "[1]",
            &format!("[{one}"),
            &format!("[{one},{one}]"),
            r#"[{"kind":"a","version":1}]"#,
        ] {
            assert!(Payloads::from_bytes(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
