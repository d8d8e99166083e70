//! Runs `triarch_state::fuzzing::state` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| triarch_state::fuzzing::state(data));
