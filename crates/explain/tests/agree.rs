//! `explain` beside the MMU's own result, `KVM_TRANSLATE` on both accelerators, and the host's page
//! tables read by hand: random guest tables of every paging mode, addresses over the whole space.
#![expect(unsafe_code, reason = "host memory is handed to the guest")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use accel::{Accelerator, Vcpu, Vm, kernel, user};
use addr::{Address, Gpa, Gva};
use explain::{Chain, GuestSide, OwnBytes, Question, Search, SlotRange, Tables, Target};
use fastrand::Rng;
use kvm_bindings::kvm_userspace_memory_region;
use memory::access::store_word;
use memory::pagemap::Pagemap;
use memory::quiesce::Domain;
use memory::ram::{GuestRam, RamConfig};
use memory::slot::{Region, Slots, SlotsConfig};
use mmu::{
    Access, AccessKind, Fault, GigabytePages, Mmu, MmuConfig, PagingFeatures, PagingRegisters,
    Privilege, VcpuMmu,
};
use x86::control::{Cr0, Cr4, Efer};

const RAM: u64 = 2 << 20;
/// Pages that tables point to; some lie outside RAM.
const PAGES: u64 = 640;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Off,
    Bits32,
    Pae,
    Level4,
    Level5,
}

impl Mode {
    const ALL: [Self; 5] = [
        Self::Off,
        Self::Bits32,
        Self::Pae,
        Self::Level4,
        Self::Level5,
    ];

    fn registers(self) -> PagingRegisters {
        let paged = Cr0::PE | Cr0::PG | Cr0::WP;
        let long = Efer::LME | Efer::LMA | Efer::NXE;
        let (cr0, cr4, efer) = match self {
            Self::Off => (Cr0::PE, Cr4::empty(), Efer::empty()),
            Self::Bits32 => (paged, Cr4::PSE, Efer::empty()),
            Self::Pae => (paged, Cr4::PAE, Efer::NXE),
            Self::Level4 => (paged, Cr4::PAE | Cr4::SMEP, long),
            Self::Level5 => (paged, Cr4::PAE | Cr4::LA57 | Cr4::SMEP | Cr4::SMAP, long),
        };
        PagingRegisters {
            cr0: cr0.bits(),
            cr3: 0x1000,
            cr4: cr4.bits(),
            efer: efer.bits(),
            ..PagingRegisters::default()
        }
    }

    /// An address, mostly one that can be translated.
    fn address(self, random: &mut Rng) -> Gva {
        let raw = random.u64(..);
        let bits = match self {
            Self::Off => return Gva::new(raw % (2 * RAM)),
            Self::Bits32 | Self::Pae => 32,
            Self::Level4 => 48,
            Self::Level5 => 57,
        };
        let unused = 64 - bits;
        Gva::new(match bits {
            32 => raw & 0xffff_ffff,
            _ => ((raw << unused) as i64 >> unused) as u64,
        })
    }
}

/// RAM full of entries: mostly present, mostly pointing into RAM, with all other bits at random now
/// and then.
fn fill(ram: &GuestRam, random: &mut Rng, mode: Mode) {
    for at in (0..RAM).step_by(8) {
        let flags = 0x1 | (random.u64(..) & 0x66) | (u64::from(random.u8(..3) > 0) << 1);
        let mut entry = random.u64(..PAGES) << 12 | flags;
        match random.u64(..64) {
            0 => entry = random.u64(..),
            1..=6 => entry = 0,
            7..=9 => entry = entry & !0x1f_f000 | 0x80,
            10..=13 if mode != Mode::Bits32 => entry |= 1 << 63,
            _ => {}
        }
        if mode == Mode::Bits32 {
            let other = random.u64(..PAGES) << 12 | flags;
            entry = entry & 0xffff_ffff | other << 32;
        }
        store_word::<u64>(ram.hva().checked_add(at).unwrap(), entry).unwrap();
    }
    if mode == Mode::Pae {
        // PDPTEs have few bits that may be set.
        for index in 0..4 {
            let at = ram.hva().checked_add(0x1000 + index * 8).unwrap();
            store_word::<u64>(at, random.u64(..RAM >> 12) << 12 | 1).unwrap();
        }
    }
}

struct Machine {
    ram: GuestRam,
    mmu: Arc<Mmu>,
    slots: Vec<SlotRange>,
}

impl Machine {
    fn new() -> Self {
        let ram = GuestRam::new(&RamConfig::new(RAM)).unwrap();
        let slots = Slots::new(Domain::new(), SlotsConfig::default());
        let region = Region {
            slot: 0,
            flags: 0,
            gpa: Gpa::new(0),
            size: RAM,
            hva: ram.hva(),
        };
        slots.set_region(&region).unwrap();
        let mmu = Mmu::new(&slots, MmuConfig::default());
        let slots = SlotRange::of_table(&mmu.slots().snapshot(0));
        Self { ram, mmu, slots }
    }

