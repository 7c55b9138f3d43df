//! Eventfds as interrupts ([`irqfd`]) and as the answer to writes ([`ioeventfd`]); and the ring of
//! writes that can wait ([`coalesced`]).

pub mod coalesced;
pub mod handle;
pub mod ioeventfd;
pub mod irqfd;
