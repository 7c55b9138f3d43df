//! What is tested: forms, operands, states, programs. Knows nothing of who runs them.

pub mod addresses;
pub mod block;
pub mod catalogue;
pub mod features;
mod immediate;
pub mod operands;
pub mod single;
pub mod state;
mod steps;
pub mod values;

pub use catalogue::{Catalogue, Form, Tolerance};
pub use features::Exclusion;

/// A selector as the descriptor tables have them, or one that faults.
pub fn selector(rng: &mut fastrand::Rng) -> u16 {
    const SELECTORS: [u16; 11] = [0, 3, 0x2b, 0x33, 0x23, 0x2a, 0x10, 0x18, 0x08, 0xfff8, 0x7f];
    let locals = crate::local::ENTRIES.len();
    match rng.usize(..SELECTORS.len() + locals) {
        index if index < locals => crate::local::name(index as u16),
        index => SELECTORS[index - locals],
    }
}
