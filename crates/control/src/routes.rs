//! What each path does.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use addr::Address;
use axum::{
    Json,
    extract::{Query, State as Shared, rejection::QueryRejection},
    http::header,
    response::IntoResponse,
};
use explain::{
    Chain,
    faults::{FaultFilter, Line},
    map::MemoryMap,
    parse_hex,
};
use kvm_bindings::{kvm_dtable, kvm_segment};

use crate::{
    answer,
    api::{
        ExplainQuery, MapQuery, MemoryQuery, Problem, RegistersAnswer, Segment, SlotsAnswer,
        StateAnswer, StatisticsAnswer, Status, VcpuQuery,
    },
    faults::Hub,
    machine::{Machine, Trouble, VcpuState, Wanted},
};

/// What all paths share.
#[derive(Clone)]
pub(crate) struct Served {
    pub(crate) machine: Arc<dyn Machine>,
    pub(crate) hub: Arc<Hub>,
}

type Of = Shared<Served>;
type Asked<T> = Result<Query<T>, QueryRejection>;

/// Runs what may wait for vCPUs, away from the event loop.
async fn away<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Trouble> + Send + 'static,
) -> Result<T, Trouble> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Trouble::Unsupported(format!("a bug of Fourfold: {error}"))))
}

fn asked<T>(query: Asked<T>) -> Result<T, Trouble> {
    match query {
        Ok(Query(query)) => Ok(query),
        Err(rejection) => Err(Trouble::Question(rejection.body_text())),
    }
}

/// What the machine is, and whether it runs.
#[utoipa::path(get, path = "/status", responses((status = 200, body = Status)))]
pub(crate) async fn status(Shared(Served { machine, .. }): Of) -> Json<Status> {
    Json(machine.status())
}

/// Stops all vCPUs between two instructions, until `/resume`.
#[utoipa::path(post, path = "/pause", responses(
    (status = 200, body = StateAnswer),
    (status = 503, body = Problem, description = "the vCPUs did not stop"),
))]
pub(crate) async fn pause(
    Shared(Served { machine, .. }): Of,
) -> Result<Json<StateAnswer>, Trouble> {
    set_state(machine, Wanted::Paused).await
}

/// Lets the vCPUs go on.
#[utoipa::path(post, path = "/resume", responses((status = 200, body = StateAnswer)))]
pub(crate) async fn resume(
    Shared(Served { machine, .. }): Of,
) -> Result<Json<StateAnswer>, Trouble> {
    set_state(machine, Wanted::Running).await
}

async fn set_state(
    machine: Arc<dyn Machine>,
    wanted: Wanted,
) -> Result<Json<StateAnswer>, Trouble> {
    away(move || {
        let started = Instant::now();
        let state = machine.set_state(wanted)?;
        let milliseconds = started.elapsed().as_secs_f64() * 1e3;
        Ok(Json(StateAnswer {
            state,
            milliseconds,
        }))
    })
    .await
}

/// Ends the machine, as pulling the plug would.
#[utoipa::path(post, path = "/stop", responses((status = 200, body = Status)))]
pub(crate) async fn stop(Shared(Served { machine, .. }): Of) -> Result<Json<Status>, Trouble> {
    machine.stop()?;
    Ok(Json(machine.status()))
}

/// The memory slots, and what lies where in guest physical memory.
#[utoipa::path(get, path = "/slots", responses((status = 200, body = SlotsAnswer)))]
pub(crate) async fn slots(
    Shared(Served { machine, .. }): Of,
) -> Result<Json<SlotsAnswer>, Trouble> {
    Ok(Json(SlotsAnswer {
        slots: machine.slots()?,
        regions: machine.regions()?,
    }))
}

/// One vCPU's registers. The machine is stopped for the moment that reading takes.
#[utoipa::path(get, path = "/registers", params(VcpuQuery), responses(
    (status = 200, body = RegistersAnswer),
    (status = 400, body = Problem, description = "there is no such vCPU"),
))]
pub(crate) async fn registers(
    Shared(Served { machine, .. }): Of,
    query: Asked<VcpuQuery>,
) -> Result<Json<RegistersAnswer>, Trouble> {
    let vcpu = asked(query)?.vcpu.unwrap_or(0);
    away(move || {
        let state = machine.hold()?.vcpu(vcpu, None)?;
        Ok(Json(registers_of(vcpu, &state)))
    })
    .await
}

/// The whole way of one address, through all four spaces. The machine is stopped for the moment
/// that this takes.
#[utoipa::path(get, path = "/explain", params(ExplainQuery), responses(
    (status = 200, body = Chain),
    (status = 400, body = Problem, description = "the address, the access or the vCPU is none"),
))]
pub(crate) async fn explain(
    Shared(Served { machine, .. }): Of,
    query: Asked<ExplainQuery>,
) -> Result<Json<Chain>, Trouble> {
    let query = asked(query)?;
    away(move || answer::explain(&*machine, &query).map(Json)).await
}

/// Counters of the machine and of its vCPUs, where the accelerator is ours.
#[utoipa::path(get, path = "/statistics", responses(
    (status = 200, body = StatisticsAnswer),
    (status = 501, body = Problem, description = "the kernel's KVM counts for itself"),
))]
pub(crate) async fn statistics(
    Shared(Served { machine, .. }): Of,
) -> Result<Json<StatisticsAnswer>, Trouble> {
    answer::statistics(&*machine).map(Json)
}

