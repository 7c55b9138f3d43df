//! Which accelerators work on this host, and which one to take.
//!
//! `/dev/kvm` opens on machines where it is of no use: some hosts offer a *software* KVM, which
//! implements the API by emulating the guest in the kernel. [`kernel`] tells the two apart by
//! measuring, not by trusting one flag. [`choose`] then takes what the user asked for, or the
//! better one that will work, and always says why; it never changes an explicit choice.

pub mod kernel;
mod timed;
pub mod user;

use std::{fmt, str::FromStr};

use thiserror::Error;

pub use kernel::{KernelKvm, KvmKind};
pub use user::UserSupport;

/// An implementation of KVM's API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Accel {
    /// The host kernel's `/dev/kvm`.
    Kvm,
    /// Fourfold's own, in user space.
    User,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::User => "user",
        })
    }
}

/// What a user can ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The best that works.
    #[default]
    Auto,
    /// This one, or an error.
    Only(Accel),
}

/// A name that is no accelerator.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("no accelerator is called `{0}`: there are `auto`, `kvm` and `user`")]
pub struct UnknownAccel(String);

impl FromStr for Choice {
    type Err = UnknownAccel;

    fn from_str(name: &str) -> Result<Self, UnknownAccel> {
        match name {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Only(Accel::Kvm)),
            "user" => Ok(Self::Only(Accel::User)),
            other => Err(UnknownAccel(other.to_owned())),
        }
    }
}

/// What this host offers.
#[derive(Clone, Debug, PartialEq)]
pub struct Offer {
    /// The kernel's KVM.
    pub kernel: KernelKvm,
    /// What ours needs.
    pub user: UserSupport,
}

impl Offer {
    /// Looks. Takes a few milliseconds, up to a tenth of a second beside a software KVM.
    pub fn of_this_host() -> Self {
        Self {
            kernel: KernelKvm::probe(),
            user: UserSupport::probe(),
        }
    }
}

/// The accelerator that was taken, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Which.
    pub accel: Accel,
    /// A sentence for the user.
    pub why: String,
}

/// Why none can be taken.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NoAccel {
    /// The kernel's was asked for and can't be used.
    #[error("--accel kvm: {0}")]
    Kernel(String),
    /// Ours was asked for, or is the only one left, and can't run here.
    #[error("--accel user: this host denies what it needs: {0}")]
    User(String),
}

/// Takes what `choice` asks for from `offer`.
pub fn choose(choice: Choice, offer: &Offer) -> Result<Chosen, NoAccel> {
    match choice {
        Choice::Only(Accel::Kvm) if offer.kernel.opens() => Ok(Chosen {
            accel: Accel::Kvm,
            why: format!("asked for; {}", offer.kernel.describe()),
        }),
        Choice::Only(Accel::Kvm) => Err(NoAccel::Kernel(offer.kernel.describe())),
        Choice::Only(Accel::User) => take_user(offer, "asked for".to_owned()),
        Choice::Auto if offer.kernel.kind() == Some(KvmKind::Hardware) => Ok(Chosen {
            accel: Accel::Kvm,
            why: offer.kernel.describe(),
        }),
        Choice::Auto => take_user(offer, offer.kernel.describe()),
    }
}

fn take_user(offer: &Offer, why: String) -> Result<Chosen, NoAccel> {
    match offer.user.missing() {
        Some(missing) => Err(NoAccel::User(missing)),
        None => Ok(Chosen {
            accel: Accel::User,
            why,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(kernel: KernelKvm) -> Offer {
        Offer {
            kernel,
            user: UserSupport::complete(),
        }
    }

    fn open(kind: KvmKind) -> KernelKvm {
        KernelKvm::Open {
            api_version: 12,
            kind,
            evidence: vec!["a test said so".to_owned()],
        }
    }

    #[test]
    fn auto_takes_hardware_kvm_and_nothing_less() {
        let chosen = |kernel| choose(Choice::Auto, &offer(kernel)).unwrap().accel;
        assert_eq!(chosen(open(KvmKind::Hardware)), Accel::Kvm);
        assert_eq!(chosen(open(KvmKind::Software)), Accel::User);
        assert_eq!(chosen(open(KvmKind::Broken)), Accel::User);
        assert_eq!(chosen(KernelKvm::Absent), Accel::User);
    }

    #[test]
    fn an_explicit_choice_is_never_changed() {
        let kvm = Choice::Only(Accel::Kvm);
        let refusal = choose(kvm, &offer(KernelKvm::Absent)).unwrap_err();
        assert!(matches!(refusal, NoAccel::Kernel(_)));
        let software = choose(kvm, &offer(open(KvmKind::Software))).unwrap();
        assert_eq!(software.accel, Accel::Kvm);
        assert!(software.why.contains("software"), "{}", software.why);
    }

    #[test]
    fn names_parse_and_a_wrong_one_lists_the_right_ones() {
        assert_eq!("kvm".parse(), Ok(Choice::Only(Accel::Kvm)));
        let error = "hvf".parse::<Choice>().unwrap_err().to_string();
        assert!(error.contains("`hvf`") && error.contains("`user`"));
    }
}
