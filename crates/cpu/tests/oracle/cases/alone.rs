//! Guests on our CPU alone, against what the manuals say: what the software KVM of some hosts can't do.

use cpu::CpuState;
use cpu::system::GuestDebug;
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use x86::rflags;

use super::with_rax;
use crate::guest::{End, Guest, Outcome, Seen};
use crate::layout::{DATA, HANDLERS, HLT, STACK, STACK0, Start, TSS, TSS2, sel};
use crate::ours::Ours;

/// A CPU with long mode, SSE, XSAVE and what the tests here switch on.
pub fn cpuid() -> CpuId {
    let leaf = |function, ecx, edx| kvm_cpuid_entry2 {
        function,
        ecx,
        edx,
        ..Default::default()
    };
    let entries = [
        leaf(1, 0, 1 << 11 | 1 << 24 | 1 << 25 | 1 << 26),
        leaf(0x8000_0001, 1, 1 << 11 | 1 << 20 | 1 << 29),
    ];
    CpuId::from_entries(&entries).expect("two entries")
}

fn run(guest: &Guest) -> Outcome {
    let outcome = Ours::new(&cpuid()).run(guest);
    assert_eq!(
        outcome.end,
        End::Halt,
        "{}: {:x?}",
        guest.name,
        outcome.state
    );
    outcome
}

/// `N` slots of the stack, from the top.
fn stack<const N: usize>(outcome: &Outcome, width: usize) -> [u64; N] {
    let top = outcome.state.gpr[4] as usize;
    std::array::from_fn(|n| {
        let mut raw = [0; 8];
        raw[..width].copy_from_slice(&outcome.memory[top + n * width..][..width]);
        u64::from_le_bytes(raw)
    })
}

/// RIP behind the `HLT` of a vector's handler.
pub fn handler(vector: u64) -> u64 {
    HANDLERS + 16 * vector + 1
}

fn linear_rip(state: &CpuState) -> u64 {
    state.segments.cs.base + state.rip
}

const KERNEL: [Start; 6] = [
    Start::Real,
    Start::Protected16,
    Start::Protected32,
    Start::Paged32,
    Start::Compatibility,
    Start::Long,
];

/// Where the window opens, if it does.
fn window(start: Start, code: &[u8], flags: u64) -> Option<u64> {
    let mut guest = with_rax("window", start, code, 0);
    guest.state.gpr[0] = guest.state.segments.ss.selector.into();
    guest.state.rflags |= flags;
    guest.wishes.interrupt = Some(0x20);
    let outcome = run(&guest);
    match outcome.seen[..] {
        [] => None,
        [Seen::Window { rip }] => {
            assert_eq!(linear_rip(&outcome.state), handler(0x20), "{start:?}");
            Some(rip)
        }
        ref other => panic!("{other:?}"),
    }
}

#[test]
fn interrupt_windows() {
    for start in KERNEL {
        let on = rflags::IF;
        assert_eq!(window(start, &[0x90, 0x90], 0), None);
        assert_eq!(window(start, &[0x90, 0x90], on), Some(0x7000));
        let sti_nop_nop = [0xfb, 0x90, 0x90];
        assert_eq!(
            window(start, &sti_nop_nop, 0),
            Some(0x7002),
            "one instruction later"
        );
        assert_eq!(window(start, &sti_nop_nop, on), Some(0x7000));
        let cli_nop_sti_nop_nop = [0xfa, 0x90, 0xfb, 0x90, 0x90];
        assert_eq!(window(start, &cli_nop_sti_nop_nop, 0), Some(0x7004));
        let pushf_sti_popf_sti_nop_nop = [0x9c, 0xfb, 0x9d, 0xfb, 0x90, 0x90];
        assert_eq!(window(start, &pushf_sti_popf_sti_nop_nop, 0), Some(0x7005));
        let sti_mov_ss_nop_nop = [0xfb, 0x8e, 0xd0, 0x90, 0x90];
        assert_eq!(
            window(start, &sti_mov_ss_nop_nop, 0),
            Some(0x7004),
            "the shadows add up"
        );
        let sti_hlt = [0xfb, HLT];
        assert_eq!(window(start, &sti_hlt, 0), None, "HLT leaves first");
    }
}

#[test]
fn page_faults_of_32_bit_paging() {
    let mut guest = with_rax("write", Start::Paged32, &[0x89, 0x03], 0);
    guest.state.gpr[3] = 0x40_1234;
    let outcome = run(&guest);
    assert_eq!(
        (outcome.state.rip, outcome.state.cr2),
        (handler(14), 0x40_1234)
    );
    assert_eq!(stack::<3>(&outcome, 4), [2, 0x7000, sel::CODE32.into()]);
}

#[test]
fn pae_paging() {
    let mut guest = with_rax(
        "write",
        Start::Protected32,
        &[0x0f, 0x22, 0xc0, 0x89, 0x0b],
        0,
    );
    guest.state.gpr[0] = 0x8000_0011;
    guest.state.gpr[1] = 0x1234_5678;
    guest.state.gpr[3] = 0x4000_6000;
    guest.state.cr4 = 1 << 5;
    guest.state.cr3 = 0x5f00;
    // The first GiB by the page directory at 0xe000, and the second by the same.
    guest.put(0x5f00, &0xe001u64.to_le_bytes());
    guest.put(0x5f08, &0xe001u64.to_le_bytes());
    let outcome = run(&guest);
    assert_eq!(outcome.state.rip, 0x7006);
    let data = DATA as usize;
    assert_eq!(outcome.memory[data..data + 4], 0x1234_5678u32.to_le_bytes());
    assert_eq!(outcome.state.pdptrs[..2], [0xe001, 0xe001]);
}

