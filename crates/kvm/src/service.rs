//! The one thread a VM has for itself: host timers and eventfds.
//!
//! It sleeps in `epoll_wait` on one timerfd and on every eventfd that somebody watches. Setting an
//! alarm never wakes it: the caller programs the timerfd itself, and only if the earliest alarm has
//! changed. The thread starts with the first alarm or watch, so a VM without either has none.
//!
//! No lock of this module is held while a target is called. Targets are held weakly: what is gone
//! is not called.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::clock::time::monotonic_ns;
use crate::errno::Errno;
use crate::irqchip::apic::Alarm;
use crate::signals::Blocked;

/// Who is called when an alarm goes off.
pub trait Expire: Send + Sync {
    /// The time has come (or had, and the alarm was changed since: look again).
    fn expired(&self);
}

/// Who is called when a watched descriptor is readable.
pub trait Ready: Send + Sync {
    /// It is readable.
    fn ready(&self);
}

const TOKEN_STOP: u64 = 0;
const TOKEN_TIMER: u64 = 1;

struct AlarmSlot {
    at: Option<u64>,
    target: Weak<dyn Expire>,
}

#[derive(Default)]
struct Alarms {
    slots: Vec<Option<AlarmSlot>>,
    /// What the timerfd is set to.
    armed: Option<u64>,
}

struct Shared {
    epoll: OwnedFd,
    timer: OwnedFd,
    stop: EventFd,
    stopped: AtomicBool,
    alarms: Mutex<Alarms>,
    watches: Mutex<HashMap<u64, Weak<dyn Ready>>>,
    next_token: AtomicU64,
}

/// The thread and its way in.
pub struct Service {
    shared: Arc<Shared>,
    thread: OnceLock<JoinHandle<()>>,
}

/// One alarm.
pub struct AlarmHandle {
    shared: Arc<Shared>,
    slot: usize,
}

