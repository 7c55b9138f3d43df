//! Runs the guest act by act and writes down what happened.

use accel::{Accelerator, Exit, Kind};
use addr::{Gpa, Hva};
use anyhow::{Result, bail};
use explain::Chain;
use memory::space;
use mmu::event::FaultEvent;
use mmu::{Access, AccessKind, PagingPath, Privilege};
use serde::Serialize;

use super::guest::{self, Port};
use super::stage::Stage;

/// What the device writes into the guest's buffer.
pub(super) const GREETING: &[u8] = b"from the device, through map()";

/// How often what takes little time is measured.
const ROUNDS: usize = 5;

const READ: Access = Access::new(AccessKind::Read, Privilege::Supervisor);

/// A fault as it is told.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Fault {
    pub(super) cause: String,
    pub(super) gva: String,
    pub(super) gpa: Option<String>,
    pub(super) hva: Option<String>,
    pub(super) installed_bytes: Option<u64>,
    pub(super) nanoseconds: u64,
}

impl Fault {
    fn of(event: &FaultEvent) -> Self {
        Self {
            cause: format!("{:?}", event.cause),
            gva: format!("{:#x}", event.gva),
            gpa: event.gpa.map(|gpa| format!("{gpa:#x}")),
            hva: event.hva.map(|hva| format!("{hva:#x}")),
            installed_bytes: event.installed.map(|i| i.size.bytes()),
            nanoseconds: event.nanoseconds,
        }
    }
}

/// One read of the data page.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Touch {
    /// The way of the address before it.
    pub(super) before: Chain,
    /// The faults that it met.
    pub(super) faults: Vec<Fault>,
    /// What the guest's own clock says it took.
    pub(super) nanoseconds: f64,
    /// The way of the address after it.
    pub(super) after: Chain,
}

/// The device's act.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Device {
    /// Where the guest wrote, and what: an address for the device.
    pub(super) write_gpa: String,
    pub(super) write_value: String,
    /// What `map()` made of that address.
    pub(super) mapped_hva: String,
    pub(super) mapped_bytes: u64,
    /// What the guest read from the device afterwards.
    pub(super) answer: u64,
    /// What it then read from its buffer.
    pub(super) buffer: String,
}

/// The act under dirty logging.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Dirty {
    /// Faults of the first write, and of the second.
    pub(super) first_faults: Vec<Fault>,
    pub(super) second_faults: Vec<Fault>,
    /// Guest frames in the log after both.
    pub(super) frames: Vec<u64>,
    /// Those in the log when it was asked again.
    pub(super) frames_asked_again: Vec<u64>,
}

/// All that happened.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Story {
    /// Whether the accelerator shows its faults and its tables.
    pub(super) shows_faults: bool,
    pub(super) paging: Option<String>,
    pub(super) ram_hva: String,
    pub(super) ram_bytes: u64,
    pub(super) resident_before: u64,
    pub(super) first: Touch,
    pub(super) second: Touch,
    /// One read of the loop, in nanoseconds.
    pub(super) hit_nanoseconds: f64,
    pub(super) reads: u32,
    pub(super) device: Device,
    pub(super) dirty: Dirty,
    pub(super) table_bytes: Option<usize>,
}

/// Tells the story on one accelerator.
pub(super) fn tell(accelerator: &dyn Accelerator, paging: Option<PagingPath>) -> Result<Story> {
    let reads = match accelerator.kind() {
        Kind::User => 200_000,
        // A software KVM takes microseconds for each.
        Kind::Kernel => 5_000,
    };
    let mut stage = Stage::set_up(accelerator, reads)?;
    let nanoseconds_per_cycle = 1e6 / f64::from(stage.vcpu.tsc_khz()?.max(1));
    let resident_before = resident(&stage)?;
    let clock = warm_up(&mut stage)?;
    let nanoseconds = |cycles: f64| (cycles - clock).max(0.0) * nanoseconds_per_cycle;
    let first = touch(&mut stage, &nanoseconds)?;
    let second = touch(&mut stage, &nanoseconds)?;
    let hit_nanoseconds = nanoseconds(fastest_loop(&mut stage)?) / f64::from(reads);
    let device = device(&mut stage)?;
    let dirty = dirty(&mut stage)?;
    Ok(Story {
        shows_faults: stage.vm.mmu().is_some(),
        paging: paging.map(|p| format!("{p:?}").to_lowercase()),
        ram_hva: format!("{:#x}", stage.ram.hva()),
        ram_bytes: guest::RAM,
        resident_before,
        first,
        second,
        hit_nanoseconds,
        reads,
        device,
        dirty,
        table_bytes: stage.table_bytes(),
    })
}

