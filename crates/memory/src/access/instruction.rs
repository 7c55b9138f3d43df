//! The instructions that may fault, each with its entry in the fix-up table.
//!
//! An entry is two 32-bit distances, each from its own field: to the instruction that may fault, and
//! to where the handler goes on. The handler puts the signal's number into `EDX`, which is zero
//! otherwise; that is the whole protocol. The entries of all crates meet in one section of the
//! linked file, whose bounds the linker provides ([`table`]).

/// One entry of the fix-up table.
#[repr(C)]
pub(super) struct Fixup {
    fault: i32,
    landing: i32,
}

impl Fixup {
    /// The address of the instruction that may fault.
    pub(super) fn fault(&self) -> usize {
        (&raw const self.fault as usize).wrapping_add_signed(self.fault as isize)
    }

    /// Where to go on after a fault.
    pub(super) fn landing(&self) -> usize {
        (&raw const self.landing as usize).wrapping_add_signed(self.landing as isize)
    }
}

/// Assembles one instruction with its fix-up entry. `EDX` receives the signal's number.
macro_rules! tolerant {
    ($instruction:literal, $($operands:tt)*) => {
        core::arch::asm!(
            concat!("2: ", $instruction),
            "3:",
            ".pushsection fourfold_fixups, \"aR\", @progbits",
            ".balign 4",
            ".long 2b - .",
            ".long 3b - .",
            ".popsection",
            $($operands)*
        )
    };
}

/// The fix-up entries of this linked file.
pub(super) fn table() -> &'static [Fixup] {
    let start: *const Fixup;
    let end: *const Fixup;
    // SAFETY: the section holds nothing but `Fixup`s, four-byte aligned and read-only; the linker
    // defines the two symbols, and the empty contribution here makes sure that the section exists.
    unsafe {
        core::arch::asm!(
            ".pushsection fourfold_fixups, \"aR\", @progbits",
            ".balign 4",
            ".popsection",
            ".hidden __start_fourfold_fixups",
            ".hidden __stop_fourfold_fixups",
            "lea {start}, [rip + __start_fourfold_fixups]",
            "lea {end}, [rip + __stop_fourfold_fixups]",
            start = out(reg) start,
            end = out(reg) end,
            options(pure, nomem, nostack, preserves_flags),
        );
        core::slice::from_raw_parts(start, end.offset_from_unsigned(start))
    }
}

mod sealed {
    pub trait Sealed {}
}

/// An unsigned integer that one instruction loads or stores.
///
/// Implemented by `u8`, `u16`, `u32` and `u64` alone. An error is the signal's number.
pub trait Word: sealed::Sealed + Copy + Eq + core::fmt::LowerHex + Into<u64> {
    /// Loads from `address`.
    ///
    /// # Safety
    /// No Rust reference covers the memory there, or nothing is mapped there.
    #[doc(hidden)]
    unsafe fn load(address: u64) -> Result<Self, u32>;
    /// Stores to `address`.
    ///
    /// # Safety
    /// As for [`Word::load`].
    #[doc(hidden)]
    unsafe fn store(address: u64, value: Self) -> Result<(), u32>;
    /// Exchanges at `address` where it holds `expected`; returns what was there.
    ///
    /// # Safety
    /// As for [`Word::load`].
    #[doc(hidden)]
    unsafe fn compare_exchange(address: u64, expected: Self, new: Self) -> Result<Self, u32>;
}

