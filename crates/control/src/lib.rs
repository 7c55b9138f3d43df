//! The control API of a running machine: HTTP/1.1 over a Unix socket that is its owner's alone.
//!
//! ```text
//!   fourfold explain NAME … ─ Client ── NAME.sock ── Server ── dyn Machine ─┬─ Vm (vmm::Remote)
//!                                       Directory     routes                └─ Program (kvm::Vm)
//! ```
//!
//! | path              | what                                                                    |
//! |-------------------|-------------------------------------------------------------------------|
//! | `GET /status`     | what the machine is, and whether it runs                                |
//! | `POST /pause`     | stops all vCPUs between two instructions                                |
//! | `POST /resume`    | lets them go on                                                         |
//! | `POST /stop`      | ends the machine                                                        |
//! | `GET /slots`      | memory slots, and what lies where                                       |
//! | `GET /registers`  | one vCPU's registers                                                    |
//! | `GET /explain`    | the whole way of one address                                            |
//! | `GET /statistics` | counters                                                                |
//! | `GET /memory`     | bytes of guest memory                                                   |
//! | `GET /map`        | all of guest physical memory, mapped and resident                       |
//! | `GET /faults`     | faults as they happen, a line of JSON each                              |
//! | `GET /openapi.json` | all of this, for machines                                             |
//!
//! HTTP is hyper's, routing and checking of queries are axum's, the document is utoipa's, made from
//! the same functions and types that serve. One thread serves; what waits for vCPUs runs beside it.

mod answer;
mod api;
mod client;
mod directory;
mod faults;
mod machine;
mod openapi;
mod peer;
mod program;
mod routes;
mod server;
mod vm;

pub use api::{
    ExplainQuery, MapQuery, MemoryQuery, Problem, RegionSide, RegistersAnswer, Segment,
    SlotsAnswer, State, StateAnswer, StatisticsAnswer, Status, VcpuQuery,
};
pub use client::{Client, ClientError, Wish};
pub use directory::{Claim, Directory, DirectoryError};
pub use machine::{Held, Machine, Trouble, VcpuState, Wanted};
pub use openapi::document;
pub use program::{Newest, Program};
pub use server::{Server, ServerError, Start};
pub use vm::Vm;
