//! Small guests for every mode, transition and exception, on `/dev/kvm` and on our CPU: the same
//! exits, the same registers, the same memory.
//!
//! A guest is a memory image and a state to begin with; it runs until it halts, shuts down or does
//! something that ends it. Where `/dev/kvm` does not open, the guests run on our CPU alone, against
//! what each says of itself; `REQUIRE_KVM=1` makes that a failure.

#![expect(unsafe_code, reason = "shares memory with guests, as a monitor does")]
#![allow(unreachable_pub, reason = "the modules of one test program")]
#![allow(missing_docs, reason = "the modules of one test program")]

mod cases;
mod compare;
mod guest;
mod kernel;
mod layout;
mod ours;
mod watch;
