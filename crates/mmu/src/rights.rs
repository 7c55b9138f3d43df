//! What the guest's tables allow (SDM 3A, 5.6).

use bitflags::bitflags;
use x86::page_fault::PageFaultCode;

use crate::access::{Access, AccessKind, Privilege};
use crate::registers::Regime;

bitflags! {
    /// Rights that every entry on the way granted.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Rights: u8 {
        /// R/W set in all.
        const WRITE = 1 << 0;
        /// U/S set in all.
        const USER = 1 << 1;
        /// NX clear in all.
        const EXECUTE = 1 << 2;
    }
}

impl Rights {
    /// What one entry grants. Where NX is not in force, bit 63 is reserved and never gets here.
    pub fn of_entry(pte: u64) -> Self {
        let write_user = (pte >> 1) as u8 & 0b11;
        let execute = (!(pte >> 63) as u8 & 1) << 2;
        Self::from_bits_retain(write_user | execute)
    }
}

/// Checks `access` against rights and protection key: the error code's bits where they forbid it.
pub(crate) fn check(
    regime: &Regime,
    rights: Rights,
    pkey: u8,
    access: Access,
) -> Result<(), PageFaultCode> {
    let key_forbids = protection_key_forbids(regime, rights, pkey, access);
    if !key_forbids && rights_allow(regime, rights, access) {
        return Ok(());
    }
    let mut code = PageFaultCode::PRESENT;
    code.set(PageFaultCode::PROTECTION_KEY, key_forbids);
    Err(code)
}

/// Whether the same privilege may do `kind` as well.
pub(crate) fn allows(
    regime: &Regime,
    rights: Rights,
    pkey: u8,
    privilege: Privilege,
    kind: AccessKind,
) -> bool {
    check(regime, rights, pkey, Access::new(kind, privilege)).is_ok()
}

fn rights_allow(regime: &Regime, rights: Rights, access: Access) -> bool {
    let user_page = rights.contains(Rights::USER);
    if access.is_user() {
        return user_page
            && match access.kind {
                AccessKind::Read => true,
                AccessKind::Write => rights.contains(Rights::WRITE),
                AccessKind::Execute => rights.contains(Rights::EXECUTE),
            };
    }
    let smap = regime.smap && user_page && access.privilege != Privilege::SupervisorAcSet;
    match access.kind {
        AccessKind::Read => !smap,
        AccessKind::Write => !smap && (rights.contains(Rights::WRITE) || !regime.write_protect),
        AccessKind::Execute => rights.contains(Rights::EXECUTE) && !(regime.smep && user_page),
    }
}

/// Protection keys for user pages (SDM 3A, 5.6.2): data accesses of any privilege.
fn protection_key_forbids(regime: &Regime, rights: Rights, pkey: u8, access: Access) -> bool {
    if !regime.protection_keys || access.is_fetch() || !rights.contains(Rights::USER) {
        return false;
    }
    let bits = regime.pkru >> (2 * u32::from(pkey & 0xf));
    let access_disabled = bits & 1 != 0;
    let write_disabled = bits & 2 != 0;
    access_disabled
        || (write_disabled && access.is_write() && (access.is_user() || regime.write_protect))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registers::{PagingFeatures, PagingRegisters};
    use x86::control::{Cr0, Cr4, Efer};

    fn regime(cr0: Cr0, cr4: Cr4) -> Regime {
        let registers = PagingRegisters {
            cr0: (cr0 | Cr0::PG | Cr0::PE).bits(),
            cr4: (cr4 | Cr4::PAE).bits(),
            efer: (Efer::LME | Efer::NXE).bits(),
            pkru: 0b10_01_00, // key 1: no access; key 2: no writes
            ..PagingRegisters::default()
        };
        Regime::new(&registers, PagingFeatures::default())
    }

    fn ok(regime: &Regime, rights: Rights, pkey: u8, kind: AccessKind, who: Privilege) -> bool {
        check(regime, rights, pkey, Access::new(kind, who)).is_ok()
    }

    #[test]
    fn write_protect_binds_the_supervisor_only_when_set() {
        use AccessKind::Write;
        let off = regime(Cr0::empty(), Cr4::empty());
        let on = regime(Cr0::WP, Cr4::empty());
        assert!(ok(&off, Rights::USER, 0, Write, Privilege::Supervisor));
        assert!(!ok(&off, Rights::USER, 0, Write, Privilege::User));
        assert!(!ok(&on, Rights::USER, 0, Write, Privilege::Supervisor));
    }

    #[test]
    fn smap_heeds_ac_but_not_for_implicit_accesses() {
        use AccessKind::Read;
        let smap = regime(Cr0::empty(), Cr4::SMAP);
        let all = Rights::all();
        assert!(!ok(&smap, all, 0, Read, Privilege::Supervisor));
        assert!(ok(&smap, all, 0, Read, Privilege::SupervisorAcSet));
        assert!(!ok(&smap, all, 0, Read, Privilege::Implicit));
        assert!(ok(
            &smap,
            all - Rights::USER,
            0,
            Read,
            Privilege::Supervisor
        ));
    }

    #[test]
    fn smep_and_nx() {
        use AccessKind::Execute;
        let smep = regime(Cr0::empty(), Cr4::SMEP);
        assert!(!ok(&smep, Rights::all(), 0, Execute, Privilege::Supervisor));
        assert!(ok(&smep, Rights::all(), 0, Execute, Privilege::User));
        assert!(!ok(&smep, Rights::USER, 0, Execute, Privilege::User));
    }

    #[test]
    fn protection_keys() {
        use AccessKind::{Execute, Read, Write};
        let keys = regime(Cr0::empty(), Cr4::PKE);
        let wp = regime(Cr0::WP, Cr4::PKE);
        let all = Rights::all();
        assert!(!ok(&keys, all, 1, Read, Privilege::Supervisor));
        assert!(ok(&keys, all, 1, Execute, Privilege::User));
        assert!(ok(&keys, all, 2, Read, Privilege::User));
        assert!(!ok(&keys, all, 2, Write, Privilege::User));
        assert!(ok(&keys, all, 2, Write, Privilege::Supervisor));
        assert!(!ok(&wp, all, 2, Write, Privilege::Supervisor));
        assert!(ok(&wp, all - Rights::USER, 1, Write, Privilege::Supervisor));
        let denied = check(&wp, Rights::USER, 2, Access::new(Write, Privilege::User));
        assert_eq!(
            denied,
            Err(PageFaultCode::PRESENT | PageFaultCode::PROTECTION_KEY),
            "the key is told although R/W forbids it, too"
        );
    }
}
