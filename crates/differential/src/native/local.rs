//! Gives the child the local descriptor table of [`crate::local`].

use crate::local::{ENTRIES, Kind, Local};

/// `struct user_desc` of `asm/ldt.h`.
#[repr(C)]
struct UserDescriptor {
    entry_number: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

/// `modify_ldt` with all bits of the descriptor.
const WRITE: i32 = 0x11;
/// Where the fields of `flags` begin.
const CONTENTS: u32 = 1;
const READ_EXEC_ONLY: u32 = 1 << 3;

impl UserDescriptor {
    fn new(index: u32, local: &Local) -> Self {
        let flags = match local.kind {
            Kind::Code => 2 << CONTENTS,
            Kind::Data => 0,
            Kind::ExpandDown => 1 << CONTENTS,
            Kind::ReadOnly => READ_EXEC_ONLY,
        };
        Self {
            entry_number: index,
            base: local.base.raw() as u32,
            limit: local.limit.into(),
            flags,
        }
    }
}

/// Installs the table; whether the kernel lets us.
#[expect(unsafe_code, reason = "modify_ldt has no wrapper in libc")]
pub(super) fn install() -> bool {
    ENTRIES.iter().enumerate().all(|(index, local)| {
        let descriptor = UserDescriptor::new(index as u32, local);
        let size = size_of::<UserDescriptor>();
        // SAFETY: the kernel reads the descriptor, which lives as long as the call.
        unsafe { libc::syscall(libc::SYS_modify_ldt, WRITE, &raw const descriptor, size) == 0 }
    })
}
