//! Kernels and initial RAM disks of any bytes: an error, or a machine that lives for a millisecond.
#![no_main]

#[path = "../../crates/vmm/tests/hostile/garbage.rs"]
mod garbage;
#[path = "../../crates/vmm/tests/hostile/guest.rs"]
mod guest;
#[path = "../../crates/vmm/tests/hostile/images.rs"]
mod images;
#[path = "../../crates/vmm/tests/hostile/life.rs"]
mod life;

use std::time::Duration;

use garbage::Garbage;
use life::Life;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let image = images::from_bytes(data);
    let life = Life::of_image(&image, &mut Garbage::new(data.len() as u64));
    if let Err(message) = life.live(Duration::from_millis(1)) {
        assert!(!message.is_empty(), "an error without a word");
    }
});
