//! Run x86-64 virtual machines and see how guest addresses become host pages.

fn main() {}
