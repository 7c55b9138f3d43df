//! What `fourfold exec` was asked for, in the one environment variable that carries it here.

use std::ffi::CStr;
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
    /// Those of this process. This allocates nothing: a program's allocator may be the first to make
    /// a call that gets here, with its lock held (jemalloc opens a file when it starts).
    pub(crate) fn get() -> Self {
        static SETTINGS: OnceLock<Settings> = OnceLock::new();
        *SETTINGS.get_or_init(|| {
            // SAFETY: the name is a C string. What is found is not changed while it is read: nobody
            // but `fourfold exec` sets it.
            let text = unsafe {
                let text = libc::getenv(c"FOURFOLD_EXEC".as_ptr());
                (!text.is_null()).then(|| CStr::from_ptr(text))
            };
            Self::parse(text.and_then(|text| text.to_str().ok()).unwrap_or_default())
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
