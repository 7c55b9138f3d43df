//! What is asked: an address of one of the four spaces, and an access.

use std::fmt;
use std::str::FromStr;

use addr::{Gpa, Gva, Hpa, Hva};

use crate::hex;

/// An address of any space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Guest virtual.
    Gva(Gva),
    /// Guest physical.
    Gpa(Gpa),
    /// Host virtual, in the monitor.
    Hva(Hva),
    /// Host physical.
    Hpa(Hpa),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gva(a) => write!(f, "gva:{a:#x}"),
            Self::Gpa(a) => write!(f, "gpa:{a:#x}"),
            Self::Hva(a) => write!(f, "hva:{a:#x}"),
            Self::Hpa(a) => write!(f, "hpa:{a:#x}"),
        }
    }
}

/// Text that names no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no address: write gva:0x…, gpa:0x…, hva:0x… or hpa:0x… (0x… alone is a gva), or a \
     symbol of the guest's kernel"
)]
pub struct NoAddress {
    text: String,
}

impl FromStr for Target {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let wrong = || NoAddress {
            text: text.to_owned(),
        };
        let (space, number) = text.split_once(':').unwrap_or(("gva", text));
        if !text.contains(':') && !number.starts_with("0x") {
            return Err(wrong());
        }
        let number = hex::parse(number).ok_or_else(wrong)?;
        match space {
            "gva" => Ok(Self::Gva(Gva::new(number))),
            "gpa" => Ok(Self::Gpa(Gpa::new(number))),
            "hva" => Ok(Self::Hva(Hva::new(number))),
            "hpa" => Ok(Self::Hpa(Hpa::new(number))),
            _ => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        for text in [
            "gva:0xffffffff81000000",
            "gpa:0x0",
            "hva:0x7f00",
            "hpa:0x1000",
        ] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
        assert_eq!("0x10".parse(), Ok(Target::Gva(Gva::new(0x10))));
        assert_eq!("gpa:ff".parse(), Ok(Target::Gpa(Gpa::new(0xff))));
        for text in [
            "",
            "gva:",
            "10",
            "xva:0x1",
            "gva:0x1g",
            "gva:0x11112222333344445",
            "gva:+1",
        ] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }
}