#[test]
fn virtual_8086_mode_is_left_for_an_interrupt() {
    let mut guest = with_rax("int 0x80", Start::Virtual8086, &[0xcd, 0x80], 0);
    guest.state.rflags |= rflags::IOPL;
    guest.state.segments.ds.selector = 0x123;
    guest.state.segments.ds.base = 0x1230;
    let outcome = run(&guest);
    assert_eq!((outcome.state.rip, outcome.state.cpl()), (handler(0x80), 0));
    let flags = rflags::VM | rflags::IOPL | 2;
    assert_eq!(
        stack::<9>(&outcome, 4),
        [0x7002, 0, flags, STACK, 0, 0, 0x123, 0, 0]
    );
    assert_eq!(outcome.state.gpr[4], STACK0 - 36);
}

#[test]
fn virtual_8086_mode_and_back() {
    let mut guest = with_rax(
        "int 0x80, iret",
        Start::Virtual8086,
        &[0xcd, 0x80, 0xfa, 0xfb],
        0,
    );
    guest.state.rflags |= rflags::IOPL;
    guest.put(HANDLERS + 0x800, &[0xcf]);
    let outcome = run(&guest);
    // HLT of virtual-8086 mode is #GP(0).
    assert_eq!(outcome.state.rip, handler(13));
    assert_eq!(stack::<3>(&outcome, 4), [0, 0x7004, 0]);
}

#[test]
fn call_gate_with_parameters_and_back() {
    let mut code = vec![0x9a, 0, 0, 0, 0];
    code.extend(sel::GATE.to_le_bytes());
    let mut guest = with_rax("call gate", Start::User32, &code, 0);
    guest.state.gpr[4] = STACK - 0x40;
    guest.put(STACK - 0x40, &[1, 0, 0, 0, 2, 0, 0, 0]);
    // mov ecx, [esp+8]; mov edx, [esp+12]; retf 8
    let back = [0x8b, 0x4c, 0x24, 0x08, 0x8b, 0x54, 0x24, 0x0c, 0xca, 8, 0];
    guest.put(HANDLERS + 0xfe0, &back);
    let outcome = run(&guest);
    assert_eq!(outcome.state.gpr[1..3], [1, 2]);
    assert_eq!(outcome.state.rip, handler(13), "HLT of user code");
    let [code, rip, cs, _, rsp, ss] = stack::<6>(&outcome, 4);
    assert_eq!((code, rip, cs), (0, 0x7007, sel::USER_CODE32.into()));
    assert_eq!((rsp, ss), (STACK - 0x38, sel::USER_DATA32.into()));
}

#[test]
fn task_and_back() {
    let mut code = vec![0x9a, 0, 0, 0, 0];
    code.extend(sel::TASK_GATE.to_le_bytes());
    let mut guest = with_rax("call task gate", Start::Protected32, &code, 0x55);
    // mov [DATA], ecx; iret
    let mut task = vec![0x89, 0x0d];
    task.extend((DATA as u32).to_le_bytes());
    task.push(0xcf);
    guest.put(0x7800, &task);
    guest.put(TSS2 + 32, &0x7800u32.to_le_bytes());
    let outcome = run(&guest);
    assert_eq!((outcome.state.rip, outcome.state.gpr[0]), (0x7008, 0x55));
    assert_eq!(outcome.state.segments.tr.selector, sel::TSS);
    let data = DATA as usize;
    assert_eq!(outcome.memory[data..data + 4], 0x2222_2222u32.to_le_bytes());
    let eip = TSS as usize + 32;
    assert_eq!(outcome.memory[eip..eip + 4], 0x7007u32.to_le_bytes());
}

#[test]
fn watchpoints_trap_behind_the_write() {
    for start in [Start::Protected32, Start::Long, Start::UserLong] {
        // nop; mov [rbx], eax; nop
        let mut guest = with_rax("write", start, &[0x90, 0x89, 0x03, 0x90], 0x1234);
        guest.state.dr[1] = DATA + 2;
        guest.state.dr7 = 0x400 | 1 << 2 | 0x1 << 20;
        let outcome = run(&guest);
        assert_eq!(outcome.state.rip, handler(1), "{start:?}");
        assert_eq!(outcome.state.dr6, 0xffff_0ff2);
        let width = if start.is_long() { 8 } else { 4 };
        assert_eq!(stack::<1>(&outcome, width), [0x7003]);
    }
}

#[test]
fn monitors_steps_and_breakpoints() {
    let debug = GuestDebug {
        enabled: true,
        single_step: true,
        ..GuestDebug::default()
    };
    let mut guest = with_rax("out; nop", Start::Long, &[0xe6, 0x60, 0x90], 7);
    guest.wishes.debug = debug;
    let step = |pc| Seen::Debug {
        vector: 1,
        pc,
        dr6: 0xffff_4ff0,
    };
    let out = Seen::Out {
        port: 0x60,
        data: vec![7],
    };
    assert_eq!(run(&guest).seen, [out, step(0x7002), step(0x7003)]);
}