    fn explain(&self, registers: PagingRegisters, gva: Gva, access: Access) -> Chain {
        self.explain_on(PagingFeatures::default(), registers, gva, access)
    }

    fn explain_on(
        &self,
        features: PagingFeatures,
        registers: PagingRegisters,
        gva: Gva,
        access: Access,
    ) -> Chain {
        let pagemap = Pagemap::of_self().unwrap();
        let evidence = explain::Evidence {
            slots: &self.slots,
            bytes: &OwnBytes,
            registers,
            features,
            vcpu: None,
            tables: Tables::Ours(&self.mmu),
            tlb: None,
            pagemap: &pagemap,
        };
        let question = Question {
            target: Target::Gva(gva),
            access,
            search: Search::No,
        };
        explain::explain(&evidence, &question).unwrap()
    }
}

fn accesses(random: &mut Rng) -> Access {
    let kinds = [AccessKind::Read, AccessKind::Write, AccessKind::Execute];
    let who = [
        Privilege::User,
        Privilege::Supervisor,
        Privilege::SupervisorAcSet,
    ];
    Access::new(kinds[random.usize(..3)], who[random.usize(..3)])
}

/// What the MMU says: an address, or an error code.
fn by_mmu(vcpu: &mut VcpuMmu, gva: Gva, access: Access) -> Result<Gpa, Option<u32>> {
    match vcpu.translate(gva, access) {
        Ok(translation) => Ok(translation.gpa),
        Err(Fault::Mmio { gpa } | Fault::ReadOnly { gpa, .. }) => Ok(gpa),
        Err(Fault::Page(fault)) => Err(Some(fault.error_code.bits())),
        Err(Fault::Host(_)) => Err(None),
    }
}

fn by_explain(chain: &Chain) -> Result<Gpa, Option<u32>> {
    match &chain.guest {
        Some(GuestSide::Page { gpa, .. }) => Ok(*gpa),
        Some(GuestSide::PageFault { error_code, .. }) => Err(Some(*error_code)),
        _ => Err(None),
    }
}

/// The frame of a page, read without the code under test.
fn frame_by_hand(hva: u64) -> Option<u64> {
    let mut word = [0; 8];
    let pagemap = File::open(format!("/proc/{}/pagemap", std::process::id())).unwrap();
    pagemap.read_exact_at(&mut word, hva / 4096 * 8).unwrap();
    let word = u64::from_le_bytes(word);
    Some(word & ((1 << 55) - 1)).filter(|frame| *frame != 0 && word >> 63 != 0)
}

#[test]
fn the_mmu_and_the_host_say_the_same() {
    const ADDRESSES: usize = 3000;
    let mut random = Rng::with_seed(0x9e37_79b9_7f4a_7c15);
    let (mut pages, mut faults, mut frames) = (0, 0, 0);
    for mode in Mode::ALL {
        let machine = Machine::new();
        fill(&machine.ram, &mut random, mode);
        let mut registers = mode.registers();
        let mut vcpu = VcpuMmu::new(&machine.mmu, 0);
        let _ = vcpu.set_features(PagingFeatures::default());
        let _ = vcpu.set_registers(&registers);
        if mode == Mode::Pae {
            registers.pdptrs = vcpu.load_pdptrs(registers.cr3).expect("good PDPTEs");
            let _ = vcpu.set_registers(&registers);
        }
        for _ in 0..ADDRESSES {
            let (gva, access) = (mode.address(&mut random), accesses(&mut random));
            let chain = machine.explain(registers, gva, access);
            assert_eq!(
                by_explain(&chain),
                by_mmu(&mut vcpu, gva, access),
                "{mode:?}\n{chain}"
            );
            match (&chain.guest, &chain.host) {
                (Some(GuestSide::PageFault { rule, .. }), _) => {
                    faults += 1;
                    assert!(!rule.contains("the rights of the page"), "{chain}");
                }
                (_, Some(host)) => {
                    pages += 1;
                    if let Some(frame) = frame_by_hand(host.hva.raw()) {
                        frames += 1;
                        assert_eq!(chain.frame(), Some(frame), "{chain}");
                    }
                }
                _ => {}
            }
        }
    }
    println!("{pages} pages, {faults} faults, {frames} frames compared");
    assert!(pages > 500 && faults > 500);
    if frames == 0 {
        println!("skipped, the host hides frame numbers from this user: frames");
    }
}

