//! /dev/kvm for programs that are not ours.
