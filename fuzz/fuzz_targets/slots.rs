//! Memory slots and dirty logs against a naive model.
#![no_main]

#[path = "../../crates/memory/tests/exercise/mod.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    exercise::machine::compare_with_model(data);
});
