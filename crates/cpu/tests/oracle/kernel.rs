//! Guests on `/dev/kvm`.

use cpu::{CpuState, Segment};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_debugregs, kvm_dtable, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use x86::descriptor::attributes;
use x86::msr;

use crate::guest::{End, Guest, MAX_EXITS, Outcome, Seen, Wishes, input};
use crate::layout::MEMORY;
use crate::watch::Watch;

/// One VM that runs guest after guest.
pub struct Kernel {
    _vm: VmFd,
    vcpu: VcpuFd,
    memory: *mut u8,
    pub cpuid: CpuId,
}

/// MSRs that both sides have.
const MSRS: [u32; 9] = [
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::KERNEL_GS_BASE,
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
    msr::PAT,
];

fn msr_field(state: &mut CpuState, index: u32) -> &mut u64 {
    let msrs = &mut state.msrs;
    match index {
        msr::STAR => &mut msrs.star,
        msr::LSTAR => &mut msrs.lstar,
        msr::CSTAR => &mut msrs.cstar,
        msr::SFMASK => &mut msrs.sfmask,
        msr::KERNEL_GS_BASE => &mut msrs.kernel_gs_base,
        msr::SYSENTER_CS => &mut msrs.sysenter_cs,
        msr::SYSENTER_ESP => &mut msrs.sysenter_esp,
        msr::SYSENTER_EIP => &mut msrs.sysenter_eip,
        _ => &mut msrs.pat,
    }
}

fn to_kvm(segment: &Segment) -> kvm_segment {
    let a = segment.attributes;
    let bit = |mask: u16| u8::from(a & mask != 0);
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: (a & attributes::TYPE) as u8,
        present: bit(attributes::P),
        dpl: (a >> attributes::DPL_SHIFT) as u8 & 3,
        db: bit(attributes::DB),
        s: bit(attributes::S),
        l: bit(attributes::L),
        g: bit(attributes::G),
        avl: bit(attributes::AVL),
        unusable: u8::from(segment.unusable),
        padding: 0,
    }
}

fn from_kvm(segment: &kvm_segment) -> Segment {
    let flag = |value: u8, mask: u16| if value == 0 { 0 } else { mask };
    Segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        attributes: u16::from(segment.type_)
            | u16::from(segment.dpl) << attributes::DPL_SHIFT
            | flag(segment.present, attributes::P)
            | flag(segment.s, attributes::S)
            | flag(segment.db, attributes::DB)
            | flag(segment.l, attributes::L)
            | flag(segment.g, attributes::G)
            | flag(segment.avl, attributes::AVL),
        unusable: segment.unusable != 0,
    }
}

