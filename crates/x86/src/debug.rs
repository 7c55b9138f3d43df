//! Debug registers (SDM 3B, 19.2).

/// DR6: breakpoint conditions B0 to B3.
pub const DR6_B: u64 = 0xf;
/// DR6: access to a debug register while DR7.GD is set.
pub const DR6_BD: u64 = 1 << 13;
/// DR6: single step.
pub const DR6_BS: u64 = 1 << 14;
/// DR6: task switch to a TSS with the T bit.
pub const DR6_BT: u64 = 1 << 15;
/// DR6: debug exception inside a transactional region, inverted.
pub const DR6_RTM: u64 = 1 << 16;
/// DR6: bits that read as one (RTM among them, where transactions don't exist).
pub const DR6_FIXED_1: u64 = 0xffff_0ff0;
/// DR6: bits that can be written.
pub const DR6_VOLATILE: u64 = DR6_B | DR6_BD | DR6_BS | DR6_BT;

/// DR7: the bit that reads as one.
pub const DR7_FIXED_1: u64 = 1 << 10;
/// DR7: bits that can be written (without RTM).
pub const DR7_VOLATILE: u64 = 0xffff_23ff;
/// DR7: any breakpoint enabled, locally or globally.
pub const DR7_ENABLE_ALL: u64 = 0xff;
/// DR7: the local enables, which a task switch clears.
pub const DR7_LOCAL_ENABLES: u64 = 0x155;
/// DR7: general detect: the next access to a debug register faults.
pub const DR7_GD: u64 = 1 << 13;

/// What a breakpoint waits for (DR7.R/W).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The instruction at the address is about to run.
    Execute,
    /// A write to data.
    Write,
    /// A port access (with CR4.DE).
    Io,
    /// A read or write of data.
    ReadWrite,
}

/// One breakpoint of DR0 to DR3 with its fields in DR7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breakpoint {
    /// Enabled locally or globally.
    pub enabled: bool,
    /// What it waits for.
    pub condition: Condition,
    /// 1, 2, 4 or 8 bytes.
    pub len: u64,
}

/// Breakpoint `n` (0 to 3) as DR7 describes it.
pub const fn breakpoint(dr7: u64, n: u32) -> Breakpoint {
    let field = dr7 >> (16 + 4 * n);
    Breakpoint {
        enabled: dr7 >> (2 * n) & 3 != 0,
        condition: match field & 3 {
            0 => Condition::Execute,
            1 => Condition::Write,
            2 => Condition::Io,
            _ => Condition::ReadWrite,
        },
        len: match field >> 2 & 3 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_dr7() {
        let b = breakpoint(0x00d0_0400 | 1 << 2, 1);
        assert!(b.enabled);
        assert_eq!((b.condition, b.len), (Condition::Write, 4));
        assert!(!breakpoint(1 << 2, 0).enabled);
    }
}