macro_rules! word {
    ($type:ty, $class:ident, $accumulator:tt, $load:literal, $store:literal, $cmpxchg:literal) => {
        impl sealed::Sealed for $type {}

        impl Word for $type {
            #[inline(always)]
            unsafe fn load(address: u64) -> Result<Self, u32> {
                let value: $type;
                let signal: u32;
                // SAFETY: the caller's promise; a fault changes nothing but EDX.
                unsafe {
                    tolerant!(
                        $load,
                        v = out($class) value,
                        p = in(reg) address,
                        inout("edx") 0u32 => signal,
                        options(nostack, preserves_flags, readonly),
                    );
                }
                if signal == 0 { Ok(value) } else { Err(signal) }
            }

            #[inline(always)]
            unsafe fn store(address: u64, value: Self) -> Result<(), u32> {
                let signal: u32;
                // SAFETY: the caller's promise; a fault changes nothing but EDX.
                unsafe {
                    tolerant!(
                        $store,
                        v = in($class) value,
                        p = in(reg) address,
                        inout("edx") 0u32 => signal,
                        options(nostack, preserves_flags),
                    );
                }
                if signal == 0 { Ok(()) } else { Err(signal) }
            }

            #[inline(always)]
            unsafe fn compare_exchange(
                address: u64,
                expected: Self,
                new: Self,
            ) -> Result<Self, u32> {
                let found: $type;
                let signal: u32;
                // SAFETY: the caller's promise; a fault changes nothing but EDX and flags.
                unsafe {
                    tolerant!(
                        $cmpxchg,
                        v = in($class) new,
                        p = in(reg) address,
                        inout($accumulator) expected => found,
                        inout("edx") 0u32 => signal,
                        options(nostack),
                    );
                }
                if signal == 0 { Ok(found) } else { Err(signal) }
            }
        }
    };
}

word!(
    u8,
    reg_byte,
    "al",
    "mov {v}, byte ptr [{p}]",
    "mov byte ptr [{p}], {v}",
    "lock cmpxchg byte ptr [{p}], {v}"
);
word!(
    u16,
    reg,
    "ax",
    "mov {v:x}, word ptr [{p}]",
    "mov word ptr [{p}], {v:x}",
    "lock cmpxchg word ptr [{p}], {v:x}"
);
word!(
    u32,
    reg,
    "eax",
    "mov {v:e}, dword ptr [{p}]",
    "mov dword ptr [{p}], {v:e}",
    "lock cmpxchg dword ptr [{p}], {v:e}"
);
word!(
    u64,
    reg,
    "rax",
    "mov {v}, qword ptr [{p}]",
    "mov qword ptr [{p}], {v}",
    "lock cmpxchg qword ptr [{p}], {v}"
);

/// Copies `len` bytes. Returns how many were left where it faulted, and the signal's number.
///
/// # Safety
/// Each side is either memory that the caller owns for this access or memory that no Rust reference
/// covers; a fault is tolerated on either.
#[inline]
pub(super) unsafe fn copy_bytes(to: u64, from: u64, len: u64) -> Result<(), (u64, u32)> {
    let left: u64;
    let signal: u32;
    // SAFETY: the caller's promise. An interrupted string instruction leaves RSI, RDI and RCX at the
    // byte that faulted; the direction flag is clear on entry, as the ABI says.
    unsafe {
        tolerant!(
            "rep movsb",
            inout("rdi") to => _,
            inout("rsi") from => _,
            inout("rcx") len => left,
            inout("edx") 0u32 => signal,
            options(nostack, preserves_flags),
        );
    }
    if signal == 0 {
        Ok(())
    } else {
        Err((left, signal))
    }
}

/// Sets `len` bytes. Returns how many were left where it faulted, and the signal's number.
///
/// # Safety
/// As for [`Word::store`].
#[inline]
pub(super) unsafe fn fill_bytes(to: u64, value: u8, len: u64) -> Result<(), (u64, u32)> {
    let left: u64;
    let signal: u32;
    // SAFETY: as for `copy_bytes`.
    unsafe {
        tolerant!(
            "rep stosb",
            inout("rdi") to => _,
            inout("rcx") len => left,
            in("al") value,
            inout("edx") 0u32 => signal,
            options(nostack, preserves_flags),
        );
    }
    if signal == 0 {
        Ok(())
    } else {
        Err((left, signal))
    }
}