/// One watched descriptor; dropped, it is watched no longer.
pub struct Watch {
    shared: Arc<Shared>,
    token: u64,
    fd: RawFd,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Service {
    /// Prepares the thread, without starting it.
    pub fn new() -> Result<Service, Errno> {
        let shared = Shared {
            epoll: epoll_create()?,
            timer: timerfd_create()?,
            stop: EventFd::new(EFD_NONBLOCK)?,
            stopped: AtomicBool::new(false),
            alarms: Mutex::default(),
            watches: Mutex::default(),
            next_token: AtomicU64::new(TOKEN_TIMER + 1),
        };
        shared.add(shared.stop.as_raw_fd(), TOKEN_STOP)?;
        shared.add(shared.timer.as_raw_fd(), TOKEN_TIMER)?;
        Ok(Service {
            shared: Arc::new(shared),
            thread: OnceLock::new(),
        })
    }

    fn start(&self) {
        self.thread.get_or_init(|| {
            let shared = Arc::clone(&self.shared);
            let _signals = Blocked::all();
            std::thread::Builder::new()
                .name("kvm-service".into())
                .spawn(move || shared.run())
                .expect("the host has threads for its VMs")
        });
    }

    /// A new alarm, not set. Whom it calls is told with [`AlarmHandle::set_target`].
    pub fn alarm(&self) -> AlarmHandle {
        self.start();
        let nobody: Weak<dyn Expire> = Weak::<Nobody>::new();
        let slot = AlarmSlot {
            at: None,
            target: nobody,
        };
        let mut alarms = lock(&self.shared.alarms);
        let free = alarms.slots.iter().position(Option::is_none);
        let at = free.unwrap_or(alarms.slots.len());
        match free {
            Some(at) => alarms.slots[at] = Some(slot),
            None => alarms.slots.push(Some(slot)),
        }
        AlarmHandle {
            shared: Arc::clone(&self.shared),
            slot: at,
        }
    }

    /// Watches a descriptor, level-triggered: the target reads it empty.
    pub fn watch(&self, fd: RawFd, target: Weak<dyn Ready>) -> Result<Watch, Errno> {
        self.start();
        let token = self.shared.next_token.fetch_add(1, Ordering::Relaxed);
        lock(&self.shared.watches).insert(token, target);
        let watch = Watch {
            shared: Arc::clone(&self.shared),
            token,
            fd,
        };
        self.shared.add(fd, token)?;
        Ok(watch)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        // Writing 1 to an eventfd of our own that is never near its maximum can't fail.
        let _ = self.shared.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

struct Nobody;

impl Expire for Nobody {
    fn expired(&self) {}
}

impl AlarmHandle {
    /// Whom the alarm calls.
    pub fn set_target(&self, target: Weak<dyn Expire>) {
        if let Some(slot) = &mut lock(&self.shared.alarms).slots[self.slot] {
            slot.target = target;
        }
    }
}

impl Alarm for AlarmHandle {
    fn set(&self, at: Option<u64>) {
        let mut alarms = lock(&self.shared.alarms);
        if let Some(slot) = &mut alarms.slots[self.slot] {
            slot.at = at;
        }
        self.shared.program(&mut alarms);
    }
}

impl Drop for AlarmHandle {
    fn drop(&mut self) {
        lock(&self.shared.alarms).slots[self.slot] = None;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        lock(&self.shared.watches).remove(&self.token);
        epoll_delete(&self.shared.epoll, self.fd);
    }
}

impl Shared {
    fn add(&self, fd: RawFd, token: u64) -> Result<(), Errno> {
        epoll_add(&self.epoll, fd, token)
    }

    /// Sets the timerfd to the earliest alarm.
    fn program(&self, alarms: &mut Alarms) {
        let earliest = alarms
            .slots
            .iter()
            .flatten()
            .filter_map(|slot| slot.at)
            .min();
        if earliest != alarms.armed {
            alarms.armed = earliest;
            timerfd_set(&self.timer, earliest);
        }
    }

    fn run(&self) {
        while !self.stopped.load(Ordering::SeqCst) {
            for token in epoll_wait(&self.epoll) {
                match token {
                    TOKEN_STOP => return,
                    TOKEN_TIMER => self.expire(),
                    token => {
                        let target = lock(&self.watches).get(&token).and_then(Weak::upgrade);
                        if let Some(target) = target {
                            target.ready();
                        }
                    }
                }
            }
        }
    }

    fn expire(&self) {
        drain(&self.timer);
        let now = monotonic_ns();
        let mut due = Vec::new();
        {
            let mut alarms = lock(&self.alarms);
            alarms.armed = None;
            for slot in alarms.slots.iter_mut().flatten() {
                if slot.at.is_some_and(|at| at <= now) {
                    slot.at = None;
                    due.extend(slot.target.upgrade());
                }
            }
            self.program(&mut alarms);
        }
        for target in due {
            target.expired();
        }
    }
}

#[expect(unsafe_code, reason = "epoll(7) has no safe wrapper in std")]
fn epoll_create() -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers; a descriptor that is not negative is ours alone.
    unsafe {
        let fd = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        if fd < 0 {
            Err(Errno::last())
        } else {
            Ok(OwnedFd::from_raw_fd(fd))
        }
    }
}

#[expect(unsafe_code, reason = "epoll(7)")]
fn epoll_add(epoll: &OwnedFd, fd: RawFd, token: u64) -> Result<(), Errno> {
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: token,
    };
    // SAFETY: the event is ours and live during the call; a bad descriptor is an error, no more.
    let result =
        unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) };
    if result < 0 {
        Err(Errno::last())
    } else {
        Ok(())
    }
}

#[expect(unsafe_code, reason = "epoll(7)")]
fn epoll_delete(epoll: &OwnedFd, fd: RawFd) {
    // SAFETY: no event is needed to delete; a bad descriptor is an error, which means that it is
    // not watched.
    unsafe {
        libc::epoll_ctl(
            epoll.as_raw_fd(),
            libc::EPOLL_CTL_DEL,
            fd,
            std::ptr::null_mut(),
        )
    };
}

