//! What the `user` accelerator needs of the host: little, but containers can deny even that.

#![expect(
    unsafe_code,
    reason = "memfd_create and mmap are tried, because only trying tells"
)]

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

/// One thing that the accelerator relies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Its name.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// Why it is not to be had; `None` where it is.
    pub problem: Option<String>,
}

/// All that it relies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserSupport {
    /// Each of them.
    pub needs: Vec<Need>,
}

impl UserSupport {
    /// Tries each.
    pub fn probe() -> Self {
        let memfd = create_memfd();
        let executable = memfd
            .as_ref()
            .map_err(ToString::to_string)
            .and_then(|fd| map_executable(fd).map_err(|error| error.to_string()));
        Self {
            needs: vec![
                Need {
                    name: "memfd",
                    purpose: "kvm_run pages and the code cache",
                    problem: memfd.err().map(|error| error.to_string()),
                },
                Need {
                    name: "executable memfd mapping",
                    purpose: "translated code, never writable and executable at one address",
                    problem: executable.err(),
                },
                Need {
                    name: "AVX2 and BMI2",
                    purpose: "the host instructions that translated code uses",
                    problem: missing_instructions(),
                },
            ],
        }
    }

    /// A host that has everything.
    #[cfg(test)]
    fn complete() -> Self {
        Self { needs: Vec::new() }
    }

    /// What is missing, as a sentence, or `None`.
    pub fn missing(&self) -> Option<String> {
        let missing: Vec<_> = self
            .needs
            .iter()
            .filter_map(|need| Some(format!("{}: {}", need.name, need.problem.as_ref()?)))
            .collect();
        (!missing.is_empty()).then(|| missing.join("; "))
    }
}

fn create_memfd() -> io::Result<OwnedFd> {
    // SAFETY: the name is a literal with a NUL, and a descriptor is only taken where it is one.
    unsafe {
        let fd = libc::memfd_create(c"fourfold-probe".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

fn map_executable(fd: &OwnedFd) -> io::Result<()> {
    const LEN: usize = 4096;
    // SAFETY: a new mapping at an address of the kernel's choice, removed before anybody sees it.
    unsafe {
        if libc::ftruncate(fd.as_raw_fd(), LEN as libc::off_t) != 0 {
            return Err(io::Error::last_os_error());
        }
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        let fd = fd.as_raw_fd();
        let at = libc::mmap(ptr::null_mut(), LEN, protection, libc::MAP_SHARED, fd, 0);
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        libc::munmap(at, LEN);
    }
    Ok(())
}

fn missing_instructions() -> Option<String> {
    let has = [
        ("avx2", std::is_x86_feature_detected!("avx2")),
        ("bmi2", std::is_x86_feature_detected!("bmi2")),
    ];
    let missing: Vec<_> = has
        .iter()
        .filter(|(_, has)| !has)
        .map(|(n, _)| *n)
        .collect();
    (!missing.is_empty()).then(|| format!("the CPU has no {}", missing.join(", no ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_reason() {
        let mut support = UserSupport::complete();
        assert_eq!(support.missing(), None);
        support.needs.push(Need {
            name: "memfd",
            purpose: "a test",
            problem: Some("Operation not permitted".to_owned()),
        });
        assert_eq!(support.missing().unwrap(), "memfd: Operation not permitted");
    }

    #[test]
    fn the_test_host_runs_it() {
        assert_eq!(UserSupport::probe().missing(), None);
    }
}
