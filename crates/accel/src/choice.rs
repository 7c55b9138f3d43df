//! Which accelerator, and why.

use std::fmt;
use std::sync::Arc;

use crate::{Accelerator, kernel, user};

/// An accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `/dev/kvm`.
    Kernel,
    /// KVM in user space.
    User,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Kernel => "kvm",
            Kind::User => "user",
        })
    }
}

/// What the caller wants.
#[derive(Clone, Copy, Debug, Default)]
pub enum Preference {
    /// The kernel's where it works, else ours.
    #[default]
    Auto,
    /// The kernel's, or nothing.
    Kernel,
    /// Ours.
    User(user::Config),
}

/// The accelerator that was taken, and why.
pub struct Choice {
    /// The accelerator.
    pub accelerator: Arc<dyn Accelerator>,
    /// One sentence for the user.
    pub reason: String,
}

/// No accelerator of the kind asked for.
#[derive(Debug, thiserror::Error)]
#[error("the accelerator {kind} can't be used: {reason}")]
pub struct Refused {
    /// Which was asked for.
    pub kind: Kind,
    /// One sentence for the user.
    pub reason: String,
}

/// What opening an accelerator gives; on failure, a sentence that says why.
pub(crate) type Opened = Result<Arc<dyn Accelerator>, String>;

/// Takes the accelerator that the caller prefers; `Auto` says why it took which.
pub fn choose(preference: Preference) -> Result<Choice, Refused> {
    match preference {
        Preference::Auto => automatic(),
        Preference::Kernel => asked_for(Kind::Kernel, kernel::open()),
        Preference::User(config) => asked_for(Kind::User, user::open(config)),
    }
}

fn asked_for(kind: Kind, opened: Opened) -> Result<Choice, Refused> {
    match opened {
        Ok(accelerator) => Ok(Choice {
            accelerator,
            reason: format!("{kind}: asked for"),
        }),
        Err(reason) => Err(Refused { kind, reason }),
    }
}

fn automatic() -> Result<Choice, Refused> {
    let why_not_kernel = match kernel::open() {
        Ok(accelerator) => {
            return Ok(Choice {
                accelerator,
                reason: "kvm: /dev/kvm opens and works".to_owned(),
            });
        }
        Err(reason) => reason,
    };
    match user::open(user::Config::default()) {
        Ok(accelerator) => Ok(Choice {
            accelerator,
            reason: format!("user: {why_not_kernel}"),
        }),
        Err(reason) => Err(Refused {
            kind: Kind::User,
            reason: format!("{reason} (and kvm: {why_not_kernel})"),
        }),
    }
}
