//! The side under test: the same bytes at CPL 3 of a long-mode guest.

pub mod image;
