//! Numbers that a person reads in hexadecimal, as strings of JSON.

use serde::Serializer;

/// `0x…` of anything that has a number.
pub(crate) fn hex<T, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error>
where
    T: std::fmt::LowerHex,
{
    serializer.collect_str(&format_args!("{value:#x}"))
}

/// The same for what may be missing.
#[expect(clippy::ref_option, reason = "serde gives a reference to the field")]
pub(crate) fn hex_option<T, S: Serializer>(
    value: &Option<T>,
    serializer: S,
) -> Result<S::Ok, S::Error>
where
    T: std::fmt::LowerHex,
{
    match value {
        Some(value) => hex(value, serializer),
        None => serializer.serialize_none(),
    }
}
