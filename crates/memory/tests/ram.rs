//! Guest RAM as the host sees it, through `/proc`.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use addr::{Address, Gpa};
use memory::access;
use memory::pagemap::{FrameNumber, PageState, Pagemap};
use memory::ram::{
    Backing, Dump, GuestRam, HugePage, Ksm, Numa, NumaPolicy, Prefault, RamConfig, RamError,
    Sharing, Thp, guest_memory,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Tests that measure the whole process take turns.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A line of `/proc/self/status`, in bytes.
fn status(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix(field)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn scratch_file(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("fourfold-{name}-{}", std::process::id()))
}

fn anonymous(size: u64) -> RamConfig {
    RamConfig {
        backing: Backing::Anonymous,
        ..RamConfig::new(size)
    }
}

#[test]
fn untouched_ram_costs_nothing() {
    let _alone = alone();
    for config in [RamConfig::new(64 * GIB), anonymous(64 * GIB)] {
        let before = status("VmRSS:");
        let ram = GuestRam::new(&config).unwrap();
        for page in 0..16 {
            access::store_word(ram.hva().wrapping_add(page * 4 * GIB), 1_u8).unwrap();
        }
        let grown = status("VmRSS:").saturating_sub(before);
        // 16 pages touched; at worst each became a transparent huge page.
        assert!(
            grown <= 16 * 2 * MIB + MIB,
            "64 GiB untouched cost {grown} bytes"
        );
    }
}

#[test]
fn prefaulting_allocates_and_tells() {
    let _alone = alone();
    let config = RamConfig {
        prefault: true,
        ..anonymous(160 * MIB)
    };
    let before = status("VmRSS:");
    let mut told = Vec::new();
    let ram = GuestRam::with_progress(&config, |p| told.push(p)).unwrap();
    assert!(status("VmRSS:") - before >= 150 * MIB);
    let step = |mib| Prefault {
        done: mib * MIB,
        total: 160 * MIB,
    };
    assert_eq!(told, [step(64), step(128), step(160)]);
    ram.discard(0, 128 * MIB).unwrap();
    assert!(
        status("VmRSS:") - before < 48 * MIB,
        "discarded pages are still there"
    );
}

#[test]
fn discarded_pages_read_as_zeroes() {
    for config in [RamConfig::new(MIB), anonymous(MIB)] {
        let ram = GuestRam::new(&config).unwrap();
        access::fill(ram.hva(), 7, MIB).unwrap();
        ram.discard(0x1000, 0x1000).unwrap();
        let at = |offset| access::load(ram.hva().wrapping_add(offset), 1).unwrap();
        assert_eq!((at(0xfff), at(0x1000), at(0x2000)), (7, 0, 7));
        for (offset, len) in [(1, 0x1000), (0, 1), (MIB, 0x1000), (!0xfff, 0x1000)] {
            assert!(ram.discard(offset, len).is_err(), "{offset:#x}+{len:#x}");
        }
    }
}

#[test]
fn absurd_sizes_are_refused() {
    for size in [0, 1, 4095, 4097, u64::MAX, !0xfff, 1 << 63] {
        let refused = GuestRam::new(&RamConfig::new(size)).unwrap_err();
        assert!(
            matches!(refused, RamError::Size { .. }),
            "{size:#x}: {refused}"
        );
    }
    for config in [RamConfig::new(1 << 60), anonymous(1 << 60)] {
        let refused = GuestRam::new(&config).unwrap_err();
        assert!(
            matches!(refused, RamError::Map { .. } | RamError::File { .. }),
            "{refused}"
        );
    }
    let huge = Backing::HugeTlb(HugePage::Size2M);
    let refused = GuestRam::new(&RamConfig {
        backing: huge,
        ..RamConfig::new(4096)
    });
    assert!(matches!(
        refused,
        Err(RamError::Size {
            page: 0x20_0000,
            ..
        })
    ));
}

#[test]
fn a_memfd_can_be_shared() {
    let ram = GuestRam::new(&RamConfig::new(MIB)).unwrap();
    access::store_word(ram.hva().wrapping_add(0x8000), 0xfeed_u16).unwrap();
    let (fd, offset) = ram.file().unwrap();
    let file = std::fs::File::from(fd.try_clone_to_owned().unwrap());
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes, offset + 0x8000).unwrap();
    assert_eq!(u16::from_le_bytes(bytes), 0xfeed);
    assert!(GuestRam::new(&anonymous(MIB)).unwrap().file().is_none());
}

