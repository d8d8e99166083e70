//! Runs `triarch_api::fuzzing::flags` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| triarch_api::fuzzing::flags(data));
