//! How Linux composes the number of an ioctl (`asm-generic/ioctl.h`): direction, size of the
//! argument's structure, type, number.

/// KVM's ioctl type.
pub const KVMIO: u32 = 0xae;

const WRITE: u32 = 1;
const READ: u32 = 2;

const fn compose(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | KVMIO << 8 | number
}

/// `_IO`: the argument is a number, or there is none.
pub const fn io(number: u32) -> u32 {
    compose(0, number, 0)
}

/// `_IOR`: the call writes a `T` for the program to read.
pub const fn ior<T>(number: u32) -> u32 {
    compose(READ, number, size_of::<T>())
}

/// `_IOW`: the call reads a `T`.
pub const fn iow<T>(number: u32) -> u32 {
    compose(WRITE, number, size_of::<T>())
}

/// `_IOWR`: both.
pub const fn iowr<T>(number: u32) -> u32 {
    compose(READ | WRITE, number, size_of::<T>())
}

/// The part of an ioctl's number that KVM gave.
pub const fn number(request: u32) -> u32 {
    request & 0xff
}

/// The direction as the header spells it.
pub const fn macro_name(request: u32) -> &'static str {
    match request >> 30 {
        0 => "_IO",
        WRITE => "_IOW",
        READ => "_IOR",
        _ => "_IOWR",
    }
}
