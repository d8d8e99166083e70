//! Runs `triarch_migration::fuzzing::stream` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    triarch_migration::fuzzing::stream(data);
});