#[test]
fn a_file_is_grown_and_kept() {
    let path = scratch_file("shared");
    std::fs::write(&path, [1, 2, 3]).unwrap();
    let config = |sharing| RamConfig {
        backing: Backing::File {
            path: path.clone(),
            sharing,
        },
        ..RamConfig::new(MIB)
    };
    let private = GuestRam::new(&config(Sharing::Private)).unwrap();
    assert_eq!(access::load(private.hva(), 4), Ok(0x030201));
    access::store_word(private.hva(), 9_u8).unwrap();
    let shared = GuestRam::new(&config(Sharing::Shared)).unwrap();
    assert_eq!(
        access::load(shared.hva(), 1),
        Ok(1),
        "private writes stay private"
    );
    access::store_word(shared.hva(), 8_u8).unwrap();
    private.discard(0, 4096).unwrap();
    assert_eq!(
        access::load(private.hva(), 1),
        Ok(8),
        "back to the file's bytes"
    );
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!((bytes.len() as u64, bytes[0]), (MIB, 8));
}

#[test]
fn a_file_that_can_not_be_is_an_error() {
    let path = PathBuf::from("/nowhere/at/all");
    let backing = Backing::File {
        path,
        sharing: Sharing::Shared,
    };
    let refused = GuestRam::new(&RamConfig {
        backing,
        ..RamConfig::new(MIB)
    })
    .unwrap_err();
    assert!(matches!(refused, RamError::File { action: "open", .. }));
}

#[test]
fn a_truncated_file_is_a_fault_not_a_crash() {
    let ram = GuestRam::new(&RamConfig::new(MIB)).unwrap();
    let (fd, _) = ram.file().unwrap();
    std::fs::File::from(fd.try_clone_to_owned().unwrap())
        .set_len(0)
        .unwrap();
    let fault = access::load_word::<u64>(ram.hva()).unwrap_err();
    assert_eq!((fault.hva, fault.cause), (ram.hva(), access::Cause::Bus));
}

#[test]
fn huge_pages_or_a_clear_error() {
    for page in [HugePage::Size2M, HugePage::Size1G] {
        let backing = Backing::HugeTlb(page);
        match GuestRam::new(&RamConfig {
            backing,
            ..RamConfig::new(page.bytes())
        }) {
            Ok(ram) => {
                assert_eq!(ram.page_bytes(), page.bytes());
                access::store_word(ram.hva(), 1_u8).unwrap();
            }
            // The host has reserved none.
            Err(error) => assert!(matches!(
                error,
                RamError::Map { .. } | RamError::File { .. }
            )),
        }
    }
}

#[test]
fn options_of_the_host() {
    let plain = anonymous(4 * MIB);
    let numa = |policy, nodes: &[u8]| {
        Some(Numa {
            policy,
            nodes: nodes.to_vec(),
        })
    };
    for config in [
        RamConfig {
            thp: Thp::Never,
            ..plain.clone()
        },
        RamConfig {
            thp: Thp::Default,
            dump: Dump::Include,
            ..plain.clone()
        },
    ] {
        GuestRam::new(&config).unwrap();
    }
    for bad in [
        numa(NumaPolicy::Bind, &[]),
        numa(NumaPolicy::Preferred, &[64]),
    ] {
        let refused = GuestRam::new(&RamConfig {
            numa: bad,
            ..plain.clone()
        })
        .unwrap_err();
        assert!(matches!(
            refused,
            RamError::Option {
                option: "the NUMA nodes",
                ..
            }
        ));
    }
    // A host without NUMA or KSM says so; one that has them takes node 0 and the advice.
    for config in [
        RamConfig {
            numa: numa(NumaPolicy::Bind, &[0]),
            ..plain.clone()
        },
        RamConfig {
            numa: numa(NumaPolicy::Interleave, &[0]),
            ..plain.clone()
        },
        RamConfig {
            ksm: Ksm::Mergeable,
            ..plain.clone()
        },
    ] {
        match GuestRam::new(&config) {
            Ok(ram) => access::store_word(ram.hva(), 1_u8).unwrap(),
            Err(error) => assert!(matches!(error, RamError::Option { .. }), "{error}"),
        }
    }
}

