//! Forms in which the translating CPU is known to differ from the physical one, and in what.
//!
//! The gate fails on any other. A line leaves this list with the change that makes it untrue.

use crate::report::Divergence;

/// Beginnings of iced-x86's names, and what differs.
const KNOWN: &[(&str, &str)] = &[
    (
        "Call_rm",
        "the #GP of a target that is not canonical comes after the push",
    ),
    (
        "Jmp_rm",
        "the #GP of a target that is not canonical names the target",
    ),
    (
        "Ret",
        "the #GP of a target that is not canonical names the target; order of far returns",
    ),
    ("Iret", "which of several faults is found first"),
    ("Enter", "which access of a nested ENTER faults first"),
    ("Ins", "INS with a count of zero does not check the port"),
    ("Outs", "OUTS with a count of zero does not check the port"),
    ("Maskmovq", "x87 tags after a MASKMOVQ that faults"),
    ("Aa", "flags that the manuals leave undefined"),
    ("Da", "flags that the manuals leave undefined"),
    (
        "Pushd_",
        "the upper half of what PUSH of a segment register writes: vendors differ",
    ),
    ("Frstor", "which byte of the state faults first"),
    ("Fxrstor", "which byte of the state faults first"),
    ("VEX_Vmaskmovdqu", "which byte faults first"),
    ("Fnstenv", "x87 pointers in memory"),
    ("Fnsave", "x87 pointers in memory"),
    ("Fxsave", "x87 pointers in memory"),
    ("Xsave", "x87 pointers in memory"),
    ("VEX_Vgather", "single-stepped gathers that fault halfway"),
    ("VEX_Vpgather", "single-stepped gathers that fault halfway"),
];

/// What is known to differ in this form, if anything.
pub fn difference(form: &str) -> Option<&'static str> {
    let line = KNOWN.iter().find(|(prefix, _)| form.starts_with(prefix));
    line.map(|(_, reason)| *reason)
}

/// Whether a program differs in a known way: it jumps or returns to an address that is not canonical,
/// and the `#GP` names the target instead of the branch.
pub fn is_known_program(divergence: &Divergence) -> bool {
    let rip = divergence.differences.iter().find(|d| d.place == "rip");
    let found = rip.and_then(|d| u64::from_str_radix(d.found.trim_start_matches("0x"), 16).ok());
    let canonical = |address: u64| (address as i64) << 16 >> 16 == address as i64;
    divergence.expected.ending.vector == 13 && found.is_some_and(|rip| !canonical(rip))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_names_a_family() {
        assert!(difference("Retnq_imm16").is_some());
        assert!(difference("Add_rm64_r64").is_none());
    }
}