#[expect(unsafe_code, reason = "epoll(7)")]
fn epoll_wait(epoll: &OwnedFd) -> impl Iterator<Item = u64> {
    const MOST: usize = 16;
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; MOST];
    // SAFETY: the array has room for as many events as are asked for.
    let count =
        unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), MOST as i32, -1) };
    events
        .into_iter()
        .take(usize::try_from(count).unwrap_or(0))
        .map(|event| event.u64)
}

#[expect(unsafe_code, reason = "timerfd_create(2)")]
fn timerfd_create() -> Result<OwnedFd, Errno> {
    let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
    // SAFETY: no pointers; a descriptor that is not negative is ours alone.
    unsafe {
        let fd = libc::timerfd_create(libc::CLOCK_MONOTONIC, flags);
        if fd < 0 {
            Err(Errno::last())
        } else {
            Ok(OwnedFd::from_raw_fd(fd))
        }
    }
}

/// Sets the timer to an absolute time; `None` stops it.
#[expect(unsafe_code, reason = "timerfd_settime(2)")]
fn timerfd_set(timer: &OwnedFd, at: Option<u64>) {
    // An absolute time of 0 would stop the timer, and that is long past anyway.
    let ns = at.map_or(0, |at| at.clamp(1, i64::MAX as u64));
    let value = libc::timespec {
        tv_sec: (ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (ns % 1_000_000_000) as i64,
    };
    let zero = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let spec = libc::itimerspec {
        it_interval: zero,
        it_value: value,
    };
    // SAFETY: the specification is ours and live; the old value is not wanted.
    unsafe {
        libc::timerfd_settime(
            timer.as_raw_fd(),
            libc::TFD_TIMER_ABSTIME,
            &raw const spec,
            std::ptr::null_mut(),
        );
    }
}

/// Reads the count of a descriptor that does not block.
fn drain(fd: &OwnedFd) {
    use std::io::Read;
    if let Ok(copy) = fd.try_clone() {
        let _ = File::from(copy).read(&mut [0; 8]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    struct Report(Mutex<Sender<u64>>, Option<EventFd>);

    impl Expire for Report {
        fn expired(&self) {
            lock(&self.0).send(monotonic_ns()).unwrap();
        }
    }

    impl Ready for Report {
        fn ready(&self) {
            let count = self.1.as_ref().unwrap().read().unwrap();
            lock(&self.0).send(count).unwrap();
        }
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn alarms_go_off_in_time_and_can_be_taken_back() {
        let service = Service::new().unwrap();
        let (sender, receiver) = channel();
        let report = Arc::new(Report(Mutex::new(sender), None));
        let target: Weak<dyn Expire> = Arc::downgrade(&(report.clone() as Arc<dyn Expire>));
        let (first, second) = (service.alarm(), service.alarm());
        first.set_target(target.clone());
        second.set_target(target);
        let start = monotonic_ns();
        first.set(Some(start + 3_600_000_000_000));
        second.set(Some(start + 2_000_000));
        assert!(receiver.recv_timeout(LONG).unwrap() >= start + 2_000_000);
        first.set(None);
        second.set(Some(1));
        receiver.recv_timeout(LONG).unwrap();
        assert!(receiver.try_recv().is_err());
    }

    #[test]
    fn a_watched_eventfd_is_heard_until_the_watch_is_dropped() {
        let service = Service::new().unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let (sender, receiver) = channel();
        let report = Arc::new(Report(Mutex::new(sender), Some(event.try_clone().unwrap())));
        let target: Weak<dyn Ready> = Arc::downgrade(&(report.clone() as Arc<dyn Ready>));
        event.write(3).unwrap();
        let watch = service.watch(event.as_raw_fd(), target).unwrap();
        assert_eq!(
            receiver.recv_timeout(LONG),
            Ok(3),
            "also what was there before"
        );
        drop(watch);
        event.write(1).unwrap();
        assert!(receiver.recv_timeout(Duration::from_millis(20)).is_err());
    }
}
