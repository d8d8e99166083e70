//! Guest memory: memfd regions, huge pages, dirty tracking.
