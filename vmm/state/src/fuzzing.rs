//! Entry points of fuzz targets.

use crate::document;

/// Reads `input` as a whole `state.json`, its checksum made right.
pub fn state(input: &[u8]) {
    let checksum = crc32fast::hash(input);
    let mut text = format!("{{\"format\":\"triarch-snapshot\",\"checksum\":\"{checksum:08x}\",\n").into_bytes();
    text.extend_from_slice(input);
    if let Ok(document) = document::parse(&text, "x86_64", 1 << 40) {
        // What was taken in can be followed.
        for range in &document.memory.ranges {
            assert!(range.gpa.checked_add(range.size).is_some() && range.offset + range.bytes() <= 1 << 40);
        }
        let _ = document.payloads.finish();
    }
    let _ = document::parse(input, "x86_64", 0);
}