impl Kernel {
    /// `None`, and a word about it, where `/dev/kvm` doesn't open.
    pub fn open() -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                let required = std::env::var_os("REQUIRE_KVM").is_some_and(|value| value == "1");
                assert!(!required, "REQUIRE_KVM=1, but /dev/kvm: {error}");
                eprintln!("no oracle, /dev/kvm does not open: {error}");
                return None;
            }
        };
        let vm = kvm.create_vm().expect("a VM");
        vm.set_tss_address(0xfffb_d000)
            .expect("an address for KVM's own TSS");
        let memory = map(MEMORY);
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: memory as u64,
        };
        // SAFETY: the mapping is as long as the region and lives as long as the process.
        unsafe { vm.set_user_memory_region(region) }.expect("a memory slot");
        let vcpu = vm.create_vcpu(0).expect("a vCPU");
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .expect("CPUID");
        vcpu.set_cpuid2(&cpuid).expect("CPUID to be set");
        Some(Self {
            _vm: vm,
            vcpu,
            memory,
            cpuid,
        })
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is MEMORY bytes long, lives as long as the process, and the guest
        // doesn't run.
        unsafe { std::slice::from_raw_parts_mut(self.memory, MEMORY) }
    }

    fn set_state(&mut self, state: &CpuState) {
        let mut sregs = self.vcpu.get_sregs().expect("special registers");
        put_special(&mut sregs, state);
        self.vcpu
            .set_sregs(&sregs)
            .expect("special registers to be set");
        self.vcpu
            .set_regs(&general(state))
            .expect("registers to be set");
        let events = kvm_vcpu_events::default();
        self.vcpu
            .set_vcpu_events(&events)
            .expect("events to be set");
        let debug = kvm_debugregs {
            db: state.dr,
            dr6: state.dr6,
            dr7: state.dr7,
            ..Default::default()
        };
        self.vcpu
            .set_debug_regs(&debug)
            .expect("debug registers to be set");
        let mut state = state.clone();
        let entries = MSRS.map(|index| kvm_msr_entry {
            index,
            data: *msr_field(&mut state, index),
            ..Default::default()
        });
        let msrs = Msrs::from_entries(&entries).expect("a list of MSRs");
        assert_eq!(
            self.vcpu.set_msrs(&msrs).expect("MSRs to be set"),
            MSRS.len()
        );
    }

    fn state(&self) -> CpuState {
        let regs = self.vcpu.get_regs().expect("registers");
        let sregs = self.vcpu.get_sregs().expect("special registers");
        let mut state = from_special(&sregs);
        state.gpr = [
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ];
        state.rip = regs.rip;
        state.rflags = regs.rflags;
        let debug = self.vcpu.get_debug_regs().expect("debug registers");
        (state.dr, state.dr6, state.dr7) = (debug.db, debug.dr6, debug.dr7);
        let entries = MSRS.map(|index| kvm_msr_entry {
            index,
            ..Default::default()
        });
        let mut msrs = Msrs::from_entries(&entries).expect("a list of MSRs");
        self.vcpu.get_msrs(&mut msrs).expect("MSRs");
        for entry in msrs.as_slice() {
            *msr_field(&mut state, entry.index) = entry.data;
        }
        state
    }

    /// Runs a guest to its end.
    pub fn run(&mut self, guest: &Guest) -> Outcome {
        self.bytes().copy_from_slice(&guest.memory);
        self.set_state(&guest.state);
        self.set_wishes(&guest.wishes);
        let watch = Watch::signal_this_thread();
        let mut seen = Vec::new();
        let end = loop {
            if seen.len() > MAX_EXITS {
                break End::Endless;
            }
            match self.exit(&mut seen, &guest.wishes) {
                None => {}
                Some(end) => break end,
            }
        };
        drop(watch);
        Outcome {
            seen,
            end,
            state: self.state(),
            memory: self.bytes().to_vec(),
        }
    }

    fn set_wishes(&mut self, wishes: &Wishes) {
        let window = u8::from(wishes.interrupt.is_some());
        self.vcpu.get_kvm_run().request_interrupt_window = window;
        if wishes.nmi {
            let mut events = self.vcpu.get_vcpu_events().expect("events");
            events.nmi.pending = 1;
            events.flags |= kvm_bindings::KVM_VCPUEVENT_VALID_NMI_PENDING;
            self.vcpu
                .set_vcpu_events(&events)
                .expect("events to be set");
        }
        let debug = &wishes.debug;
        let bit = |wanted: bool, bit: u32| if wanted { bit } else { 0 };
        let mut control = bit(debug.enabled, kvm_bindings::KVM_GUESTDBG_ENABLE)
            | bit(debug.single_step, kvm_bindings::KVM_GUESTDBG_SINGLESTEP)
            | bit(
                debug.software_breakpoints,
                kvm_bindings::KVM_GUESTDBG_USE_SW_BP,
            )
            | bit(
                debug.hardware_breakpoints,
                kvm_bindings::KVM_GUESTDBG_USE_HW_BP,
            );
        if !debug.enabled {
            control = 0;
        }
        let mut settings = kvm_bindings::kvm_guest_debug {
            control,
            ..Default::default()
        };
        settings.arch.debugreg[..4].copy_from_slice(&debug.dr);
        settings.arch.debugreg[7] = debug.dr7;
        self.vcpu
            .set_guest_debug(&settings)
            .expect("debugging to be set");
    }

    fn inject(&mut self, wishes: &Wishes) {
        self.vcpu.get_kvm_run().request_interrupt_window = 0;
        let mut events = self.vcpu.get_vcpu_events().expect("events");
        if let Some(vector) = wishes.interrupt {
            events.interrupt.injected = 1;
            events.interrupt.nr = vector;
            self.vcpu
                .set_vcpu_events(&events)
                .expect("events to be set");
        }
    }

    /// One exit; `None` where the guest goes on.
    fn exit(&mut self, seen: &mut Vec<Seen>, wishes: &Wishes) -> Option<End> {
        match self.vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                seen.push(Seen::Out {
                    port,
                    data: data.to_vec(),
                });
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                // Size and count are not told apart here.
                seen.push(Seen::In {
                    port,
                    size: data.len() as u8,
                    count: 1,
                });
                data.copy_from_slice(&input(port.into(), data.len()));
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                seen.push(Seen::Write {
                    gpa,
                    data: data.to_vec(),
                });
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                seen.push(Seen::Read {
                    gpa,
                    len: data.len() as u8,
                });
                data.copy_from_slice(&input(gpa, data.len()));
            }
            Ok(VcpuExit::Debug(debug)) => {
                let vector = debug.exception as u8;
                // The event says nothing in DR6 where it is a breakpoint of software.
                let dr6 = if vector == 3 { 0xffff_0ff0 } else { debug.dr6 };
                seen.push(Seen::Debug {
                    vector,
                    pc: debug.pc,
                    dr6,
                });
            }
            Ok(VcpuExit::IrqWindowOpen) => {
                let rip = self.vcpu.get_regs().expect("registers").rip;
                seen.push(Seen::Window { rip });
                self.inject(wishes);
            }
            Ok(VcpuExit::Hlt) => return Some(End::Halt),
            Ok(VcpuExit::Shutdown) => return Some(End::Shutdown),
            Ok(other) => return Some(End::Failed(format!("{other:?}"))),
            // The watch has run out.
            Err(error) if error.errno() == libc::EINTR => return Some(End::Endless),
            Err(error) => return Some(End::Failed(error.to_string())),
        }
        None
    }
}

