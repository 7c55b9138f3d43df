//! `fourfold explain`, `map`, `faults` and `pause` of a program under `fourfold exec`: a control
//! socket, from the program's first vCPU on.
//!
//! It costs the program one thread, deaf to signals and asleep in `poll` until somebody asks, and two
//! descriptors. It is left out with `fourfold exec --private`, where there is no folder for it, and it
//! is given up by a program that filters its system calls: what answers there would not pass.
//!
//! A child of `fork` has no such thread, and closes its copies of the descriptors, so that the socket
//! is as alive as the program that it names. The files go when the program exits; those of one that
//! dies otherwise are removed by the next who looks.

use std::ffi::c_int;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};

use control::{Directory, Program, Server, Start};

use crate::next::next;
use crate::process;
use crate::settings::{Accel, Settings};

static SERVER: Mutex<Option<Server>> = Mutex::new(None);
/// The descriptors that a child must close.
static DESCRIPTORS: [AtomicI32; 2] = [const { AtomicI32::new(-1) }; 2];

/// The program has a vCPU. To be called in a [`kvm::signals::Call`].
pub(crate) fn start() {
    static ONCE: Once = Once::new();
    let settings = Settings::get();
    if settings.accel == Accel::Kernel || settings.private || !process::is_owner() {
        return;
    }
    // The program runs as well where nobody can look at it.
    ONCE.call_once(|| {
        let _ = serve();
    });
}

fn serve() -> Result<(), control::ServerError> {
    let name = format!("{}-{}", program_name(), std::process::id());
    let claim = Directory::of_user()?.claim(&name)?;
    let server = Server::start(claim, Program::new(&name, newest), Start::WhenAsked)?;
    for (slot, fd) in DESCRIPTORS.iter().zip(server.descriptors()) {
        slot.store(fd, Ordering::Relaxed);
    }
    // SAFETY: functions without arguments that do not unwind.
    unsafe {
        libc::pthread_atfork(None, None, Some(in_child));
        libc::atexit(at_exit);
    }
    *SERVER.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
    Ok(())
}

/// The program filters its system calls from now on.
pub(crate) fn give_up() {
    if let Ok(server) = SERVER.lock()
        && let Some(server) = &*server
        && process::is_owner()
    {
        server.remove_files();
    }
}

/// The command's name, as far as it can be part of a machine's.
fn program_name() -> String {
    let name = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
    let good = |c: &char| c.is_ascii_alphanumeric() || "._-".contains(*c);
    let name: String = name.trim().chars().filter(good).collect();
    match name.trim_start_matches('.') {
        "" => "program".to_owned(),
        name => name.to_owned(),
    }
}

fn newest() -> Option<Arc<kvm::Vm>> {
    let mut vms = kvm::fds::vms();
    vms.retain(|vm| !vm.vcpus().is_empty());
    vms.pop()
}

extern "C" fn in_child() {
    for slot in &DESCRIPTORS {
        let fd: RawFd = slot.swap(-1, Ordering::Relaxed);
        if fd >= 0 {
            next!(c"close" as fn(fd: c_int) -> c_int);
        }
    }
}

extern "C" fn at_exit() {
    give_up();
}
