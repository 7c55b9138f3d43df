//! A machine so busy that the vCPU's thread gets no processor for longer than a case may work: it is
//! put to sleep by a signal, wherever it is. The cases end as they do on a quiet machine.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use differential::case::{Batch, Case, Executor, Mode, Patch, Program, State};
use differential::guest::{GuestCpu, Translation};
use differential::layout::DATA_BYTES;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// Longer than the 300 ms that a case may work.
const ASLEEP: Duration = Duration::from_millis(450);
const TIMES: usize = 5;
static DONE: AtomicBool = AtomicBool::new(false);

extern "C" fn sleep(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    std::thread::sleep(ASLEEP);
}

/// Some rounds of a loop that the watchdog's kicks can end.
fn batch() -> Batch {
    let mut state = State::initial();
    state.gpr[1] = 20_000;
    // dec %ecx; jnz
    let code = [0xff, 0xc9, 0x75, 0xfc];
    Batch {
        pattern: Box::new([0; DATA_BYTES]),
        programs: vec![Program::new(Mode::Long, 0x100, &code).unwrap()],
        cases: vec![
            Case {
                program: 0,
                state,
                patches: [Patch::EMPTY; 3],
            };
            32
        ],
    }
}

#[test]
fn time_without_a_processor_is_no_timeout() {
    register_signal_handler(SIGRTMIN(), sleep).unwrap();
    let worker = std::thread::spawn(|| {
        let mut cpu = GuestCpu::new(Translation::Blocks).unwrap();
        let mut outcomes = Vec::new();
        while !DONE.load(Ordering::Relaxed) {
            outcomes.clear();
            cpu.run(&batch(), &mut outcomes).unwrap();
            for outcome in &outcomes {
                assert_eq!(outcome.ending.vector, 3, "{:?}", cpu.remarks());
                assert_eq!(outcome.state.gpr[1], 0);
            }
        }
    });
    for _ in 0..TIMES {
        std::thread::sleep(ASLEEP + Duration::from_millis(20));
        if worker.is_finished() {
            break;
        }
        worker.kill(SIGRTMIN()).unwrap();
    }
    std::thread::sleep(ASLEEP);
    DONE.store(true, Ordering::Relaxed);
    worker.join().unwrap();
}
