//! RFLAGS (SDM 1, 3.4.3).

/// Carry.
pub const CF: u64 = 1 << 0;
/// Always one.
pub const FIXED: u64 = 1 << 1;
/// Parity.
pub const PF: u64 = 1 << 2;
/// Auxiliary carry.
pub const AF: u64 = 1 << 4;
/// Zero.
pub const ZF: u64 = 1 << 6;
/// Sign.
pub const SF: u64 = 1 << 7;
/// Single step.
pub const TF: u64 = 1 << 8;
/// Maskable interrupts are taken.
pub const IF: u64 = 1 << 9;
/// String instructions go down.
pub const DF: u64 = 1 << 10;
/// Overflow.
pub const OF: u64 = 1 << 11;
/// I/O privilege level, two bits.
pub const IOPL: u64 = 3 << 12;
/// Position of [`IOPL`].
pub const IOPL_SHIFT: u32 = 12;
/// Nested task.
pub const NT: u64 = 1 << 14;
/// Resume: instruction breakpoints are off for one instruction.
pub const RF: u64 = 1 << 16;
/// Virtual-8086 mode.
pub const VM: u64 = 1 << 17;
/// Alignment check; with SMAP, permission to touch user pages.
pub const AC: u64 = 1 << 18;
/// Virtual interrupt flag.
pub const VIF: u64 = 1 << 19;
/// Virtual interrupt pending.
pub const VIP: u64 = 1 << 20;
/// `CPUID` is there.
pub const ID: u64 = 1 << 21;

/// The flags that arithmetic sets.
pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
/// Every flag that exists, without [`FIXED`].
pub const ALL: u64 = ARITHMETIC | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;

/// PF, ZF and SF of a result of so many bits (8 to 64): the flags of a logical operation, which clears
/// the others (SDM 1, 3.4.3.1; AF, which the manual leaves undefined, is clear in silicon).
pub fn of_result(value: u64, bits: u32) -> u64 {
    let value = value & low(bits);
    let parity = (value as u8).count_ones().is_multiple_of(2);
    flag(parity, PF) | flag(value == 0, ZF) | flag(value >> (bits - 1) != 0, SF)
}

/// The arithmetic flags of `left + right`, of so many bits.
pub fn of_sum(left: u64, right: u64, bits: u32) -> u64 {
    let (left, right) = (left & low(bits), right & low(bits));
    let value = left.wrapping_add(right) & low(bits);
    let overflow = (left ^ value) & (right ^ value);
    of_result(value, bits)
        | (left ^ right ^ value) & AF
        | flag(overflow >> (bits - 1) != 0, OF)
        | flag(value < left, CF)
}

/// The arithmetic flags of `left - right`, of so many bits.
pub fn of_difference(left: u64, right: u64, bits: u32) -> u64 {
    let (left, right) = (left & low(bits), right & low(bits));
    let value = left.wrapping_sub(right) & low(bits);
    let overflow = (left ^ right) & (left ^ value);
    of_result(value, bits)
        | (left ^ right ^ value) & AF
        | flag(overflow >> (bits - 1) != 0, OF)
        | flag(left < right, CF)
}

fn low(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

fn flag(set: bool, flag: u64) -> u64 {
    if set { flag } else { 0 }
}
