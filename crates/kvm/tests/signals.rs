//! A program's signals during `KVM_RUN`.
#![expect(unsafe_code, reason = "installs signal handlers and sends signals")]

use std::sync::atomic::{AtomicU32, Ordering};

use kvm::signals::{Ended, Interrupt, Section, SignalSet, adopt, sigaction, unblocked_by};

#[derive(Default)]
struct Vcpu(AtomicU32);

impl Interrupt for Vcpu {
    fn interrupt(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn handle(signal: libc::c_int, handler: extern "C" fn(libc::c_int)) {
    // SAFETY: a zeroed action with a handler of the plain kind.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        assert_eq!(
            libc::sigaction(signal, &raw const action, std::ptr::null_mut()),
            0
        );
    }
}

fn send(signal: libc::c_int) {
    // SAFETY: sends a signal to this thread.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal) };
}

fn set_of(signal: libc::c_int) -> libc::sigset_t {
    // SAFETY: fills in a set of ours.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        set
    }
}

static USR1: AtomicU32 = AtomicU32::new(0);
extern "C" fn on_usr1(_: libc::c_int) {
    USR1.fetch_add(1, Ordering::SeqCst);
}

#[test]
fn a_handler_runs_after_the_section_and_once() {
    handle(libc::SIGUSR1, on_usr1);
    adopt();
    send(libc::SIGUSR1);
    assert_eq!(
        USR1.load(Ordering::SeqCst),
        1,
        "outside, a handler runs at once"
    );
    let vcpu = Vcpu::default();
    let section = Section::enter(&vcpu, None);
    assert!(!section.noted());
    send(libc::SIGUSR1);
    assert!(section.noted());
    assert_eq!(vcpu.0.load(Ordering::SeqCst), 1, "the vCPU is told");
    assert_eq!(USR1.load(Ordering::SeqCst), 1, "the handler waits");
    assert_eq!(section.leave(), Ended::BySignal);
    assert_eq!(USR1.load(Ordering::SeqCst), 2);
    send(libc::SIGUSR1);
    assert_eq!(
        USR1.load(Ordering::SeqCst),
        3,
        "the mask is the thread's again"
    );
}

#[test]
fn a_masked_signal_interrupts_and_stays_pending() {
    let set = set_of(libc::SIGUSR2);
    // SAFETY: a set of ours; SIGUSR2 has no handler, so it must never be delivered.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    let mask = SignalSet(0);
    unblocked_by(mask);
    let vcpu = Vcpu::default();
    let section = Section::enter(&vcpu, Some(mask));
    send(libc::SIGUSR2);
    assert!(section.noted());
    assert_eq!(section.leave(), Ended::BySignal);
    let now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: waits for nothing; takes the pending signal.
    let got = unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const now) };
    assert_eq!(got, libc::SIGUSR2);
}

static HUP: AtomicU32 = AtomicU32::new(0);
extern "C" fn on_hup(_: libc::c_int) {
    HUP.fetch_add(1, Ordering::SeqCst);
}

#[test]
fn the_program_sees_its_own_handlers() {
    // SAFETY: actions of ours.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_hup as *const () as usize;
        assert_eq!(
            sigaction(libc::SIGHUP, &raw const action, std::ptr::null_mut()),
            0
        );
        let mut seen: libc::sigaction = std::mem::zeroed();
        assert_eq!(sigaction(libc::SIGHUP, std::ptr::null(), &raw mut seen), 0);
        assert_eq!(seen.sa_sigaction, on_hup as *const () as usize);
    }
    send(libc::SIGHUP);
    assert_eq!(HUP.load(Ordering::SeqCst), 1);
}

#[test]
fn a_signal_ends_a_run() {
    let system = kvm::System::new(kvm::PagingPath::Nested);
    let vm = system.create_vm(0).unwrap();
    vm.create_irqchip().unwrap();
    let vcpu = vm.create_vcpu(1).unwrap();
    handle(libc::SIGALRM, on_alarm);
    // An application processor sleeps until its INIT: nothing but a signal ends its run.
    // SAFETY: names this thread.
    let target = unsafe { libc::pthread_self() };
    let sender = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(60));
        // SAFETY: the thread is waiting for this one.
        unsafe { libc::pthread_kill(target, libc::SIGALRM) };
    });
    assert_eq!(vcpu.run(), Err(kvm::Errno::EINTR));
    sender.join().unwrap();
    assert!(ALARM.load(Ordering::SeqCst) >= 1, "the handler has run");
}

static ALARM: AtomicU32 = AtomicU32::new(0);
extern "C" fn on_alarm(_: libc::c_int) {
    ALARM.fetch_add(1, Ordering::SeqCst);
}
