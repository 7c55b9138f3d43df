//! The server: one thread, which serves requests as they come. What takes long or waits for vCPUs
//! runs on threads of its own.

use std::{io, sync::Arc, thread};

use axum::{
    Json, Router,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
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

/// A running server; dropping it closes the socket and gives the name free.
pub struct Server {
    claim: Claim,
    end: Arc<Notify>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    /// Serves `machine` under the claimed name.
    pub fn start(claim: Claim, machine: Arc<dyn Machine>) -> Result<Self, ServerError> {
        let socket = claim.listen()?;
        let runtime = runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(8)
            .build()
            .map_err(ServerError::Start)?;
        let end = Arc::new(Notify::new());
        let ended = end.clone();
        let thread = thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    let listener = match OwnersListener::new(socket) {
                        Ok(listener) => listener,
                        Err(error) => return tracing::warn!(%error, "the control socket"),
                    };
                    let served = axum::serve(listener, router(machine));
                    // Streams have no end of their own, so nobody waits for them here.
                    tokio::select! {
                        _ = served.into_future() => {}
                        () = ended.notified() => {}
                    }
                });
                runtime.shutdown_background();
            })
            .map_err(ServerError::Start)?;
        Ok(Self {
            claim,
            end,
            thread: Some(thread),
        })
    }

    /// The name under which the machine is found.
    pub fn name(&self) -> &str {
        self.claim.name()
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
            Self::Pause(_) | Self::Starting => StatusCode::SERVICE_UNAVAILABLE,
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
