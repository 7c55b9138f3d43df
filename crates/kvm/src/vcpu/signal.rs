//! `KVM_SET_SIGNAL_MASK`.

use super::Vcpu;
use crate::signals::{SignalSet, unblocked_by};

/// The signals that are blocked during `KVM_RUN`.
pub(crate) type SignalMask = SignalSet;

impl Vcpu {
    /// `KVM_SET_SIGNAL_MASK`; `None` leaves the thread's own mask in force.
    pub fn set_signal_mask(&self, mask: Option<SignalSet>) {
        if let Some(mask) = mask {
            unblocked_by(mask);
        }
        self.lock().machine.signal_mask = mask;
    }
}