/// A VM with this RAM, and a vCPU with these registers; `None` where it refuses them.
fn vcpu_of(
    accelerator: &dyn Accelerator,
    ram: &GuestRam,
    registers: &PagingRegisters,
) -> Option<(Arc<dyn Vm>, Box<dyn Vcpu>)> {
    let vm = accelerator.create_vm().unwrap();
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: RAM,
        userspace_addr: ram.hva().raw(),
    };
    // SAFETY: the RAM outlives the VM in each caller, and is used as volatile memory only.
    unsafe { vm.set_user_memory_region(&region) }.unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid(&accelerator.supported_cpuid().unwrap())
        .unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cr0, sregs.cr3) = (registers.cr0, registers.cr3);
    (sregs.cr4, sregs.efer) = (registers.cr4, registers.efer);
    let long = registers.efer & Efer::LMA.bits() != 0;
    (sregs.cs.l, sregs.cs.db) = (u8::from(long), u8::from(!long));
    vcpu.set_sregs(&sregs).ok()?;
    Some((vm, vcpu))
}

/// What the accelerator's CPUID says about 1 GiB pages.
fn features_of(accelerator: &dyn Accelerator) -> PagingFeatures {
    const GIGABYTE_PAGES: u32 = 1 << 26;
    let cpuid = accelerator.supported_cpuid().unwrap();
    let extended = cpuid.as_slice().iter().find(|e| e.function == 0x8000_0001);
    let gigabyte_pages = match extended {
        Some(leaf) if leaf.edx & GIGABYTE_PAGES != 0 => GigabytePages::Supported,
        _ => GigabytePages::Reserved,
    };
    PagingFeatures {
        gigabyte_pages,
        ..PagingFeatures::default()
    }
}

/// `KVM_TRANSLATE` asks for a supervisor's read; the rules for that need no rights but presence.
fn compare_with_translate(accelerator: &dyn Accelerator, addresses: usize) -> usize {
    let mut random = Rng::with_seed(0x1234_5678_9abc_def1);
    let read = Access::new(AccessKind::Read, Privilege::SupervisorAcSet);
    let mut compared = 0;
    let features = features_of(accelerator);
    for mode in [Mode::Bits32, Mode::Pae, Mode::Level4, Mode::Level5] {
        let machine = Machine::new();
        fill(&machine.ram, &mut random, mode);
        let mut registers = mode.registers();
        let Some((_vm, vcpu)) = vcpu_of(accelerator, &machine.ram, &registers) else {
            println!(
                "skipped, {} refuses these registers: {mode:?}",
                accelerator.kind()
            );
            continue;
        };
        if mode == Mode::Pae {
            let mut walker = VcpuMmu::new(&machine.mmu, 0);
            registers.pdptrs = walker.load_pdptrs(registers.cr3).expect("good PDPTEs");
        }
        if translates_nothing(&*vcpu, mode) {
            let kind = accelerator.kind();
            println!("skipped, {kind} answers every address with itself: {mode:?}");
            continue;
        }
        for _ in 0..addresses {
            let gva = mode.address(&mut random);
            let chain = machine.explain_on(features, registers, gva, read);
            let answer = vcpu.translate(gva).unwrap();
            let theirs = (answer.valid != 0).then_some(answer.physical_address);
            // Reserved bits depend on the CPUID's MAXPHYADDR, which the sample does not follow.
            if chain.verdict.contains("reserved bits") {
                continue;
            }
            assert_eq!(theirs, chain.gpa.map(Gpa::raw), "{mode:?}\n{chain}");
            compared += 1;
        }
    }
    compared
}

/// Some KVMs that are software themselves look at no table before the vCPU has run.
fn translates_nothing(vcpu: &dyn Vcpu, mode: Mode) -> bool {
    let mut random = Rng::with_seed(1);
    (0..20).all(|_| {
        let gva = mode.address(&mut random);
        vcpu.translate(gva)
            .is_ok_and(|answer| answer.physical_address == gva.raw())
    })
}

#[test]
fn kvm_translate_says_the_same() {
    let ours = user::open(user::Config::default());
    match ours {
        Ok(accelerator) => {
            let compared = compare_with_translate(&*accelerator, 1000);
            println!("{compared} addresses compared with KVM_TRANSLATE of `user`");
            assert!(compared > 2000);
        }
        Err(why) => println!("skipped, {why}"),
    }
    match kernel::open() {
        Ok(accelerator) => {
            let compared = compare_with_translate(&*accelerator, 300);
            println!("{compared} addresses compared with KVM_TRANSLATE of `kvm`");
        }
        Err(why) => {
            assert!(std::env::var_os("REQUIRE_KVM").is_none(), "{why}");
            println!("skipped, {why}");
        }
    }
}