/// Bytes of guest memory, as they are.
#[utoipa::path(get, path = "/memory", params(MemoryQuery), responses(
    (status = 200, content_type = "application/octet-stream"),
    (status = 400, body = Problem, description = "not all of it is memory"),
))]
pub(crate) async fn memory(
    Shared(Served { machine, .. }): Of,
    query: Asked<MemoryQuery>,
) -> Result<impl IntoResponse, Trouble> {
    let query = asked(query)?;
    let bytes = away(move || answer::memory(&*machine, &query)).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes))
}

/// All of the guest's physical memory: what lies where, what is mapped, what the host holds.
#[utoipa::path(get, path = "/map", params(MapQuery), responses((status = 200, body = MemoryMap)))]
pub(crate) async fn map(
    Shared(Served { machine, .. }): Of,
    query: Asked<MapQuery>,
) -> Result<Json<MemoryMap>, Trouble> {
    let query = asked(query)?;
    away(move || answer::map(&*machine, &query).map(Json)).await
}

/// Faults as they happen: a stream of lines, each a `Line` in JSON. It ends with the machine.
#[utoipa::path(get, path = "/faults", params(FaultFilter), responses(
    (status = 200, content_type = "application/x-ndjson", body = Line),
    (status = 400, body = Problem, description = "there is no such cause"),
    (status = 501, body = Problem, description = "the kernel's KVM does not tell its faults"),
))]
pub(crate) async fn faults(
    Shared(Served { machine, hub }): Of,
    query: Asked<FaultFilter>,
) -> Result<impl IntoResponse, Trouble> {
    let body = hub.listen(&machine, asked(query)?)?;
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body))
}

fn registers_of(vcpu: u32, state: &VcpuState) -> RegistersAnswer {
    let named = |pairs: &[(&str, u64)]| -> BTreeMap<String, String> {
        let pairs = pairs.iter();
        pairs
            .map(|(name, value)| ((*name).to_owned(), format!("{value:#x}")))
            .collect()
    };
    let r = &state.regs;
    let s = &state.sregs;
    let general = [
        ("rax", r.rax),
        ("rbx", r.rbx),
        ("rcx", r.rcx),
        ("rdx", r.rdx),
        ("rsi", r.rsi),
        ("rdi", r.rdi),
        ("rsp", r.rsp),
        ("rbp", r.rbp),
        ("r8", r.r8),
        ("r9", r.r9),
        ("r10", r.r10),
        ("r11", r.r11),
        ("r12", r.r12),
        ("r13", r.r13),
        ("r14", r.r14),
        ("r15", r.r15),
        ("rip", r.rip),
        ("rflags", r.rflags),
    ];
    let control = [
        ("cr0", s.cr0),
        ("cr2", s.cr2),
        ("cr3", s.cr3),
        ("cr4", s.cr4),
        ("cr8", s.cr8),
        ("efer", s.efer),
        ("apic_base", s.apic_base),
        ("pkru", state.pkru.into()),
    ];
    let segments = [
        ("cs", s.cs),
        ("ds", s.ds),
        ("es", s.es),
        ("fs", s.fs),
        ("gs", s.gs),
        ("ss", s.ss),
        ("tr", s.tr),
        ("ldt", s.ldt),
    ];
    let tables = [("gdt", s.gdt), ("idt", s.idt)];
    let segments = segments.into_iter().map(|(name, s)| (name, segment(&s)));
    let tables = tables.into_iter().map(|(name, t)| (name, table(&t)));
    RegistersAnswer {
        vcpu,
        cpl: s.ss.dpl,
        general: named(&general),
        control: named(&control),
        segments: segments
            .chain(tables)
            .map(|(name, segment)| (name.to_owned(), segment))
            .collect(),
    }
}

fn segment(segment: &kvm_segment) -> Segment {
    Segment {
        selector: Some(format!("{:#x}", segment.selector)),
        base: format!("{:#x}", segment.base),
        limit: format!("{:#x}", segment.limit),
    }
}

fn table(table: &kvm_dtable) -> Segment {
    Segment {
        selector: None,
        base: format!("{:#x}", table.base),
        limit: format!("{:#x}", table.limit),
    }
}

/// A number in hexadecimal of a query.
pub(crate) fn number(name: &str, text: &str) -> Result<u64, Trouble> {
    parse_hex(text)
        .ok_or_else(|| Trouble::Question(format!("{name}={text}: give a number like 0x1000")))
}

/// Bytes to be dumped at most.
pub(crate) const MOST_BYTES: u64 = 16 << 20;

/// The end of a range, if it has one.
pub(crate) fn checked_end<A: Address>(start: A, bytes: u64) -> Result<A, Trouble> {
    start
        .checked_add(bytes)
        .filter(|_| bytes <= MOST_BYTES)
        .ok_or_else(|| {
            Trouble::Question(format!(
                "{bytes} bytes from {start:#x}: at most {MOST_BYTES} are given at a time"
            ))
        })
}
