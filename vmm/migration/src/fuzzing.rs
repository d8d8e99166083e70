//! Entry points of fuzz targets.

use std::io;
use std::sync::Arc;

use crate::destination::Writer;
use crate::memory::{Layout, PAGE, Region, Target};
use crate::wire::{HEAD, Kind, Message, Runs, WireError, decode, encode};

/// Regions that messages may write to.
const REGIONS: [Region; 2] = [
    Region { gpa: 0, len: 64 * PAGE },
    Region {
        gpa: 1 << 32,
        len: 1 << 40,
    },
];

/// Memory that makes sure it is only asked for what it has.
struct Checked;

impl Target for Checked {
    fn write(&self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        self.zero(gpa, bytes.len() as u64)
    }

    fn zero(&self, gpa: u64, len: u64) -> io::Result<()> {
        let end = gpa.checked_add(len).expect("no overflow");
        let inside = |region: &Region| region.gpa <= gpa && end <= region.gpa + region.len;
        assert!(REGIONS.iter().any(inside), "{len:#x} bytes at {gpa:#x}");
        Ok(())
    }
}

/// Reads `input` as what comes on a stream: one message after the other, until one is none. What is about memory is carried out.
/// Returns how many bytes of it were messages.
pub fn stream(input: &[u8]) -> usize {
    let layout = Layout::new(REGIONS.to_vec()).expect("a layout");
    let mut writer = Writer::new(Arc::new(Checked), layout);
    let (mut rest, mut again) = (input, Vec::new());
    while let Some((head, after)) = rest.split_first_chunk::<HEAD>() {
        let Ok((kind, len)) = decode::head(*head) else { break };
        let Some((body, after)) = after.split_at_checked(len) else {
            break;
        };
        let decoded = decode::body(kind, body);
        if kind == Kind::Pages {
            // Whoever reads the list alone finds the same.
            match (&decoded, ahead(body)) {
                (Ok(Message::Pages(pages)), Ok(runs)) => {
                    assert_eq!(runs, Some(pages.runs.clone()).filter(|_| !pages.packed));
                }
                (Err(_), Err(_)) => {}
                other => panic!("{other:?}"),
            }
        }
        let Ok(message) = decoded else { break };
        // What is taken in is what it was written as.
        let tail = encode::message(&message, &mut again);
        again.extend_from_slice(tail);
        assert_eq!(&again[HEAD..], body);
        if matches!(message, Message::Pages(_) | Message::Zeroes(_)) && writer.take(&message).is_err() {
            break;
        }
        rest = after;
    }
    input.len() - rest.len()
}

/// The pages of a message with this body, by the list that it begins with.
fn ahead(body: &[u8]) -> Result<Option<Runs>, WireError> {
    let first = body.first_chunk().ok_or(WireError::Short)?;
    let list = decode::list_len(*first)?;
    let list = body.get(..list).ok_or(WireError::Short)?;
    decode::pages_of(list, body.len() - list.len())
}
