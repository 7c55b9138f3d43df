//! The document that describes the API, made from the code that serves it.

use utoipa::OpenApi;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Fourfold's control API",
        description = "Served as HTTP/1.1 on the Unix socket of each running machine."
    ),
    paths(
        crate::routes::status,
        crate::routes::pause,
        crate::routes::resume,
        crate::routes::stop,
        crate::routes::slots,
        crate::routes::registers,
        crate::routes::explain,
        crate::routes::statistics,
        crate::routes::memory,
        crate::routes::map,
        crate::routes::faults,
    ),
    components(schemas(explain::faults::Summary))
)]
struct Document;

/// The document.
pub fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}
