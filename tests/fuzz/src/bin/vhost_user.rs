//! Runs `triarch_blkd::fuzzing::vhost_user` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| triarch_blkd::fuzzing::vhost_user(data));
