//! The memory that translated code addresses off the host's `rsp`.
//!
//! ```text
//!   mapping:  | guard page | stack for signal frames, 256 KiB | Frame .......... |
//!                                                      rsp ----^ (76 bytes into it)
//! ```
//!
//! While guest code runs, `rsp` points into the [`Frame`], so that everything hot is `[rsp + disp]`
//! with a short displacement, and signals that arrive push below it. The first [`BIAS`] bytes of the
//! frame lie below `rsp`, within the 128-byte red zone of the ABI, which signal delivery leaves
//! alone.
//!
//! The pointer's own bits are used too: the mapping is placed so that the low 16 bits of `rsp` are
//! [`RSP_LOW`], which is a valid `BEXTR` control word (start 12, length 14) and, in its low six bits,
//! a shift count of 12. One instruction thus takes the TLB index or the page number out of an address
//! with no register spent on a constant.

#![expect(
    unsafe_code,
    reason = "maps the frame at an address with prescribed low bits, and hands out references to it"
)]

use core::ffi::c_void;
use core::sync::atomic::AtomicU32;
use std::io;
use std::ptr::NonNull;

use crate::fpu::{FpuState, Pointers};
use crate::translate::STREAMS;
use crate::{CpuState, Segment};

/// How far `rsp` points into the frame.
pub(crate) const BIAS: usize = 76;
/// The low 16 bits of `rsp` in guest code.
pub(crate) const RSP_LOW: usize = 0x0e0c;
/// Entries of the inline TLB; the length in [`RSP_LOW`].
pub(crate) const TLB_ENTRIES: usize = 16384;
/// The bits of an address that select an entry of the inline TLB.
pub(crate) const TLB_MASK: u64 = (TLB_ENTRIES as u64 - 1) << 12;
/// Entries of the cache of indirect jumps.
pub(crate) const JUMP_ENTRIES: usize = 4096;
/// The bits of an address that select an entry of the cache of indirect jumps.
pub(crate) const JUMP_MASK: u64 = 0x1ffe;
/// Entries of the instruction TLB.
pub(crate) const XTLB_ENTRIES: usize = 1024;
/// Size of one bounce buffer.
pub(crate) const BOUNCE_SIZE: usize = 1024;
/// Number of bounce buffers: operands that one instruction can have in memory.
pub(crate) const BOUNCE_SLOTS: usize = 4;

const STACK_SIZE: usize = 256 * 1024;
const PAGE: usize = 4096;
const ALIGN: usize = 64 * 1024;

/// What is kept apart for each kind of privilege: CPL 3, CPL 0 to 2 with SMAP in force, and without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum View {
    User = 0,
    Supervisor = 1,
    SupervisorAcSet = 2,
}

impl View {
    pub(crate) const ALL: [Self; 3] = [Self::User, Self::Supervisor, Self::SupervisorAcSet];
}

/// One inline TLB. Tags are negated page numbers, so that adding the page number of an access gives
/// zero on a hit, with flags or without.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct InlineTlb {
    pub(crate) read: [u64; TLB_ENTRIES],
    pub(crate) write: [u64; TLB_ENTRIES],
    /// Host address minus guest address.
    pub(crate) addend: [u64; TLB_ENTRIES],
}

/// A trap of the host in translated code.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HostTrap {
    pub(crate) pc: u64,
    /// The host's exception vector.
    pub(crate) vector: u64,
    pub(crate) address: u64,
    /// The host's rcx: a count, in string instructions.
    pub(crate) rcx: u64,
}

/// Of which instruction the x87 pointers tell.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct X87 {
    /// One more than the index of a [`crate::translate::X87Mark`], whose address and opcode are not in
    /// `pointers` yet; 0 if they are.
    pub(crate) mark: u32,
    /// The segment of the data pointer, by its number in the encoding, where `pointers` hasn't its
    /// selector yet; else [`X87::SEGMENT_KNOWN`].
    pub(crate) segment: u8,
    /// The data pointer is always current.
    pub(crate) pointers: Pointers,
}

impl X87 {
    pub(crate) const SEGMENT_KNOWN: u8 = 0xff;
}

impl Default for X87 {
    fn default() -> Self {
        Self {
            mark: 0,
            segment: Self::SEGMENT_KNOWN,
            pointers: Pointers::default(),
        }
    }
}

/// What system instructions that run inline look at, and what they leave behind.
///
/// A field that forbids is zero where the instruction may go on by itself; then translated code needs
/// one `JRCXZ`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fast {
    /// An event may be due as soon as interrupts are allowed.
    pub(crate) waits: u32,
    /// The [`View`] in which translated code runs: some instructions change it.
    pub(crate) view: u32,
    /// The mode of the tables of each view, or [`NO_MODE`].
    pub(crate) modes: [u32; 3],
    /// `RDTSC`, at CPL 3 and inside.
    pub(crate) no_tsc: [u32; 2],
    /// `RDTSCP`, the same.
    pub(crate) no_tscp: [u32; 2],
    pub(crate) no_fsgsbase: u32,
    /// `SYSCALL` and `SYSRET`.
    pub(crate) no_syscall: u32,
    pub(crate) no_smap: u32,
    /// RIP behind the last `STI` that began a shadow, until somebody looks at it.
    pub(crate) sti_rip: u64,
    /// Flags that `SYSCALL` leaves, and those that `SYSRET` takes.
    pub(crate) syscall_keeps: u64,
    pub(crate) sysret_takes: u64,
    /// TF.
    pub(crate) trap_flag: u64,
    /// CS and SS after `SYSCALL`, and after `SYSRET` to 64-bit mode.
    pub(crate) kernel: [Segment; 2],
    pub(crate) user: [Segment; 2],
}

