//! The socket's other end: the same user, or root, and nobody else.
//!
//! The folder's mode keeps others out already; the kernel's word on who connected (`SO_PEERCRED`)
//! holds also where somebody opened the folder by hand. Not more than [`MOST`] connections are
//! served at one time: a client that opens thousands waits for itself.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::serve::Listener;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream, unix::SocketAddr},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use crate::directory::effective_user;

/// Connections at one time.
const MOST: usize = 32;

pub(crate) struct OwnersListener {
    listener: UnixListener,
    places: Arc<Semaphore>,
}

impl OwnersListener {
    pub(crate) fn new(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener: UnixListener::from_std(listener)?,
            places: Arc::new(Semaphore::new(MOST)),
        })
    }

    async fn next(&self) -> io::Result<(Connection, SocketAddr)> {
        let place = self.places.clone().acquire_owned().await;
        let place = place.map_err(io::Error::other)?;
        loop {
            let (stream, address) = self.listener.accept().await?;
            let peer = stream.peer_cred()?.uid();
            if peer == effective_user() || peer == 0 {
                let connection = Connection {
                    stream,
                    _place: place,
                };
                return Ok((connection, address));
            }
            tracing::warn!(peer, "a connection of another user was refused");
        }
    }
}

impl Listener for OwnersListener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            match self.next().await {
                Ok(connection) => return connection,
                // Out of descriptors, most likely: others will be closed.
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection and its place among those served.
pub(crate) struct Connection {
    stream: UnixStream,
    _place: OwnedSemaphorePermit,
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
