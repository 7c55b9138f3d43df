//! A machine on `user` from its first instruction to its end, with every device.

use std::{
    fs, io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use accel::{Accelerator, Preference, choose, user::Config};
use devices::virtio::{
    VirtioDevice,
    blk::{Block, DiskAccess, RawImage},
    console::{Console, Inbox},
    rng::Rng,
};
use vmm::{Initrd, Machine, MachineConfig, Outcome};

use super::garbage::Garbage;

const DISK: u64 = 1 << 20;

/// A machine that was not built yet.
pub(crate) struct Life {
    config: MachineConfig,
    files: Vec<PathBuf>,
}

fn temporary(name: &str, content: &[u8]) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("fourfold-hostile-{}-{number}-{name}", std::process::id());
    let path = std::env::temp_dir().join(name);
    fs::write(&path, content).unwrap();
    path
}

fn user() -> Arc<dyn Accelerator> {
    let choice = choose(Preference::User(Config::default()));
    choice.expect("`user` runs wherever tests do").accelerator
}

/// Cuts a disk, lets it grow, and writes to it.
fn meddle(disk: &Path, over: &AtomicBool) {
    let mut garbage = Garbage::new(u64::from(std::process::id()));
    while !over.load(Ordering::Relaxed) {
        // It is gone once its machine has ended.
        let Ok(file) = fs::OpenOptions::new().write(true).open(disk) else {
            return;
        };
        file.set_len(garbage.below(2 * DISK as usize) as u64)
            .unwrap();
        let len = garbage.below(4096);
        file.write_all_at(&garbage.bytes(len), garbage.below(DISK as usize) as u64)
            .unwrap();
        thread::sleep(Duration::from_micros(500));
    }
}

impl Life {
    /// With `image` as kernel, or as initial RAM disk of a kernel that is whole.
    pub(crate) fn of_image(image: &[u8], garbage: &mut Garbage) -> Self {
        let is_archive = image.starts_with(b"0707");
        let (kernel, initrd) = if is_archive {
            (
                super::guest::elf(&[0xeb, 0xfe]),
                Some(Initrd::Bytes(image.to_vec())),
            )
        } else {
            (image.to_vec(), None)
        };
        Self::new(&kernel, initrd, 1 + garbage.below(2) as u8, Vec::new())
    }

    /// With a guest of ours and every device there is.
    pub(crate) fn of_guest(kernel: &[u8], seed: u64) -> Self {
        let disk = temporary("disk", &Garbage::new(seed).bytes(DISK as usize));
        let image = RawImage::open(&disk, DiskAccess::ReadWrite).unwrap();
        let inbox = Inbox::default();
        let virtio: Vec<Box<dyn VirtioDevice>> = vec![
            Box::new(Block::new(image, "fuzz")),
            Box::new(Rng::new().unwrap()),
            Box::new(Console::new(inbox, Box::new(io::sink()))),
        ];
        let mut life = Self::new(kernel, None, 2, virtio);
        life.files.push(disk);
        life
    }

    fn new(
        kernel: &[u8],
        initrd: Option<Initrd>,
        cpus: u8,
        virtio: Vec<Box<dyn VirtioDevice>>,
    ) -> Self {
        let kernel = temporary("kernel", kernel);
        let sink = || -> Box<dyn io::Write + Send> { Box::new(io::sink()) };
        Self {
            config: MachineConfig {
                name: "hostile".to_owned(),
                memory: 16 << 20,
                cpus,
                kernel: kernel.clone(),
                initrd,
                command_line: "console=ttyS0".to_owned(),
                serial: [sink(), sink(), sink()],
                virtio,
            },
            files: vec![kernel],
        }
    }

    /// The same, while somebody on the host changes the size of its disk and what is on it.
    pub(crate) fn live_on_a_changing_disk(self, limit: Duration) -> Result<Outcome, String> {
        let disk = self.files.last().expect("a guest's disk").clone();
        let over = Arc::new(AtomicBool::new(false));
        let meddling = {
            let over = over.clone();
            thread::spawn(move || meddle(&disk, &over))
        };
        let outcome = self.live(limit);
        over.store(true, Ordering::Relaxed);
        meddling.join().unwrap();
        outcome
    }

    /// Builds and runs it, at most for so long; an error is why it can't be built.
    pub(crate) fn live(self, limit: Duration) -> Result<Outcome, String> {
        let files = self.files;
        let built = Machine::build(self.config, &*user());
        let outcome = built.map_err(|error| error.to_string()).map(|machine| {
            let stopper = machine.stopper();
            let clock = thread::spawn(move || {
                thread::sleep(limit);
                stopper.stop();
            });
            let began = Instant::now();
            let outcome = machine.run();
            let took = began.elapsed();
            assert!(
                took < limit + Duration::from_secs(20),
                "it took {took:?} to stop"
            );
            clock.join().unwrap();
            outcome
        });
        for file in files {
            let _ = fs::remove_file(file);
        }
        if let Ok(Outcome::Crashed(crash)) = &outcome {
            assert!(!crash.cause.contains("bug of Fourfold"), "{crash}");
        }
        outcome
    }
}
