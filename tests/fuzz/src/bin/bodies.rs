//! Runs `triarch_api::fuzzing::bodies` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| triarch_api::fuzzing::bodies(data));
