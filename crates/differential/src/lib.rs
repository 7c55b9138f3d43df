//! The physical CPU as an oracle: the same bytes run natively and on the CPU under test, compared bit for bit.
//!
//! Generators and oracles are separate:
//!
//! | module       | what it does                                                             |
//! |--------------|--------------------------------------------------------------------------|
//! | [`layout`]   | where code and data lie, the same on both sides                          |
//! | [`local`]    | the descriptor table that 16-bit code needs                               |
//! | [`case`]     | what goes in and what comes out                                          |
//! | [`generate`] | draws forms, operands, states, programs                                  |
//! | [`native`]   | runs cases on the physical CPU, in a child process                       |
//! | [`guest`]    | runs cases on the translating CPU, in a long-mode guest                  |
//! | [`compare`]  | two outcomes side by side                                                |
//! | [`steady`]   | whether a difference comes back, and if not, which side changed its mind  |
//! | [`minimise`] | makes a failing case small                                               |
//! | [`campaign`] | a run through the catalogue                                              |
//! | [`report`]   | how a divergence is printed                                              |
//!
//! [`hostile`] runs code that nobody wrote; there is nothing to compare it with.

pub mod campaign;
pub mod case;
pub mod compare;
pub mod generate;
pub mod guest;
pub mod hostile;
pub mod layout;
pub mod local;
pub mod minimise;
pub mod native;
pub mod report;
pub mod steady;