/// No translation has this mode.
pub(crate) const NO_MODE: u32 = u32::MAX;

/// The guest addresses for which a stream of a loop's accesses knows the addend.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) start: u64,
    /// Offsets from the start below this are in it, with all that the stream touches from there on.
    pub(crate) limit: u64,
    /// The same for several rounds of the loop together.
    pub(crate) common_limit: u64,
}

/// What the loop that runs knows: see `translate::looping`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Windows {
    pub(crate) streams: [Window; STREAMS],
    /// Misses until the engine is asked for a wider window.
    pub(crate) widen: i32,
    /// The carry that was there before the loop, where it is put aside.
    pub(crate) carry: u8,
}

/// See the module.
#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct Frame {
    /// Zero asks translated code to leave at its next loop head; else it is 1.
    pub(crate) go: AtomicU32,
    /// DF of RFLAGS while guest code runs.
    pub(crate) df: u8,
    _pad: u8,
    /// Arithmetic flags between host code runs: OF in bit 0, the `LAHF` byte in bits 8 to 15.
    pub(crate) arith: u16,
    /// Scratch registers across an exit.
    pub(crate) t0: u64,
    pub(crate) t1: u64,
    /// Scratch for sequences that touch memory twice.
    pub(crate) tmp: [u64; 3],
    /// Where [`super::enter`] jumps to.
    pub(crate) target: u64,
    pub(crate) exit: u64,
    /// The architectural state; its general registers 9, 10, 11 and 15 live here at all times.
    pub(crate) state: CpuState,
    pub(crate) host_rsp: u64,
    pub(crate) guest_mxcsr: u32,
    pub(crate) host_mxcsr: u32,
    pub(crate) host_fcw: u16,
    /// Arithmetic flags like `arith`, where translated code put them aside.
    pub(crate) aside: u16,
    pub(crate) x87: X87,
    /// The site of the indirect branch that was taken last, and what its return address replaced.
    pub(crate) branch: u32,
    pub(crate) overwritten: u64,
    /// What a signal handler saw; see `engine::signals`.
    pub(crate) fault: HostTrap,
    /// YMM0 to YMM15 outside translated code.
    pub(crate) vectors: [[u8; 32]; 16],
    /// The XSAVE image; current only outside of [`crate::Vcpu::run`] or after a synchronisation.
    pub(crate) fpu: FpuState,
    pub(crate) tlb: [InlineTlb; 3],
    /// Identity of the code page that an address leads to: see `code::pages`.
    pub(crate) xtlb: [[u32; XTLB_ENTRIES]; 3],
    pub(crate) jumps: [[u64; JUMP_ENTRIES]; 3],
    pub(crate) bounce: [[u8; BOUNCE_SIZE]; BOUNCE_SLOTS],
    pub(crate) fast: Fast,
    pub(crate) windows: Windows,
}

/// The displacement off `rsp` of a field of [`Frame`], given as its offset.
pub(crate) const fn disp(offset: usize) -> i32 {
    offset as i32 - BIAS as i32
}

/// The displacement off `rsp` of a field of the [`Frame`].
macro_rules! frame_disp {
    ($($field:tt)+) => {
        $crate::engine::frame::disp(core::mem::offset_of!($crate::engine::frame::Frame, $($field)+))
    };
}
pub(crate) use frame_disp;

/// The mapping that holds a [`Frame`].
#[derive(Debug)]
pub(crate) struct FrameMapping {
    mapping: NonNull<c_void>,
    length: usize,
    frame: NonNull<Frame>,
}

// SAFETY: the mapping belongs to the value, not to a thread; shared access is only to `go`, which is
// atomic.
unsafe impl Send for FrameMapping {}
// SAFETY: as above.
unsafe impl Sync for FrameMapping {}

impl FrameMapping {
    /// Maps a frame; all bytes are zero.
    pub(crate) fn new() -> io::Result<Self> {
        let length = PAGE + STACK_SIZE + 2 * ALIGN + size_of::<Frame>().next_multiple_of(PAGE);
        // SAFETY: a fresh anonymous mapping, no address prescribed.
        let mapping = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapping == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the first page of the mapping that was just made.
        unsafe { libc::mprotect(mapping, PAGE, libc::PROT_NONE) };
        let lowest = mapping as usize + PAGE + STACK_SIZE;
        let address = lowest.next_multiple_of(ALIGN) + RSP_LOW - BIAS;
        Ok(Self {
            mapping: NonNull::new(mapping).ok_or(io::ErrorKind::OutOfMemory)?,
            length,
            frame: NonNull::new(address as *mut Frame).ok_or(io::ErrorKind::OutOfMemory)?,
        })
    }

    /// The frame. Only the vCPU's thread may make a reference to more than `go` of it.
    pub(crate) fn frame(&self) -> NonNull<Frame> {
        self.frame
    }

    /// The word by which other threads ask for attention.
    pub(crate) fn go(&self) -> &AtomicU32 {
        // SAFETY: the mapping lives as long as `self`, and `go` is only ever accessed atomically.
        unsafe { &(*self.frame.as_ptr()).go }
    }
}

impl Drop for FrameMapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; no reference outlives `self`.
        unsafe { libc::munmap(self.mapping.as_ptr(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rsp_is_a_control_word() {
        let mapping = FrameMapping::new().unwrap();
        let rsp = mapping.frame().as_ptr() as usize + BIAS;
        assert_eq!(rsp & 0xffff, RSP_LOW);
        assert_eq!(rsp & 0x3f, 12);
        assert_eq!(1 << (rsp >> 8 & 0xff), TLB_ENTRIES);
        assert!(frame_disp!(state) <= 0 && BIAS < 128);
        assert_eq!(JUMP_MASK.count_ones(), JUMP_ENTRIES.trailing_zeros());
    }
}
