//! KVM in user space: the crate `kvm` behind the traits.

use kvm::PagingPath;

use crate::choice::Opened;

/// How the `user` accelerator works.
#[derive(Clone, Copy, Debug, Default)]
pub struct Config {
    /// The tables between guest and host addresses.
    pub paging: PagingPath,
}

/// Opens it; where it can't run on this host, a sentence that says why.
pub fn open(config: Config) -> Opened {
    Err(format!(
        "this build has no virtual CPU for {:?} paging",
        config.paging
    ))
}
