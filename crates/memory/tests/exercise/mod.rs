//! Bodies that random bytes drive: the ordinary tests feed them from seeds, the fuzz targets
//! (`fuzz/`) from a fuzzer.
#![allow(dead_code, reason = "each test that includes this uses a part of it")]

pub(crate) mod calls;
pub(crate) mod machine;
pub(crate) mod space;
