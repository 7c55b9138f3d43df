//! Which accelerator, and why.

use std::fmt;
use std::sync::Arc;

use crate::{
    Accelerator,
    detect::{KernelKvm, KvmKind, UserSupport},
    kernel, user,
};

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
///
/// `Auto` takes the kernel's KVM where it is hardware virtualisation, and ours elsewhere: a
/// software KVM opens as well, and is no help. An explicit preference is never changed.
pub fn choose(preference: Preference) -> Result<Choice, Refused> {
    match preference {
        Preference::Auto => automatic(&KernelKvm::probe()),
        Preference::Kernel => kernel_or_nothing(&KernelKvm::probe(), "asked for; "),
        Preference::User(config) => user_or_nothing(config, "asked for".to_owned()),
    }
}

fn automatic(kernel: &KernelKvm) -> Result<Choice, Refused> {
    if kernel.kind() == Some(KvmKind::Hardware) {
        kernel_or_nothing(kernel, "")
    } else {
        user_or_nothing(user::Config::default(), kernel.describe())
    }
}

fn kernel_or_nothing(found: &KernelKvm, prefix: &str) -> Result<Choice, Refused> {
    let reason = format!("{prefix}{}", found.describe());
    let refused = |reason| Refused {
        kind: Kind::Kernel,
        reason,
    };
    if !found.opens() {
        return Err(refused(found.describe()));
    }
    let accelerator = kernel::open().map_err(refused)?;
    Ok(Choice {
        accelerator,
        reason,
    })
}

fn user_or_nothing(config: user::Config, why: String) -> Result<Choice, Refused> {
    let refused = |reason| Refused {
        kind: Kind::User,
        reason,
    };
    if let Some(missing) = UserSupport::probe().missing() {
        return Err(refused(format!(
            "this host denies what it needs: {missing}"
        )));
    }
    let accelerator = user::open(config).map_err(refused)?;
    Ok(Choice {
        accelerator,
        reason: why,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_kvm_is_refused_with_the_reason_where_it_is_absent() {
        let refused = kernel_or_nothing(&KernelKvm::Absent, "").err().unwrap();
        assert_eq!(refused.kind, Kind::Kernel);
        assert!(refused.to_string().contains("no /dev/kvm"), "{refused}");
    }

    #[test]
    fn auto_never_takes_a_software_kvm() {
        let software = KernelKvm::Open {
            api_version: 12,
            kind: KvmKind::Software,
            evidence: vec!["a test said so".to_owned()],
            ns_per_instruction: None,
        };
        let kind = match automatic(&software) {
            Ok(choice) => choice.accelerator.kind(),
            Err(refused) => refused.kind,
        };
        assert_eq!(kind, Kind::User);
    }
}
