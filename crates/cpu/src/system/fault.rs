//! Constructors of the exceptions that system instructions raise.

use x86::descriptor::Selector;
use x86::vector;

use super::Abort;
use crate::Exception;

impl Exception {
    /// An exception without an error code.
    pub const fn plain(vector: u8) -> Self {
        Self {
            vector,
            error_code: None,
            payload: None,
        }
    }

    /// An exception with an error code.
    pub const fn with_code(vector: u8, code: u32) -> Self {
        Self {
            vector,
            error_code: Some(code),
            payload: None,
        }
    }

    /// `#PF` with CR2 and error code.
    pub const fn page_fault(address: addr::Gva, code: u32) -> Self {
        Self {
            vector: vector::PF,
            error_code: Some(code),
            payload: Some(address.raw()),
        }
    }

    /// `#DB` with the new bits of DR6.
    pub const fn debug(dr6: u64) -> Self {
        Self {
            vector: vector::DB,
            error_code: None,
            payload: Some(dr6),
        }
    }
}

/// `#UD`.
pub(super) const fn undefined() -> Abort {
    Abort::Exception(Exception::plain(vector::UD))
}

/// `#GP(0)`.
pub(super) const fn general() -> Abort {
    Abort::Exception(Exception::with_code(vector::GP, 0))
}

/// `#GP(selector)`.
pub(super) const fn general_at(selector: Selector) -> Abort {
    Abort::Exception(Exception::with_code(vector::GP, selector.error_code()))
}

/// `#SS(0)`.
pub(super) const fn stack() -> Abort {
    Abort::Exception(Exception::with_code(vector::SS, 0))
}

/// An exception whose error code names a selector.
pub(super) const fn naming(vector: u8, selector: Selector) -> Abort {
    Abort::Exception(Exception::with_code(vector, selector.error_code()))
}

/// `#DB` as a fault.
pub(super) const fn debug(dr6: u64) -> Abort {
    Abort::Exception(Exception::debug(dr6))
}
