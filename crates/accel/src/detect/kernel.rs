//! `/dev/kvm`: is it there, may we open it, and what is behind it.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path, sync::OnceLock, time::Duration};

use kvm_ioctls::Kvm;

use super::timed::{self, Timing};

const DEVICE: &str = "/dev/kvm";

/// A guest instruction on hardware takes about a host cycle or two; a software KVM that emulates
/// needs hundreds. Anything above this many nanoseconds each is no hardware.
const SOFTWARE_NS_PER_INSTRUCTION: f64 = 20.0;

/// What `/dev/kvm` is.
#[derive(Clone, Debug, PartialEq)]
pub enum KernelKvm {
    /// There is no such file.
    Absent,
    /// It is there and may not be opened by us.
    Denied {
        /// The error's text.
        error: String,
        /// Permission bits of the file.
        mode: u32,
        /// Its group.
        gid: u32,
    },
    /// It is there and can't be opened for another reason (no module behind the node, say).
    Unusable {
        /// The error's text.
        error: String,
    },
    /// It opens.
    Open {
        /// `KVM_GET_API_VERSION`, 12 for every kernel of this century.
        api_version: i32,
        /// What is behind it.
        kind: KvmKind,
        /// What tells so.
        evidence: Vec<String>,
        /// How long a guest instruction takes, where a guest runs at all.
        ns_per_instruction: Option<f64>,
    },
}

/// What runs the guest's instructions behind `/dev/kvm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmKind {
    /// The CPU's own virtualisation (VMX or SVM).
    Hardware,
    /// Emulation in the kernel: the API is there, the speed is not.
    Software,
    /// The device opens, but a three-instruction guest does not run.
    Broken,
}

impl KernelKvm {
    /// Looks at this host's, once in a process: a test guest runs, which takes its time.
    pub fn probe() -> Self {
        static SEEN: OnceLock<KernelKvm> = OnceLock::new();
        SEEN.get_or_init(Self::look).clone()
    }

    fn look() -> Self {
        let Ok(metadata) = fs::metadata(DEVICE) else {
            return Self::Absent;
        };
        match Kvm::new() {
            Ok(kvm) => Self::examine(&kvm),
            Err(errno) => {
                let error = io::Error::from_raw_os_error(errno.errno());
                if error.kind() == io::ErrorKind::PermissionDenied {
                    Self::Denied {
                        error: error.to_string(),
                        mode: metadata.mode() & 0o777,
                        gid: metadata.gid(),
                    }
                } else {
                    Self::Unusable {
                        error: error.to_string(),
                    }
                }
            }
        }
    }

    /// Whether guests can be made at all.
    pub fn opens(&self) -> bool {
        matches!(self, Self::Open { kind, .. } if *kind != KvmKind::Broken)
    }

    /// What is behind it, where it opens.
    pub fn kind(&self) -> Option<KvmKind> {
        match self {
            Self::Open { kind, .. } => Some(*kind),
            _ => None,
        }
    }

    /// A sentence for the user.
    pub fn describe(&self) -> String {
        match self {
            Self::Absent => "there is no /dev/kvm".to_owned(),
            Self::Denied { error, mode, gid } => {
                format!("/dev/kvm (mode {mode:03o}, group {gid}) may not be opened: {error}")
            }
            Self::Unusable { error } => format!("/dev/kvm does not open: {error}"),
            Self::Open { kind, evidence, .. } => {
                let what = match kind {
                    KvmKind::Hardware => "/dev/kvm is hardware virtualisation",
                    KvmKind::Software => "/dev/kvm is a software KVM",
                    KvmKind::Broken => "/dev/kvm opens but runs no guest",
                };
                format!("{what} ({})", evidence.join("; "))
            }
        }
    }

    fn examine(kvm: &Kvm) -> Self {
        let mut evidence = modules();
        let flag = cpu_flag();
        evidence.push(match flag {
            Some(name) => format!("the CPU has {name}"),
            None => "the CPU shows neither vmx nor svm".to_owned(),
        });
        let (kind, ns_per_instruction) = match timed::run(kvm) {
            Ok(timing) => {
                evidence.push(timing.to_string());
                let ns = timing.ns_per_instruction();
                (judge(flag.is_some(), timing), Some(ns))
            }
            Err(error) => {
                evidence.push(error.to_string());
                (KvmKind::Broken, None)
            }
        };
        Self::Open {
            api_version: kvm.get_api_version(),
            kind,
            evidence,
            ns_per_instruction,
        }
    }

    /// How long so many guest instructions take.
    pub fn time_for(&self, instructions: u32) -> Option<Duration> {
        match self {
            Self::Open {
                ns_per_instruction: Some(ns),
                ..
            } => Some(Duration::from_secs_f64(ns * f64::from(instructions) / 1e9)),
            _ => None,
        }
    }
}

fn judge(cpu_can: bool, timing: Timing) -> KvmKind {
    if cpu_can && timing.ns_per_instruction() < SOFTWARE_NS_PER_INSTRUCTION {
        KvmKind::Hardware
    } else {
        KvmKind::Software
    }
}

/// The virtualisation flag in `/proc/cpuinfo`.
pub fn cpu_flag() -> Option<&'static str> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").ok()?;
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    ["vmx", "svm"]
        .into_iter()
        .find(|name| flags.split_whitespace().any(|flag| flag == *name))
}

fn modules() -> Vec<String> {
    ["kvm_intel", "kvm_amd", "kvm_pvm"]
        .into_iter()
        .filter(|name| Path::new("/sys/module").join(name).exists())
        .map(|name| format!("module {name} is loaded"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_or_without_the_cpu_is_software() {
        let fast = Timing::new(1_000_000, std::time::Duration::from_micros(400));
        let slow = Timing::new(1_000_000, std::time::Duration::from_millis(300));
        assert_eq!(judge(true, fast), KvmKind::Hardware);
        assert_eq!(judge(true, slow), KvmKind::Software);
        assert_eq!(judge(false, fast), KvmKind::Software);
    }

    #[test]
    fn probing_this_host_gives_a_sentence() {
        let kernel = KernelKvm::probe();
        println!("{}", kernel.describe());
        assert!(kernel.describe().contains("/dev/kvm"));
        assert_eq!(
            kernel.kind().is_some(),
            matches!(kernel, KernelKvm::Open { .. })
        );
    }
}
