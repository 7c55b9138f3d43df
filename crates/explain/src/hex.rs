//! Numbers that a person reads in hexadecimal, as strings of JSON: `"0x1000"`.

use addr::{Gpa, Gva, Hpa, Hva};
use serde::{Deserialize, Deserializer, Serializer, de};

/// What is written so.
pub(crate) trait Number: Copy {
    fn to_raw(self) -> u64;
    fn from_raw(raw: u64) -> Option<Self>;
}

macro_rules! address {
    ($($space:ty),*) => {$(
        impl Number for $space {
            fn to_raw(self) -> u64 {
                self.raw()
            }
            fn from_raw(raw: u64) -> Option<Self> {
                Some(Self::new(raw))
            }
        }
    )*};
}

address!(Gva, Gpa, Hva, Hpa);

impl Number for u64 {
    fn to_raw(self) -> u64 {
        self
    }

    fn from_raw(raw: u64) -> Option<Self> {
        Some(raw)
    }
}

impl Number for u32 {
    fn to_raw(self) -> u64 {
        self.into()
    }

    fn from_raw(raw: u64) -> Option<Self> {
        raw.try_into().ok()
    }
}

/// `0x…`, or plain hexadecimal digits.
pub fn parse(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
    u64::from_str_radix(digits, 16).ok().filter(|_| plain)
}

fn from_text<N: Number, E: de::Error>(text: &str) -> Result<N, E> {
    let number = parse(text).and_then(N::from_raw);
    number.ok_or_else(|| E::custom(format!("{text:?} is no number like 0x1000")))
}

pub(crate) fn serialize<N: Number, S: Serializer>(value: &N, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{:#x}", value.to_raw()))
}

pub(crate) fn deserialize<'de, N: Number, D: Deserializer<'de>>(from: D) -> Result<N, D::Error> {
    from_text(&String::deserialize(from)?)
}

/// The same for what may be missing.
pub(crate) mod option {
    use super::{Number, from_text};
    use serde::{Deserialize, Deserializer, Serializer};

    #[expect(clippy::ref_option, reason = "serde gives a reference to the field")]
    pub(crate) fn serialize<N: Number, S: Serializer>(
        value: &Option<N>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => super::serialize(value, to),
            None => to.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, N: Number, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<N>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| from_text(&text)).transpose()
    }
}