fn general(state: &CpuState) -> kvm_regs {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = state.gpr;
    kvm_regs {
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: state.rip,
        rflags: state.rflags,
    }
}

fn put_special(sregs: &mut kvm_sregs, state: &CpuState) {
    let s = &state.segments;
    sregs.cs = to_kvm(&s.cs);
    sregs.ds = to_kvm(&s.ds);
    sregs.es = to_kvm(&s.es);
    sregs.fs = to_kvm(&s.fs);
    sregs.gs = to_kvm(&s.gs);
    sregs.ss = to_kvm(&s.ss);
    sregs.tr = to_kvm(&s.tr);
    sregs.ldt = to_kvm(&s.ldtr);
    let table = |base, limit| kvm_dtable {
        base,
        limit,
        ..Default::default()
    };
    sregs.gdt = table(state.gdtr.base, state.gdtr.limit);
    sregs.idt = table(state.idtr.base, state.idtr.limit);
    (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
    sregs.cr8 = 0;
    sregs.efer = state.msrs.efer;
    sregs.interrupt_bitmap = [0; 4];
}

fn from_special(sregs: &kvm_sregs) -> CpuState {
    let mut state = CpuState::default();
    let s = &mut state.segments;
    s.cs = from_kvm(&sregs.cs);
    s.ds = from_kvm(&sregs.ds);
    s.es = from_kvm(&sregs.es);
    s.fs = from_kvm(&sregs.fs);
    s.gs = from_kvm(&sregs.gs);
    s.ss = from_kvm(&sregs.ss);
    s.tr = from_kvm(&sregs.tr);
    s.ldtr = from_kvm(&sregs.ldt);
    state.gdtr.base = sregs.gdt.base;
    state.gdtr.limit = sregs.gdt.limit;
    state.idtr.base = sregs.idt.base;
    state.idtr.limit = sregs.idt.limit;
    (state.cr0, state.cr2, state.cr3, state.cr4) = (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4);
    state.msrs.efer = sregs.efer;
    state
}

/// Anonymous memory for a guest.
pub fn map(len: usize) -> *mut u8 {
    // SAFETY: a new anonymous mapping.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(memory, libc::MAP_FAILED);
    memory.cast()
}
