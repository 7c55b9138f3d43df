//! A machine: boot protocols, buses, run loop; on either accelerator.
