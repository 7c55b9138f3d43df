use std::ptr;

use addr::{Address, Hva};

use super::*;

const PAGE: u64 = 4096;

/// Two pages, of which the second is inaccessible.
struct Edge(Hva);

impl Edge {
    fn new() -> Self {
        install();
        // SAFETY: a fresh anonymous mapping, whose second page we take away.
        unsafe {
            let p = libc::mmap(
                ptr::null_mut(),
                2 * PAGE as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(p, libc::MAP_FAILED);
            let second = p.cast::<u8>().add(PAGE as usize).cast();
            assert_eq!(libc::mprotect(second, PAGE as usize, libc::PROT_NONE), 0);
            Self(Hva::new(p as u64))
        }
    }

    fn end(&self) -> Hva {
        self.0.wrapping_add(PAGE)
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        // SAFETY: our own mapping, no reference into it exists.
        unsafe { libc::munmap(self.0.raw() as *mut libc::c_void, 2 * PAGE as usize) };
    }
}

#[test]
fn words_of_every_size_at_every_alignment() {
    let edge = Edge::new();
    for offset in 0..16 {
        let at = edge.0.wrapping_add(offset);
        store_word(at, 0x0123_4567_89ab_cdef_u64).unwrap();
        assert_eq!(load_word::<u64>(at), Ok(0x0123_4567_89ab_cdef));
        assert_eq!(load_word::<u32>(at), Ok(0x89ab_cdef));
        assert_eq!(load_word::<u16>(at), Ok(0xcdef));
        assert_eq!(load_word::<u8>(at), Ok(0xef));
        for len in 1..=8 {
            store(at, u64::MAX, 8).unwrap();
            store(at, 0, len).unwrap();
            let all_ones = u64::MAX.checked_shl(8 * len as u32).unwrap_or(0);
            assert_eq!(load(at, 8), Ok(all_ones));
            assert_eq!(load(at, len), Ok(0));
        }
    }
}

#[test]
fn a_fault_is_an_error_with_its_address() {
    let edge = Edge::new();
    let end = edge.end();
    let segment = HostFault {
        hva: end,
        cause: Cause::Segment,
    };
    assert_eq!(load_word::<u8>(end), Err(segment));
    assert_eq!(store_word(end, 1_u16), Err(segment));
    assert_eq!(compare_exchange(end, 0_u32, 1), Err(segment));
    let before = end.checked_sub(4).unwrap();
    assert_eq!(load_word::<u64>(before).unwrap_err().hva, before);
    for bad in [
        0,
        0xfff,
        0x8000_0000_0000_0000,
        0xffff_8000_0000_0000,
        u64::MAX,
    ] {
        assert_eq!(
            load_word::<u8>(Hva::new(bad)).unwrap_err().hva,
            Hva::new(bad)
        );
    }
}

#[test]
fn a_copy_stops_at_the_byte_that_faults() {
    let edge = Edge::new();
    let start = edge.end().checked_sub(10).unwrap();
    write(start, &[7; 10]).unwrap();
    let mut buffer = [0; 16];
    let fault = read(start, &mut buffer).unwrap_err();
    assert_eq!(fault.hva, edge.end());
    assert_eq!(buffer, [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0, 0, 0, 0, 0, 0]);
    assert_eq!(write(start, &[9; 16]).unwrap_err().hva, edge.end());
    assert_eq!(load_word::<u8>(edge.end().checked_sub(1).unwrap()), Ok(9));
    assert_eq!(fill(start, 3, 11).unwrap_err().hva, edge.end());
    assert_eq!(load(start, 2), Ok(0x0303));
    assert_eq!(copy(edge.0, start, 10), Ok(()));
    assert_eq!(load(edge.0, 3), Ok(0x030303));
}

#[test]
fn compare_exchange_tells_what_was_there() {
    let edge = Edge::new();
    store_word(edge.0, 5_u64).unwrap();
    assert_eq!(compare_exchange(edge.0, 4_u64, 9), Ok(5));
    assert_eq!(compare_exchange(edge.0, 5_u64, 9), Ok(5));
    assert_eq!(compare_exchange(edge.0, 9_u8, 1), Ok(9));
    assert_eq!(load(edge.0, 8), Ok(1));
}

#[test]
fn a_truncated_file_is_a_bus_fault() {
    install();
    // SAFETY: plain system calls on a file and a mapping of our own.
    let (fd, p) = unsafe {
        let fd = libc::memfd_create(c"truncated".as_ptr(), 0);
        assert_eq!(libc::ftruncate(fd, PAGE as i64), 0);
        let p = libc::mmap(
            ptr::null_mut(),
            PAGE as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd,
            0,
        );
        assert_ne!(p, libc::MAP_FAILED);
        (fd, p)
    };
    let hva = Hva::new(p as u64);
    assert_eq!(store_word(hva, 1_u8), Ok(()));
    // SAFETY: our own file.
    assert_eq!(unsafe { libc::ftruncate(fd, 0) }, 0);
    assert_eq!(load_word::<u8>(hva).unwrap_err().cause, Cause::Bus);
    // SAFETY: our own mapping and file, not used afterwards.
    unsafe {
        libc::munmap(p, PAGE as usize);
        libc::close(fd);
    }
}

#[test]
fn a_hook_sees_what_the_table_does_not_know() {
    fn skip_ud2(state: &mut Context<'_>) -> Verdict {
        const MAGIC: i64 = 0x466f_7572;
        if state.registers[libc::REG_R9 as usize] != MAGIC {
            return Verdict::Pass;
        }
        state.registers[libc::REG_RIP as usize] += 3;
        state.registers[libc::REG_R9 as usize] = state.address.raw() as i64;
        Verdict::Resume
    }
    let edge = Edge::new();
    assert!(register_hook(skip_ud2));
    assert!(
        register_hook(skip_ud2),
        "the same hook again needs no place"
    );
    let mut r9 = 0x466f_7572_u64;
    // SAFETY: the load faults and the hook skips its three bytes.
    unsafe {
        std::arch::asm!(
            "mov rax, qword ptr [rcx]",
            in("rcx") edge.end().raw(),
            inout("r9") r9,
            out("rax") _,
        );
    }
    assert_eq!(r9, edge.end().raw());
}
