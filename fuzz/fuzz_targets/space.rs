//! The region tree's flat view against a naive look-up.
#![no_main]

#[path = "../../crates/memory/tests/exercise/mod.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    exercise::space::compare_with_model(data);
});
