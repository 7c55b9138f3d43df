//! The third argument of `ioctl`: a number, or a pointer of the calling program.
//!
//! The program may pass any pointer. A bad one must give `EFAULT`, as from the kernel's
//! `copy_from_user`, so every access is one of [`memory::access`], which answers instead of dying of
//! a signal.
#![expect(
    unsafe_code,
    reason = "copies plain C structures from and to the calling program's memory"
)]

use std::ffi::c_void;
use std::mem::MaybeUninit;

use addr::Hva;
use kvm_bindings as kb;
use memory::access;

use crate::errno::Errno;

/// A C structure that any pattern of bytes is a value of.
///
/// # Safety
/// `repr(C)`, made of integers and arrays (and unions) of integers only.
pub unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($t:ty),* $(,)?) => {
        $(
            // SAFETY: a C structure of integers, arrays and unions of them.
            unsafe impl Plain for $t {}
        )*
    };
}

plain!(
    u8,
    u32,
    u64,
    i32,
    kb::kvm_clear_dirty_log,
    kb::kvm_clock_data,
    kb::kvm_coalesced_mmio_zone,
    kb::kvm_cpuid_entry,
    kb::kvm_cpuid_entry2,
    kb::kvm_create_device,
    kb::kvm_create_guest_memfd,
    kb::kvm_debugregs,
    kb::kvm_device_attr,
    kb::kvm_dirty_log,
    kb::kvm_enable_cap,
    kb::kvm_enc_region,
    kb::kvm_fpu,
    kb::kvm_guest_debug,
    kb::kvm_interrupt,
    kb::kvm_ioeventfd,
    kb::kvm_irq_level,
    kb::kvm_irq_routing_entry,
    kb::kvm_irqchip,
    kb::kvm_irqfd,
    kb::kvm_lapic_state,
    kb::kvm_memory_attributes,
    kb::kvm_mp_state,
    kb::kvm_msi,
    kb::kvm_msr_entry,
    kb::kvm_msr_filter,
    kb::kvm_pit_config,
    kb::kvm_pit_state,
    kb::kvm_pit_state2,
    kb::kvm_pre_fault_memory,
    kb::kvm_regs,
    kb::kvm_reinject_control,
    kb::kvm_sregs,
    kb::kvm_sregs2,
    kb::kvm_tpr_access_ctl,
    kb::kvm_translation,
    kb::kvm_userspace_memory_region,
    kb::kvm_userspace_memory_region2,
    kb::kvm_vapic_addr,
    kb::kvm_vcpu_events,
    kb::kvm_x86_mce,
    kb::kvm_xcrs,
);

/// The argument as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Argument(u64);

impl Argument {
    /// The argument with this value.
    pub fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// A pointer to a value of this program.
    pub fn to<T>(value: &mut T) -> Self {
        Self(std::ptr::from_mut(value) as u64)
    }

    /// Its value as a number.
    pub fn value(self) -> u64 {
        self.0
    }

    /// A pointer `bytes` further on.
    #[must_use]
    pub fn offset(self, bytes: usize) -> Self {
        Self(self.0.wrapping_add(bytes as u64))
    }

    /// Copies in what the pointer points to.
    pub fn read<T: Plain>(self) -> Result<T, Errno> {
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: `value` has room for its own size; it is fully written where `Ok` comes back, and
        // any bytes are a `T` (`Plain`).
        unsafe {
            copy_in(value.as_mut_ptr().cast(), self.0, size_of::<T>())?;
            Ok(value.assume_init())
        }
    }

    /// Copies `value` out to where the pointer points.
    pub fn write<T: Plain>(self, value: &T) -> Result<(), Errno> {
        // SAFETY: `value` is readable for its own size.
        unsafe { copy_out(self.0, std::ptr::from_ref(value).cast(), size_of::<T>()) }
    }

    /// Copies in `count` values.
    pub fn read_slice<T: Plain>(self, count: usize) -> Result<Vec<T>, Errno> {
        let mut values = Vec::<T>::with_capacity(count);
        // SAFETY: the vector has room for `count` values, which are written where `Ok` comes back.
        unsafe {
            copy_in(values.as_mut_ptr().cast(), self.0, count * size_of::<T>())?;
            values.set_len(count);
        }
        Ok(values)
    }

    /// Copies `values` out.
    pub fn write_slice<T: Plain>(self, values: &[T]) -> Result<(), Errno> {
        // SAFETY: the slice is readable for its own size.
        unsafe { copy_out(self.0, values.as_ptr().cast(), size_of_val(values)) }
    }
}

/// # Safety
/// `to` is writable for `len` bytes.
unsafe fn copy_in(to: *mut c_void, from: u64, len: usize) -> Result<(), Errno> {
    if len == 0 {
        return Ok(());
    }
    access::install();
    // SAFETY: room for `len` bytes, as the caller says; zeroed first, so that each has a value.
    let to = unsafe {
        to.write_bytes(0, len);
        std::slice::from_raw_parts_mut(to.cast::<u8>(), len)
    };
    access::read(Hva::new(from), to).map_err(|_| Errno::EFAULT)
}

/// # Safety
/// `from` is readable for `len` bytes. The other range is the calling program's to give.
unsafe fn copy_out(to: u64, from: *const c_void, len: usize) -> Result<(), Errno> {
    if len == 0 {
        return Ok(());
    }
    access::install();
    // SAFETY: as the caller says.
    let from = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), len) };
    access::write(Hva::new(to), from).map_err(|_| Errno::EFAULT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_both_ways() {
        let mut regs = kb::kvm_regs {
            rip: 0x1000,
            ..Default::default()
        };
        let argument = Argument::to(&mut regs);
        assert_eq!(argument.read::<kb::kvm_regs>().unwrap().rip, 0x1000);
        argument
            .write(&kb::kvm_regs {
                rip: 0x2000,
                ..Default::default()
            })
            .unwrap();
        assert_eq!(regs.rip, 0x2000);
    }

    #[test]
    fn bad_pointers_are_efault() {
        for bad in [0, 8, 0x8000_0000_0000_0000, u64::MAX] {
            let argument = Argument::new(bad);
            assert_eq!(argument.read::<u64>(), Err(Errno::EFAULT));
            assert_eq!(argument.write(&1u64), Err(Errno::EFAULT));
        }
        assert_eq!(Argument::new(8).read_slice::<u64>(0), Ok(Vec::new()));
    }
}
