//! How the C library's heap is told to behave.

#![expect(unsafe_code, reason = "mallopt is libc's")]

/// Gives every large block a mapping of its own.
///
/// The heap learns from the first large block that is freed to carve the next ones out of its
/// arenas, where tables that grow by doubling leave holes that nobody fills: some 20 MiB beside a
/// guest. A mapping of its own grows in place (`mremap`) and goes back to the host when it is freed.
pub(crate) fn keep_large_blocks_apart() {
    const LARGE: libc::c_int = 256 << 10;
    // SAFETY: sets a number in the heap's parameters; there is no other thread yet.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
}
