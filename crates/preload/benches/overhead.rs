//! What a call costs through the preload library, beside the same call made to the crate `kvm`
//! directly: both in one run, alternating, medians.
//!
//! The library is loaded with `dlopen` and called through its own `open` and `ioctl`, as a program
//! calls them that it was preloaded into; it has registry and objects of its own.
#![expect(
    unsafe_code,
    reason = "calls C functions of a library loaded at run time"
)]

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulong, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use kvm::{PagingPath, System};
use kvm_bindings::kvm_regs;

const ROUNDS: usize = 31;
const CALLS: u32 = 20_000;

const KVM_CREATE_VM: c_ulong = 0xae01;
const KVM_CHECK_EXTENSION: c_ulong = 0xae03;
const KVM_CREATE_VCPU: c_ulong = 0xae41;
const KVM_RUN: c_ulong = 0xae80;
const KVM_GET_REGS: c_ulong = 0x8090_ae81;
const KVM_CAP_USER_MEMORY: u64 = 3;

type Open = unsafe extern "C" fn(*const c_char, c_int, c_uint) -> c_int;
type Ioctl = unsafe extern "C" fn(c_int, c_ulong, *mut c_void) -> c_int;

/// The library, built for release.
fn library() -> PathBuf {
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "--package", "preload"])
        .status();
    assert!(built.is_ok_and(|s| s.success()), "building the library");
    let bench = std::env::current_exe().expect("a program has a path");
    let folder = bench.ancestors().nth(2).expect("cargo's folders");
    folder.join("libfourfold_preload.so")
}

/// # Safety
/// `T` is the type of the function.
unsafe fn symbol<T: Copy>(library: *mut c_void, name: &CStr) -> T {
    // SAFETY: the name is a C string; the caller vouches for the type.
    unsafe {
        let found = libc::dlsym(library, name.as_ptr());
        assert!(!found.is_null(), "no {name:?}");
        std::mem::transmute_copy(&found)
    }
}

/// A vCPU on each side.
struct Both {
    ioctl: Ioctl,
    /// Descriptors of the library.
    system: c_int,
    vcpu: c_int,
    /// Objects of the crate.
    own_system: std::sync::Arc<System>,
    own_vcpu: std::sync::Arc<kvm::Vcpu>,
    _own_vm: std::sync::Arc<kvm::Vm>,
}

impl Both {
    fn new() -> Self {
        let path = library();
        let path = CString::new(path.to_str().expect("a path in UTF-8")).expect("no zero in it");
        // SAFETY: C strings; functions of these types; descriptors of the library's.
        unsafe {
            let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            assert!(!library.is_null(), "{path:?} does not load");
            let open: Open = symbol(library, c"open");
            let ioctl: Ioctl = symbol(library, c"ioctl");
            let system = open(c"/dev/kvm".as_ptr(), libc::O_RDWR, 0);
            let vm = ioctl(system, KVM_CREATE_VM, std::ptr::null_mut());
            let vcpu = ioctl(vm, KVM_CREATE_VCPU, std::ptr::null_mut());
            assert!(vcpu >= 0, "no vCPU from the library");
            let run = libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu,
                0,
            );
            let run = run.cast::<kvm_bindings::kvm_run>();
            (*run).immediate_exit = 1;
            let own_system = System::new(PagingPath::Nested);
            let own_vm = own_system.create_vm(0).expect("a VM");
            let own_vcpu = own_vm.create_vcpu(0).expect("a vCPU");
            let own_run = own_vcpu.run_page();
            own_run
                .immediate_exit()
                .store(1, std::sync::atomic::Ordering::Relaxed);
            Self {
                ioctl,
                system,
                vcpu,
                own_system,
                own_vcpu,
                _own_vm: own_vm,
            }
        }
    }

    fn through_library(&self, fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
        // SAFETY: a descriptor of the library's, and an argument that fits the request.
        unsafe { (self.ioctl)(fd, request, argument) }
    }
}

/// Nanoseconds a call.
fn time(mut call: impl FnMut()) -> f64 {
    let started = Instant::now();
    for _ in 0..CALLS {
        call();
    }
    started.elapsed().as_secs_f64() * 1e9 / f64::from(CALLS)
}

fn compare(name: &str, mut library: impl FnMut(), mut direct: impl FnMut()) {
    let (mut through, mut without) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        through.push(time(&mut library));
        without.push(time(&mut direct));
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[ROUNDS / 2]
    };
    let (through, without) = (median(through), median(without));
    let more = through - without;
    println!("{name:<36} {through:>10.0} {without:>10.0} {more:>10.0}");
}

fn main() {
    let both = Both::new();
    println!(
        "{:<36} {:>10} {:>10} {:>10}",
        "ns a call, medians", "library", "crate", "more"
    );
    let mut regs = kvm_regs::default();
    compare(
        "KVM_CHECK_EXTENSION",
        || {
            let cap = KVM_CAP_USER_MEMORY as *mut c_void;
            assert_eq!(
                both.through_library(both.system, KVM_CHECK_EXTENSION, cap),
                1
            );
        },
        || {
            std::hint::black_box(&both.own_system);
            assert_eq!(
                kvm::table::capability(std::hint::black_box(KVM_CAP_USER_MEMORY)),
                1
            );
        },
    );
    compare(
        "KVM_GET_REGS",
        || {
            let regs = (&raw mut regs).cast();
            assert_eq!(both.through_library(both.vcpu, KVM_GET_REGS, regs), 0);
        },
        || {
            std::hint::black_box(both.own_vcpu.get_regs());
        },
    );
    compare(
        "KVM_RUN, left at once",
        || {
            let null = std::ptr::null_mut();
            assert_eq!(both.through_library(both.vcpu, KVM_RUN, null), -1);
        },
        || {
            assert!(both.own_vcpu.run().is_err());
        },
    );
}
