//! The other end: asks a running machine.

use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Empty};
use hyper::{Method, Request, StatusCode, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use kvm::turns::{self, Turns};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, runtime};

use crate::api::Problem;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket can't be reached.
    #[error("reaching the machine by {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// How it failed.
        source: std::io::Error,
    },
    /// The machine ended, or what answers is no machine.
    #[error("{path}: the machine ended, or its answer can't be understood")]
    Protocol {
        /// What was asked.
        path: String,
        /// How it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The machine refused.
    #[error("{error}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// Its own words.
        error: String,
    },
}

/// A connection to one machine.
pub struct Client {
    socket: PathBuf,
    runtime: runtime::Runtime,
}

impl Client {
    /// For the machine behind this socket. The calling thread asks for short turns on the processor:
    /// beside a busy guest its questions would wait otherwise.
    pub fn new(socket: &Path) -> Result<Self, ClientError> {
        turns::ask_for(Turns::Short);
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| ClientError::Connect {
                path: socket.to_owned(),
                source,
            })?;
        Ok(Self {
            socket: socket.to_owned(),
            runtime,
        })
    }

    /// `GET`, with a query; an answer in JSON.
    pub fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &impl Serialize,
    ) -> Result<T, ClientError> {
        let path = with_query(path, query)?;
        let bytes = self.bytes(Method::GET, &path)?;
        parse(&path, &bytes)
    }

    /// `GET`, with a query; an answer in bytes.
    pub fn get_bytes(&self, path: &str, query: &impl Serialize) -> Result<Vec<u8>, ClientError> {
        self.bytes(Method::GET, &with_query(path, query)?)
    }

    /// `POST` without a body; an answer in JSON.
    pub fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let bytes = self.bytes(Method::POST, path)?;
        parse(path, &bytes)
    }

    /// `GET` of a stream of lines, until `see` has had enough or the machine ends.
    pub fn lines(
        &self,
        path: &str,
        query: &impl Serialize,
        mut see: impl FnMut(&str) -> Wish,
    ) -> Result<(), ClientError> {
        let path = with_query(path, query)?;
        let response = self.runtime.block_on(self.request(Method::GET, &path))?;
        let mut body = response.into_body();
        let mut rest = Vec::new();
        // `see` may ask the machine something: it is called outside of the event loop.
        while let Some(frame) = self.runtime.block_on(body.frame()) {
            // A machine that ends in the middle of its stream ends the stream.
            let Ok(frame) = frame else { return Ok(()) };
            rest.extend_from_slice(frame.data_ref().map_or(&[][..], |data| &data[..]));
            let mut done = 0;
            while let Some(end) = rest[done..].iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8_lossy(&rest[done..done + end]);
                if see(&line) == Wish::Enough {
                    return Ok(());
                }
                done += end + 1;
            }
            rest.drain(..done);
        }
        Ok(())
    }

    fn bytes(&self, method: Method, path: &str) -> Result<Vec<u8>, ClientError> {
        self.runtime.block_on(async {
            let response = self.request(method, path).await?;
            let body = response.into_body().collect().await;
            Ok(body.map_err(|e| protocol(path, e))?.to_bytes().to_vec())
        })
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
    ) -> Result<hyper::Response<hyper::body::Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|source| ClientError::Connect {
            path: self.socket.clone(),
            source,
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| protocol(path, e))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .body(Empty::<Bytes>::new())
            .map_err(|e| protocol(path, e))?;
        let response = sender.send_request(request).await;
        let response = response.map_err(|e| protocol(path, e))?;
        if response.status() == StatusCode::OK {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let body = response.into_body().collect().await;
        let body = body.map_err(|e| protocol(path, e))?.to_bytes();
        let error = serde_json::from_slice::<Problem>(&body)
            .map_or_else(|_| String::from_utf8_lossy(&body).into_owned(), |p| p.error);
        Err(ClientError::Refused { status, error })
    }
}

/// What a reader of lines wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// The next line.
    More,
    /// No more.
    Enough,
}

fn with_query(path: &str, query: &impl Serialize) -> Result<String, ClientError> {
    let query = serde_urlencoded::to_string(query).map_err(|e| protocol(path, e))?;
    Ok(if query.is_empty() {
        path.to_owned()
    } else {
        format!("{path}?{query}")
    })
}

fn parse<T: DeserializeOwned>(path: &str, bytes: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(bytes).map_err(|e| protocol(path, e))
}

fn protocol(
    path: &str,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> ClientError {
    ClientError::Protocol {
        path: path.to_owned(),
        source: source.into(),
    }
}
