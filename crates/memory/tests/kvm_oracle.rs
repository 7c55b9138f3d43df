//! The same calls on our slots and on the kernel's: the same errno, the same dirty pages.
//!
//! On the kernel's side a guest of some twenty bytes writes to the pages that are to be dirty: flat
//! 32-bit code without paging, which reads a list of addresses and halts at its end.

#![expect(
    unsafe_code,
    reason = "raw ioctls, to pass what no wrapper would let through"
)]

mod draw;
mod exercise;

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};

use addr::{Address, Hva};
use arbitrary::Unstructured;
use exercise::calls::{self, ARENA, Call};
use exercise::machine::{Answer, Machine, Ours};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_MULTI_ADDRESS_SPACE, kvm_clear_dirty_log,
    kvm_dirty_log, kvm_enable_cap, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memory::ram::{GuestRam, RamConfig};
use memory::slot::{ManualProtect, Region, SlotsConfig};

const SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
const GET_DIRTY_LOG: u64 = 0x4010_ae42;
const CLEAR_DIRTY_LOG: u64 = 0xc018_aec0;
const PAGE: u64 = 4096;

/// Slot 0: the guest's code and, behind it, the list of addresses.
const CODE: [u8; 16] = [
    0x8b, 0x06, // again: mov eax, [esi]
    0x83, 0xc6, 0x04, // add esi, 4
    0x85, 0xc0, // test eax, eax
    0x74, 0x05, // jz done
    0xc6, 0x00, 0x01, // mov byte [eax], 1
    0xeb, 0xf2, // jmp again
    0xf4, // done: hlt
    0x90,
];
const LIST: u64 = PAGE;
/// Bitmaps of sensible slots have three words; a call that should have failed finds more room.
const ROOM: usize = 4096;

/// The kernel's slots.
struct Kernel {
    vm: VmFd,
    vcpu: VcpuFd,
    own: GuestRam,
    /// Writable slots as the kernel has them: it would leave with an MMIO exit elsewhere.
    regions: Vec<Region>,
}

fn ioctl<T>(fd: RawFd, request: u64, argument: &T) -> Result<(), i32> {
    // SAFETY: the request numbers of this file belong to the structures that they are used with,
    // and pointers inside them lead to buffers that outlive the call.
    let result = unsafe { libc::ioctl(fd, request as _, std::ptr::from_ref(argument)) };
    if result < 0 {
        Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    } else {
        Ok(())
    }
}

fn set_region(vm: &VmFd, region: &Region) -> Result<(), i32> {
    let argument = kvm_userspace_memory_region {
        slot: region.slot,
        flags: region.flags,
        guest_phys_addr: region.gpa.raw(),
        memory_size: region.size,
        userspace_addr: region.hva.raw(),
    };
    ioctl(vm.as_raw_fd(), SET_USER_MEMORY_REGION, &argument)
}

impl Kernel {
    fn new(kvm: &Kvm, manual: ManualProtect) -> Self {
        let vm = kvm.create_vm().unwrap();
        let mode = match manual {
            ManualProtect::Off => 0,
            ManualProtect::Enabled => 1,
            ManualProtect::InitiallySet => 3,
        };
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            ..Default::default()
        };
        cap.args[0] = mode;
        vm.enable_cap(&cap).unwrap();
        let own = GuestRam::new(&RamConfig::new(calls::FIRST_FRAME * PAGE)).unwrap();
        memory::access::write(own.hva(), &CODE).unwrap();
        let region = Region {
            slot: 0,
            flags: 0,
            gpa: addr::Gpa::new(0),
            size: own.size(),
            hva: own.hva(),
        };
        set_region(&vm, &region).unwrap();
        let vcpu = flat_vcpu(&vm);
        Self {
            vm,
            vcpu,
            own,
            regions: Vec::new(),
        }
    }

    fn remember(&mut self, region: Region) {
        self.regions.retain(|r| r.slot != region.slot);
        let writable = region.flags & 2 == 0 && region.hva != calls::UNMAPPED;
        if region.size != 0 && region.slot >> 16 == 0 && writable {
            self.regions.push(region);
        }
    }
}

impl Machine for Kernel {
    fn set_region(&mut self, region: Region) -> Result<(), i32> {
        set_region(&self.vm, &region)?;
        self.remember(region);
        Ok(())
    }

    fn get_log(&mut self, slot: u32) -> Answer {
        let mut words = vec![0; ROOM];
        let mut log = kvm_dirty_log {
            slot,
            ..Default::default()
        };
        log.__bindgen_anon_1.dirty_bitmap = words.as_mut_ptr().cast();
        ioctl(self.vm.as_raw_fd(), GET_DIRTY_LOG, &log)?;
        Ok(words)
    }

    fn clear_log(&mut self, slot: u32, first_page: u64, num_pages: u32, word: u64) -> Answer {
        let mut words = vec![word; ROOM];
        let mut clear = kvm_clear_dirty_log {
            slot,
            num_pages,
            first_page,
            ..Default::default()
        };
        clear.__bindgen_anon_1.dirty_bitmap = words.as_mut_ptr().cast();
        ioctl(self.vm.as_raw_fd(), CLEAR_DIRTY_LOG, &clear)?;
        Ok(Vec::new())
    }

