//! Every ioctl and every capability of KVM on x86, in one table each.
//!
//! Dispatch ([`find`]), `KVM_CHECK_EXTENSION` ([`capability`]), the documentation
//! (`docs/ioctls.md`, written by `cargo xtask ioctls`) and the check against the installed
//! `linux/kvm.h` all read [`IOCTLS`] and [`CAPABILITIES`], so they can't disagree.
//!
//! An ioctl that is not there answers as a kernel built without it does: `EINVAL` on `/dev/kvm` and
//! on vCPUs, `ENOTTY` on VMs; `KVM_CHECK_EXTENSION` gives 0 for its capability.

mod capabilities;
mod document;
mod ioctls;
pub mod number;

use std::sync::{Arc, OnceLock};

pub use capabilities::{CAPABILITIES, Capability, Value, capability};
pub(crate) use capabilities::{
    EXIT_HYPERCALLS, MAX_IRQ_ROUTES, MAX_MCE_BANKS, MAX_VCPU_IDS, MAX_VCPUS, QUIRKS, SYNC_REGS,
};
pub use document::document;
pub use ioctls::{FOREIGN_PREFIXES, IOCTLS, foreign};

use crate::argument::Argument;
use crate::device::Device;
use crate::errno::Errno;
use crate::system::System;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// What an ioctl gives: a number that is not negative, or an errno.
pub type Answer = Result<i64, Errno>;

/// The file descriptor that an ioctl is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Level {
    System,
    Vm,
    Vcpu,
    Device,
}

impl Level {
    /// The errno for a number that the file descriptor does not know.
    pub fn unknown(self) -> Errno {
        match self {
            Level::System | Level::Vcpu => Errno::EINVAL,
            Level::Vm | Level::Device => Errno::ENOTTY,
        }
    }
}

/// The function behind an ioctl.
#[derive(Clone, Copy)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Handler {
    System(fn(&Arc<System>, Argument) -> Answer),
    Vm(fn(&Arc<Vm>, Argument) -> Answer),
    Vcpu(fn(&Arc<Vcpu>, Argument) -> Answer),
    Device(fn(&Arc<Device>, Argument) -> Answer),
    /// Not there: a file descriptor of this level does not know it.
    None(Level),
}

impl Handler {
    fn level(self) -> Level {
        match self {
            Handler::System(_) => Level::System,
            Handler::Vm(_) => Level::Vm,
            Handler::Vcpu(_) => Level::Vcpu,
            Handler::Device(_) => Level::Device,
            Handler::None(level) => level,
        }
    }
}

/// How much of an ioctl or a capability is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// As in the kernel.
    Full,
    /// As in a kernel that was built or set up so; the text says how.
    As(&'static str),
    /// Some of it; the text says what is missing.
    Partial(&'static str),
    /// None of it; the text says why.
    Absent(&'static str),
}

/// One row: an ioctl.
pub struct Ioctl {
    /// Its name in `linux/kvm.h`.
    pub name: &'static str,
    /// Its number with direction and size.
    pub request: u32,
    /// The structure that its argument points to; empty for a number or nothing.
    pub structure: &'static str,
    /// The capability that announces it, where there is one.
    pub capability: &'static str,
    /// How much of it is there.
    pub status: Status,
    /// What runs.
    pub handler: Handler,
}

impl Ioctl {
    /// The file descriptor that it is for.
    pub fn level(&self) -> Level {
        self.handler.level()
    }
}

/// The row for a number, on a file descriptor of this level.
pub fn find(level: Level, request: u32) -> Option<&'static Ioctl> {
    static SORTED: OnceLock<Vec<&'static Ioctl>> = OnceLock::new();
    let rows = SORTED.get_or_init(|| {
        let mut rows: Vec<_> = IOCTLS.iter().collect();
        rows.sort_by_key(|row| (row.level(), row.request));
        rows
    });
    let key = (level, request);
    let index = rows
        .binary_search_by_key(&key, |row| (row.level(), row.request))
        .ok()?;
    Some(rows[index])
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_number_twice_on_one_level() {
        let mut seen = HashSet::new();
        for row in IOCTLS {
            assert!(
                seen.insert((row.level(), row.request)),
                "{} has the number of another row",
                row.name
            );
        }
    }

    #[test]
    fn the_status_agrees_with_the_handler() {
        for row in IOCTLS {
            let there = !matches!(row.handler, Handler::None(_));
            let absent = matches!(row.status, Status::Absent(_));
            assert!(there || absent, "{} has no handler", row.name);
        }
    }

    #[test]
    fn numbers_are_linux() {
        let request = |name| IOCTLS.iter().find(|r| r.name == name).unwrap().request;
        assert_eq!(request("KVM_GET_API_VERSION"), 0xae00);
        assert_eq!(request("KVM_GET_REGS"), 0x8090_ae81);
        assert_eq!(request("KVM_SET_USER_MEMORY_REGION"), 0x4020_ae46);
        assert_eq!(request("KVM_GET_MSRS"), 0xc008_ae88);
        assert_eq!(request("KVM_SET_SREGS2"), 0x4140_aecd);
    }

    #[test]
    fn every_row_is_found() {
        for row in IOCTLS {
            assert_eq!(find(row.level(), row.request).unwrap().name, row.name);
        }
        assert!(find(Level::Vm, 0xdead_beef).is_none());
    }
}