#[test]
fn ram_is_kept_out_of_core_dumps() {
    let ram = GuestRam::new(&RamConfig::new(MIB)).unwrap();
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let head = format!("{:x}-", ram.hva());
    let head = head.trim_start_matches("0x");
    let mut mine = smaps.lines().skip_while(|l| !l.starts_with(head));
    let flags = mine.find_map(|l| l.strip_prefix("VmFlags:")).unwrap();
    assert!(flags.split_whitespace().any(|f| f == "dd"), "{flags}");
}

#[test]
fn the_view_of_several_blocks() {
    let low = GuestRam::new(&RamConfig::new(MIB)).unwrap();
    let high = GuestRam::new(&RamConfig::new(MIB)).unwrap();
    let view = guest_memory(&[(Gpa::new(4 * GIB), &high), (Gpa::new(0), &low)]).unwrap();
    view.write_obj(7_u8, GuestAddress(4 * GIB)).unwrap();
    assert_eq!(access::load(high.hva(), 1), Ok(7));
    assert_eq!(view.num_regions(), 2);
    for gpa in [0x1000, u64::MAX - 0xfff] {
        let refused = guest_memory(&[(Gpa::new(0), &low), (Gpa::new(gpa), &high)]).unwrap_err();
        assert!(matches!(refused, RamError::Layout { .. }), "{gpa:#x}");
    }
}

#[test]
fn the_host_page_behind_an_address() {
    let pagemap = Pagemap::of_self().unwrap();
    let ram = GuestRam::new(&RamConfig {
        thp: Thp::Never,
        ..RamConfig::new(MIB)
    })
    .unwrap();
    let at = ram.hva().wrapping_add(0x3123);
    assert_eq!(pagemap.look_up(at).unwrap().entry.state, PageState::Absent);
    access::store_word(at, 1_u8).unwrap();
    let page = pagemap.look_up(at).unwrap();
    match page.entry.state {
        PageState::Present(FrameNumber::Known(frame)) => assert_ne!(frame.number(), 0),
        PageState::Present(FrameNumber::Hidden) => assert_eq!(page.flags, None),
        state => panic!("a page that was just written is {state:?}"),
    }
    assert!(page.entry.file_or_shared, "a memfd is a file");
    let all = pagemap.look_up_range(ram.range()).unwrap();
    let present = |p: &&memory::pagemap::HostPage| p.entry.state != PageState::Absent;
    assert_eq!((all.len(), all.iter().filter(present).count()), (256, 1));
    assert_eq!(all[3], page);
}

#[test]
fn the_mapping_behind_an_address() {
    let pagemap = Pagemap::of_process(std::process::id()).unwrap();
    let ram = GuestRam::new(&RamConfig::new(MIB)).unwrap();
    let at = ram.hva().wrapping_add(0x3123);
    let mapping = pagemap.mapping(at).unwrap().unwrap();
    assert!(mapping.permissions.shared && mapping.is_file());
    assert!(
        mapping
            .path
            .as_ref()
            .unwrap()
            .to_string_lossy()
            .contains("guest-ram")
    );
    assert_eq!(mapping.file_offset(at), Some(0x3123));
    assert_eq!(pagemap.mapping(addr::Hva::new(0)).unwrap(), None);
    assert!(Pagemap::of_process(u32::MAX).is_err());
    let beyond = pagemap.look_up(addr::Hva::new(u64::MAX)).unwrap();
    assert_eq!(beyond.entry.state, PageState::Absent);
}
