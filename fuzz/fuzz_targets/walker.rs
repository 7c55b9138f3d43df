//! The guest page-table walker against a naive model of translation.
#![no_main]

#[path = "../../crates/mmu/tests/model/mod.rs"]
mod model;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    model::bytes::walker(data);
});