/// Bytes of guest RAM that the host has given pages for.
fn resident(stage: &Stage) -> Result<u64> {
    let pages = stage.pagemap.look_up_range(stage.ram.range())?;
    let present = |page: &&memory::pagemap::HostPage| {
        matches!(page.entry.state, memory::pagemap::PageState::Present(_))
    };
    Ok(pages.iter().filter(present).count() as u64 * 4096)
}

/// Runs the guest's first acts on a page that it has touched already; the cycles that reading the
/// clock takes.
fn warm_up(stage: &mut Stage) -> Result<f64> {
    let mut clock = f64::INFINITY;
    for _ in 0..ROUNDS {
        stage.aim_at(guest::CODE)?;
        run_to(stage, Port::Clock)?;
        clock = clock.min(cycles(stage)?);
        run_to(stage, Port::Touch)?;
    }
    Ok(clock)
}

fn touch(stage: &mut Stage, nanoseconds: &impl Fn(f64) -> f64) -> Result<Touch> {
    let before = stage.explain(guest::DATA, READ)?;
    stage.aim_at(guest::DATA)?;
    run_to(stage, Port::Clock)?;
    let faults = run_to(stage, Port::Touch)?;
    Ok(Touch {
        before,
        faults,
        nanoseconds: nanoseconds(cycles(stage)?),
        after: stage.explain(guest::DATA, READ)?,
    })
}

/// The cycles of the fastest of a few loops: this host may be busy with something else.
fn fastest_loop(stage: &mut Stage) -> Result<f64> {
    let mut fastest = f64::INFINITY;
    for _ in 0..ROUNDS {
        run_to(stage, Port::Loop)?;
        fastest = fastest.min(cycles(stage)?);
        stage.aim_at(guest::DATA)?;
        run_to(stage, Port::Clock)?;
        run_to(stage, Port::Touch)?;
    }
    run_to(stage, Port::Loop)?;
    Ok(fastest)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a time, shown with three digits"
)]
fn cycles(stage: &Stage) -> Result<f64> {
    Ok(stage.vcpu.get_regs()?.r9 as f64)
}

/// Runs until the guest speaks at this port; the faults on data on the way (the fetch of new code
/// meets faults, too).
fn run_to(stage: &mut Stage, wanted: Port) -> Result<Vec<Fault>> {
    stage.faults.take();
    match stage.vcpu.run()? {
        Exit::IoOut { port, .. } if port == wanted as u16 => {}
        exit => bail!(
            "the tour's guest was to reach port {:#x}, and left with {exit:?}",
            wanted as u16
        ),
    }
    let faults = stage.faults.take();
    Ok(faults
        .iter()
        .filter(|f| f.access.kind != AccessKind::Execute)
        .map(Fault::of)
        .collect())
}

fn device(stage: &mut Stage) -> Result<Device> {
    let (gpa, value) = match stage.vcpu.run()? {
        Exit::MmioWrite { gpa, data } => {
            let mut bytes = [0; 8];
            bytes[..data.len()].copy_from_slice(data);
            (gpa, u64::from_le_bytes(bytes))
        }
        exit => bail!("the tour's guest was to write to its device, and left with {exit:?}"),
    };
    let (hva, len) = fill_buffer(stage, Gpa::new(value))?;
    match stage.vcpu.run()? {
        Exit::MmioRead { data, .. } => {
            let answer = u64::from(len as u32).to_le_bytes();
            let count = data.len();
            data.copy_from_slice(&answer[..count]);
        }
        exit => bail!("the tour's guest was to read from its device, and left with {exit:?}"),
    }
    run_to(stage, Port::Device)?;
    let regs = stage.vcpu.get_regs()?;
    Ok(Device {
        write_gpa: format!("{gpa:#x}"),
        write_value: format!("{value:#x}"),
        mapped_hva: format!("{hva:#x}"),
        mapped_bytes: len,
        answer: regs.r10,
        buffer: String::from_utf8_lossy(&regs.rax.to_le_bytes()).into_owned(),
    })
}

/// What a device does with an address that the guest gave it.
fn fill_buffer(stage: &Stage, gpa: Gpa) -> Result<(Hva, u64)> {
    let len = GREETING.len() as u64;
    let mut mapped = stage.space.map(gpa, len, space::Access::Write)?;
    let Some(hva) = mapped.hva() else {
        bail!("guest physical {gpa:#x} is not RAM");
    };
    let written = mapped.write(0, GREETING)? as u64;
    mapped.unmap(written)?;
    Ok((hva, written))
}

fn dirty(stage: &mut Stage) -> Result<Dirty> {
    stage.log_writes()?;
    let first_faults = run_to(stage, Port::FirstWrite)?;
    let second_faults = run_to(stage, Port::SecondWrite)?;
    let frames = stage.dirty_frames()?;
    let frames_asked_again = stage.dirty_frames()?;
    Ok(Dirty {
        first_faults,
        second_faults,
        frames,
        frames_asked_again,
    })
}
