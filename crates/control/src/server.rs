//! The server: one thread, which serves requests as they come. What takes long or waits for vCPUs
//! runs on threads of its own.

use std::{
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixListener,
    },
    path::Path,
    sync::Arc,
    thread,
};

use axum::{
    Json, Router,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use kvm::turns::{self, Turns};
use tokio::{runtime, sync::Notify};

use crate::{
    api::Problem,
    directory::{Claim, DirectoryError},
    machine::{Machine, Trouble},
    openapi,
    peer::OwnersListener,
    routes,
};

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// No socket.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// No thread, or no event loop.
    #[error("starting the control API")]
    Start(#[source] io::Error),
}

/// When a server begins to need more than a thread that sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At once.
    Now,
    /// At the first connection: in a process that is not ours.
    WhenAsked,
}

/// A running server; dropping it closes the socket and gives the name free.
pub struct Server {
    claim: Claim,
    listener: RawFd,
    end: Arc<Notify>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    /// Serves `machine` under the claimed name.
    pub fn start(
        claim: Claim,
        machine: Arc<dyn Machine>,
        start: Start,
    ) -> Result<Self, ServerError> {
        let socket = claim.listen()?;
        let listener = socket.as_raw_fd();
        let end = Arc::new(Notify::new());
        let ended = end.clone();
        let path = claim.socket().to_owned();
        let serve = move || {
            if start == Start::WhenAsked && !await_connection(&socket, &path) {
                // The descriptor is the program's by now.
                return std::mem::forget(socket);
            }
            if let Err(error) = serve(socket, machine, &ended) {
                tracing::warn!(%error, "the control socket");
            }
        };
        let thread = deaf_to_signals(|| {
            thread::Builder::new()
                .name("control".to_owned())
                .spawn(serve)
        });
        let thread = thread.map_err(ServerError::Start)?;
        Ok(Self {
            claim,
            listener,
            end,
            thread: Some(thread),
        })
    }

    /// The name under which the machine is found.
    pub fn name(&self) -> &str {
        self.claim.name()
    }

    /// The descriptors that a child of `fork` must close, for the name not to outlive this process.
    pub fn descriptors(&self) -> [RawFd; 2] {
        [self.listener, self.claim.lock_fd()]
    }

    /// Removes the socket, so that nobody finds it any more; who is connected stays so.
    pub fn remove_files(&self) {
        self.claim.remove_files();
    }
}

/// Serves until the end is notified.
fn serve(socket: UnixListener, machine: Arc<dyn Machine>, end: &Notify) -> io::Result<()> {
    turns::ask_for(Turns::Short);
    let runtime = runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(8)
        .build()?;
    let served = runtime.block_on(async {
        let listener = OwnersListener::new(socket)?;
        let served = axum::serve(listener, router(machine));
        // Streams have no end of their own, so nobody waits for them here.
        tokio::select! {
            served = served.into_future() => served,
            () = end.notified() => Ok(()),
        }
    });
    runtime.shutdown_background();
    served
}

/// Sleeps until somebody connects. `false`: the descriptor is not that of the socket any more,
/// because the program has closed it under us.
#[expect(unsafe_code, reason = "poll is libc's")]
fn await_connection(socket: &UnixListener, path: &Path) -> bool {
    let mut wanted = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    loop {
        // SAFETY: one structure, alive for the call.
        let ready = unsafe { libc::poll(&raw mut wanted, 1, -1) };
        let ours = socket.local_addr();
        if !ours.is_ok_and(|address| address.as_pathname() == Some(path)) {
            return false;
        }
        if ready > 0 && wanted.revents & libc::POLLIN != 0 {
            return true;
        }
    }
}

/// Runs `spawn` with all signals blocked, which the thread that it makes inherits: a signal for the
/// process is for the program's own threads.
#[expect(unsafe_code, reason = "signal masks are libc's")]
fn deaf_to_signals<T>(spawn: impl FnOnce() -> T) -> T {
    // SAFETY: a set is plain data that sigfillset fills in; the mask is put back as it was.
    unsafe {
        let (mut all, mut before) = std::mem::zeroed::<(libc::sigset_t, libc::sigset_t)>();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let spawned = spawn();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        spawned
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

/// Every path of the API.
fn router(machine: Arc<dyn Machine>) -> Router {
    Router::new()
        .route("/openapi.json", get(|| async { Json(openapi::document()) }))
        .route("/status", get(routes::status))
        .route("/pause", post(routes::pause))
        .route("/resume", post(routes::resume))
        .route("/stop", post(routes::stop))
        .route("/slots", get(routes::slots))
        .route("/registers", get(routes::registers))
        .route("/explain", get(routes::explain))
        .route("/statistics", get(routes::statistics))
        .route("/memory", get(routes::memory))
        .route("/map", get(routes::map))
        .route("/faults", get(routes::faults))
        .fallback(|| async {
            problem(
                StatusCode::NOT_FOUND,
                "there is no such path; GET /openapi.json lists them",
            )
        })
        .method_not_allowed_fallback(|| async {
            problem(
                StatusCode::METHOD_NOT_ALLOWED,
                "this path takes another method; GET /openapi.json says which",
            )
        })
        .with_state(routes::Served {
            machine,
            hub: Arc::default(),
        })
}

fn problem(status: StatusCode, error: &str) -> Response {
    let error = error.to_owned();
    (status, Json(Problem { error })).into_response()
}

impl IntoResponse for Trouble {
    fn into_response(self) -> Response {
        let status = match self {
            Self::Pause(vmm::PauseError::NoVcpu { .. }) | Self::Question(_) => {
                StatusCode::BAD_REQUEST
            }
            Self::Pause(_) | Self::StillRuns(_) | Self::Starting => StatusCode::SERVICE_UNAVAILABLE,
            Self::Unsupported(_) => StatusCode::NOT_IMPLEMENTED,
            Self::Kvm { .. } | Self::Pagemap(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        problem(status, &chain_of(&self))
    }
}

/// An error with its causes.
fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
