//! Forms in which the translating CPU is known to differ from the physical one, and in what.
//!
//! The gate fails on any other. A line leaves this list with the change that makes it untrue.

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
