//! What `fourfold exec` was asked for, in the one environment variable that carries it here.

use std::sync::OnceLock;

use kvm::{LargePages, PagingPath};

/// Whose KVM the program gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Accel {
    /// Ours.
    #[default]
    User,
    /// The kernel's: calls are watched and handed on.
    Kernel,
}

/// The options of `fourfold exec`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Whose KVM.
    pub(crate) accel: Accel,
    /// How ours goes from guest virtual addresses to host ones.
    pub(crate) paging: PagingPath,
    /// Print each call.
    pub(crate) trace: bool,
    /// Print sums at the end.
    pub(crate) stats: bool,
    /// No control socket.
    pub(crate) private: bool,
    /// Leave out filters of system calls that would end the engine.
    pub(crate) ignore_seccomp: bool,
}

impl Settings {
    /// Those of this process.
    pub(crate) fn get() -> Self {
        static SETTINGS: OnceLock<Settings> = OnceLock::new();
        *SETTINGS.get_or_init(|| {
            let text = std::env::var("FOURFOLD_EXEC").unwrap_or_default();
            Self::parse(&text)
        })
    }

    /// Reads `word,word=value`; what it does not know it leaves out, for the command may be newer.
    fn parse(text: &str) -> Self {
        let mut settings = Self::default();
        for word in text.split(',') {
            match word {
                "accel=kvm" => settings.accel = Accel::Kernel,
                "paging=shadow" => settings.paging = PagingPath::Shadow,
                "paging=direct" => settings.paging = PagingPath::Direct,
                "trace" => settings.trace = true,
                "stats" => settings.stats = true,
                "private" => settings.private = true,
                "ignore-seccomp" => settings.ignore_seccomp = true,
                _ => {}
            }
        }
        settings
    }

    /// How VMs of ours work.
    pub(crate) fn of_vms(self) -> kvm::Settings {
        kvm::Settings {
            paging: self.paging,
            // Programs read the page statistics, and know what to expect of the kernel's.
            large_pages: LargePages::OfHost,
            ..kvm::Settings::default()
        }
    }

    /// Whether calls are to be timed.
    pub(crate) fn watches(self) -> bool {
        self.trace || self.stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_command_writes() {
        let settings = Settings::parse("accel=kvm,paging=direct,trace");
        assert_eq!(settings.accel, Accel::Kernel);
        assert_eq!(settings.paging, PagingPath::Direct);
        assert!(settings.trace && !settings.stats && settings.watches());
        assert_eq!(Settings::parse(""), Settings::default());
        assert_eq!(Settings::parse("something=new"), Settings::default());
    }
}
