//! On the kernel's KVM: a small guest that pages is paused and explained; what the kernel keeps to
//! itself is said. Skipped, with the reason, where `/dev/kvm` does not open.

use std::path::PathBuf;

use accel::{Preference, choose};
use control::{ExplainQuery, MapQuery, MemoryQuery, RegistersAnswer, StateAnswer, VcpuQuery};
use explain::{GuestSide, SecondLevel, TlbSide, map::MemoryMap};

use crate::machine::Running;

const LOAD_AT: u32 = 0x10_0000;
const COUNTER: u32 = 0x20_0000;

/// `inc dword [COUNTER]; jmp back`, in 64-bit mode.
fn code() -> Vec<u8> {
    let mut code = vec![0xff, 0x04, 0x25];
    code.extend(COUNTER.to_le_bytes());
    code.extend([0xeb, 0xf7]);
    code
}

/// An ELF for Linux's 64-bit boot protocol: it is entered with paging on, by the monitor's tables.
fn elf() -> Vec<u8> {
    const HEADER: usize = 64;
    const PROGRAM_HEADER: u8 = 56;
    const CODE_AT: u64 = 0x1000;
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    image.extend(u64::from(LOAD_AT).to_le_bytes());
    image.extend((HEADER as u64).to_le_bytes());
    image.extend([0; 12]);
    image.extend([HEADER as u8, 0, PROGRAM_HEADER, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    let code = code();
    let (at, to, len) = (CODE_AT, u64::from(LOAD_AT), code.len() as u64);
    // A segment to be loaded: read, write, execute.
    for word in [1 | 7 << 32, at, to, to, len, len, 0x1000] {
        image.extend(word.to_le_bytes());
    }
    image.resize(CODE_AT as usize, 0);
    image.extend(code);
    image
}

fn counter(running: &Running) -> Vec<u8> {
    let query = MemoryQuery {
        address: format!("gpa:{COUNTER:#x}"),
        bytes: 4,
        vcpu: None,
    };
    running.client.get_bytes("/memory", &query).unwrap()
}

fn explained(accelerator: &str) {
    let kernel = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("look-counter.elf");
    std::fs::write(&kernel, elf()).unwrap();
    let mut running = Running::start_kernel(accelerator, &kernel);
    let address = format!("gva:{COUNTER:#x}");
    let begun = std::time::Instant::now();
    while counter(&running) == [0; 4] {
        assert!(begun.elapsed().as_secs() < 60, "the guest does not count");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    for _ in 0..20 {
        let paused: StateAnswer = running.client.post("/pause").unwrap();
        assert_eq!(paused.state, control::State::Paused);
        let before = counter(&running);
        let registers: RegistersAnswer = running
            .client
            .get("/registers", &VcpuQuery::default())
            .unwrap();
        assert_eq!(
            registers.general["rip"].get(..6),
            Some("0x1000"),
            "{registers:?}"
        );
        let query = ExplainQuery {
            address: address.clone(),
            ..ExplainQuery::default()
        };
        let chain = running.explain(&query);
        assert_eq!(chain.gpa.unwrap().raw(), u64::from(COUNTER), "{chain}");
        assert!(
            matches!(chain.guest, Some(GuestSide::Page { .. })),
            "{chain}"
        );
        assert!(chain.entries.len() >= 3, "{chain}");
        assert!(
            chain
                .host
                .as_ref()
                .is_some_and(|host| host.state != "absent")
        );
        let hidden = matches!(chain.second_level, Some(SecondLevel::Hidden { .. }));
        assert_eq!(hidden, accelerator == "kvm", "{chain}");
        let hidden = matches!(chain.tlb, Some(TlbSide::Hidden { .. }));
        assert_eq!(hidden, accelerator == "kvm", "{chain}");
        assert_eq!(counter(&running), before, "paused");
        let _: StateAnswer = running.client.post("/resume").unwrap();
    }
    let map: MemoryMap = running.client.get("/map", &MapQuery::default()).unwrap();
    assert!(map.regions.iter().any(|region| region.total.resident > 0));
    let before = counter(&running);
    let begun = std::time::Instant::now();
    while counter(&running) == before {
        assert!(begun.elapsed().as_secs() < 60, "the guest goes on");
    }
    let name = format!("count-{accelerator}");
    assert_eq!(
        running.fourfold(&["stop", &name]),
        format!("{name}: stopped\n")
    );
    running.end();
}

#[test]
fn a_small_guest_is_explained_on_the_kernels_kvm() {
    match choose(Preference::Kernel) {
        Ok(_) => explained("kvm"),
        Err(refused) => {
            assert!(std::env::var_os("REQUIRE_KVM").is_none(), "{refused}");
            eprintln!("skipped: {refused}");
        }
    }
}

#[test]
fn the_same_guest_is_explained_on_ours() {
    explained("user");
}
