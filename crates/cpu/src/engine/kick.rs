//! Asking a vCPU for attention from another thread, or from a signal handler.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use memory::quiesce::{Bell, Kick, Participant, Polled, Requests};

use super::frame::FrameMapping;

/// The handle by which others make a vCPU leave guest code.
#[derive(Debug)]
pub struct VcpuKick {
    bell: Bell<FrameMapping>,
}

impl Polled for FrameMapping {
    fn go(&self) -> &AtomicU32 {
        FrameMapping::go(self)
    }
}

impl VcpuKick {
    pub(crate) fn new(frame: Arc<FrameMapping>) -> Self {
        Self {
            bell: Bell::new(frame),
        }
    }

    /// Asks for these. Two stores: may be called anywhere, in a signal handler too.
    pub fn request(&self, requests: Requests) {
        self.bell.request(requests);
    }

    /// Takes back requests that were not seen yet.
    pub fn withdraw(&self, requests: Requests) {
        self.bell.withdraw(requests);
    }

    /// Has translated code leave, to look what there is.
    pub(crate) fn notice(&self) {
        self.bell.ring();
    }

    /// Whether anything was asked for since the vCPU looked last.
    pub(crate) fn is_asked(&self) -> bool {
        self.bell.is_rung()
    }

    /// Enters guest mode: what the vCPU is asked for.
    pub(crate) fn enter(&self, participant: &Participant) -> Requests {
        self.bell.enter(participant)
    }

    /// Passes a checkpoint: what the vCPU is asked for. Translated code may run again.
    pub(crate) fn checkpoint(&self, participant: &Participant) -> Requests {
        self.bell.checkpoint(participant)
    }
}

impl Kick for VcpuKick {
    /// The domain keeps the bits itself; only attention is asked for.
    fn kick(&self, _requests: Requests) {
        self.notice();
    }
}
