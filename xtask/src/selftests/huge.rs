//! Huge pages for the test that needs them: reserved where we may, and given back.

use std::fs;

const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// Pages of 2 MiB: the test asks for two gigabytes, and some.
const WANTED: &str = "1100";

/// The reserve, until dropped.
pub(crate) struct HugePages {
    before: Option<String>,
}

impl HugePages {
    /// Reserves; the test skips itself where that fails.
    pub(crate) fn reserve() -> Self {
        let before = fs::read_to_string(POOL).ok();
        let before = before.filter(|b| b.trim() == "0" && fs::write(POOL, WANTED).is_ok());
        Self { before }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // Nobody to tell; the next start of the host does it.
            let _ = fs::write(POOL, before);
        }
    }
}