    fn touch(&mut self, frame: u64) {
        let at = frame * PAGE;
        let inside = |r: &Region| r.gpa.raw() <= at && at < r.gpa.raw() + r.size;
        if !self.regions.iter().any(inside) {
            return;
        }
        let list = self.own.hva().wrapping_add(LIST);
        memory::access::store_word(list, at).unwrap();
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rsi, regs.rflags) = (0, LIST, 2);
        self.vcpu.set_regs(&regs).unwrap();
        match self.vcpu.run().unwrap() {
            VcpuExit::Hlt => {}
            exit => panic!("the guest left with {exit:?} at {at:#x}"),
        }
    }
}

/// A vCPU in flat 32-bit protected mode without paging.
fn flat_vcpu(vm: &VmFd) -> VcpuFd {
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    sregs.cs = kvm_segment {
        selector: 8,
        type_: 11,
        ..data
    };
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).unwrap();
    vcpu
}

/// The kernel, or the printed reason why there is none.
fn kernel() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            assert!(
                std::env::var_os("REQUIRE_KVM").is_none(),
                "/dev/kvm: {error}"
            );
            println!("skipped: /dev/kvm does not open: {error}");
            None
        }
    }
}

/// What the kernel's slots depend on, found out by asking it.
fn config_of(kvm: &Kvm) -> SlotsConfig {
    let vm = kvm.create_vm().unwrap();
    let try_one = |gpa: u64, hva: u64| {
        let region = Region {
            slot: 0,
            flags: 0,
            gpa: addr::Gpa::new(gpa),
            size: PAGE,
            hva: Hva::new(hva),
        };
        let made = set_region(&vm, &region).is_ok();
        if made {
            set_region(&vm, &Region { size: 0, ..region }).unwrap();
        }
        made
    };
    let default = SlotsConfig::default();
    let bits = (36..=52)
        .rev()
        .find(|bits| try_one((1 << bits) - PAGE, PAGE));
    let five_levels = try_one(0, default.host_end.raw());
    let spaces = kvm.check_extension_raw(KVM_CAP_MULTI_ADDRESS_SPACE.into());
    SlotsConfig {
        address_spaces: usize::try_from(spaces).unwrap_or(1).max(1),
        physical_bits: bits.expect("a guest has at least 36 bits of addresses"),
        host_end: if five_levels {
            Hva::new(0xff_ffff_ffff_f000)
        } else {
            default.host_end
        },
    }
}

/// What was seen, so that a test that saw nothing does not pass.
#[derive(Debug, Default)]
struct Seen {
    calls: usize,
    dirty_pages: u64,
    answers: BTreeMap<i32, usize>,
}

impl Seen {
    fn count(&mut self, answer: &Answer) {
        self.calls += 1;
        let (errno, words) = match answer {
            Ok(words) => (0, words.as_slice()),
            Err(errno) => (*errno, &[][..]),
        };
        *self.answers.entry(errno).or_default() += 1;
        self.dirty_pages += words.iter().map(|w| u64::from(w.count_ones())).sum::<u64>();
    }
}

/// Random calls from one seed, on both.
fn compare(kvm: &Kvm, config: SlotsConfig, seed: u64, arena: Hva, seen: &mut Seen) {
    let data = draw::bytes(seed, 4096);
    let mut u = Unstructured::new(&data);
    let manual = calls::manual_protect(&mut u).unwrap();
    let mut kernel = Kernel::new(kvm, manual);
    let mut ours = Ours::new(config, manual);
    let own = Region {
        slot: 0,
        flags: 0,
        gpa: addr::Gpa::new(0),
        size: kernel.own.size(),
        hva: kernel.own.hva(),
    };
    ours.call(&Call::SetRegion(own)).unwrap();
    while let Ok(call) = calls::next(&mut u, arena) {
        let (answer, mut expected) = (ours.call(&call), kernel.call(&call));
        if let (Ok(words), Ok(expected)) = (&answer, &mut expected) {
            let rest = expected.split_off(words.len().min(expected.len()));
            assert!(
                rest.iter().all(|w| *w == 0),
                "the kernel reported pages behind the slot"
            );
        }
        assert_eq!(
            answer, expected,
            "seed {seed}, {manual:?}, call {}: {call:x?}",
            seen.calls
        );
        seen.count(&answer);
    }
}

#[test]
fn the_kernel_answers_the_same() {
    let Some(kvm) = kernel() else { return };
    let config = config_of(&kvm);
    println!("the kernel: {config:?}");
    let arena = GuestRam::new(&RamConfig::new(ARENA)).unwrap();
    let seeds = std::env::var("FOURFOLD_ORACLE_SEEDS")
        .ok()
        .and_then(|n| n.parse().ok());
    let started = std::time::Instant::now();
    let mut seen = Seen::default();
    for seed in 0..seeds.unwrap_or(100) {
        compare(&kvm, config, seed, arena.hva(), &mut seen);
    }
    println!("{seen:?} in {:.1?}, no difference", started.elapsed());
    if seeds.is_none() {
        assert!(seen.calls > 50_000 && seen.dirty_pages > 10_000, "{seen:?}");
        for errno in [0, libc::EINVAL, libc::EEXIST, libc::ENOENT] {
            assert!(seen.answers[&errno] > 1000, "errno {errno}: {seen:?}");
        }
    }
}
