//! Asking a vCPU for attention from another thread, or from a signal handler.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use memory::quiesce::{Kick, Requests};

use super::frame::FrameMapping;

/// The handle by which others make a vCPU leave guest code.
#[derive(Debug)]
pub struct VcpuKick {
    frame: Arc<FrameMapping>,
    wanted: AtomicU32,
}

impl VcpuKick {
    pub(crate) fn new(frame: Arc<FrameMapping>) -> Self {
        Self {
            frame,
            wanted: AtomicU32::new(0),
        }
    }

    /// Asks for these. Two stores: may be called anywhere, in a signal handler too.
    pub fn request(&self, requests: Requests) {
        self.wanted.fetch_or(requests.bits(), Ordering::SeqCst);
        self.notice();
    }

    /// Takes back requests that were not seen yet.
    pub fn withdraw(&self, requests: Requests) {
        self.wanted.fetch_and(!requests.bits(), Ordering::SeqCst);
    }

    /// Has translated code leave, to look what there is.
    pub(crate) fn notice(&self) {
        self.frame.go().store(0, Ordering::SeqCst);
    }

    /// Translated code may run again.
    pub(crate) fn clear(&self) {
        self.frame.go().store(1, Ordering::SeqCst);
    }

    /// Whether anything was asked for since [`Self::clear`].
    pub(crate) fn is_asked(&self) -> bool {
        self.frame.go().load(Ordering::Relaxed) == 0
    }

    /// Takes what was asked for.
    pub(crate) fn take(&self) -> Requests {
        Requests::from_bits_truncate(self.wanted.swap(0, Ordering::SeqCst))
    }
}

impl Kick for VcpuKick {
    /// The domain keeps the bits itself; only attention is asked for.
    fn kick(&self, _requests: Requests) {
        self.notice();
    }
}
