//! Where running machines are found: one folder of sockets, the owner's alone.
//!
//! | path                               | what                                                     |
//! |------------------------------------|----------------------------------------------------------|
//! | `$XDG_RUNTIME_DIR/fourfold`        | the folder, mode 0700                                    |
//! | `/tmp/fourfold-UID`                | the folder where there is no such variable               |
//! | `NAME.sock`                        | a machine's control socket, mode 0600                    |
//! | `NAME.lock`                        | locked for as long as the machine lives; holds its pid   |
//!
//! The lock decides who lives: a process that dies, however it dies, loses it. A socket whose lock
//! can be taken is left over from such a process, and is removed by whoever finds it.

#![expect(unsafe_code, reason = "flock and geteuid are libc's")]

use std::{
    env,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read, Seek, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::{
            fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// Why a machine has no control socket, or can't be found.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// A name that is no file name for everybody.
    #[error(
        "{name:?} is no name for a machine: give 1 to 48 letters, digits, dots, dashes or \
         underscores, not beginning with a dot"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// Somebody else could put sockets there.
    #[error("{} belongs to another user, or others may write there: remove it", path.display())]
    NotOurs {
        /// The folder.
        path: PathBuf,
    },
    /// Another machine has the name.
    #[error(
        "a machine named {name} runs already{}: give another --name, or end it with \
         `fourfold stop {name}`", pid.map_or(String::new(), |pid| format!(" (pid {pid})"))
    )]
    Taken {
        /// The name.
        name: String,
        /// Its process, if it could be read.
        pid: Option<u32>,
    },
    /// No such machine.
    #[error("no machine named {name} runs{}", listed(.known))]
    Unknown {
        /// The name.
        name: String,
        /// Those that run.
        known: Vec<String>,
    },
    /// A system call failed.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
    },
}

fn listed(names: &[String]) -> String {
    if names.is_empty() {
        "; none runs now".to_owned()
    } else {
        format!("; there are: {}", names.join(", "))
    }
}

/// The folder of sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory(PathBuf);

/// A name that a machine holds while it lives, with its socket.
#[derive(Debug)]
pub struct Claim {
    name: String,
    socket: PathBuf,
    lock_path: PathBuf,
    lock: File,
}

impl Directory {
    /// This user's, made if need be.
    pub fn of_user() -> Result<Self, DirectoryError> {
        let runtime = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let path = runtime.filter(|path| path.is_absolute()).map_or_else(
            || PathBuf::from(format!("/tmp/fourfold-{}", effective_user())),
            |path| path.join("fourfold"),
        );
        Self::at(path)
    }

    /// This folder, made if need be.
    pub fn at(path: PathBuf) -> Result<Self, DirectoryError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map_err(io("making", &path))?;
        let meta = fs::symlink_metadata(&path).map_err(io("looking at", &path))?;
        if !meta.is_dir() || meta.uid() != effective_user() || meta.mode() & 0o022 != 0 {
            return Err(DirectoryError::NotOurs { path });
        }
        Ok(Self(path))
    }

    /// Where a machine's socket is.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.sock"))
    }

    /// Takes a name; what a dead machine of that name left is removed.
    pub fn claim(&self, name: &str) -> Result<Claim, DirectoryError> {
        check_name(name)?;
        let lock_path = self.0.join(format!("{name}.lock"));
        let mut lock = open_lock(&lock_path)?;
        if !lock_patiently(&lock) {
            return Err(DirectoryError::Taken {
                name: name.to_owned(),
                pid: read_pid(&mut lock),
            });
        }
        // Who found the file unlocked may have removed it between our two calls.
        if !lock_path.exists() {
            return self.claim(name);
        }
        let written = lock
            .set_len(0)
            .and_then(|()| write!(lock, "{}", std::process::id()));
        written.map_err(io("writing", &lock_path))?;
        let socket = self.socket(name);
        let _ = fs::remove_file(&socket);
        Ok(Claim {
            name: name.to_owned(),
            socket,
            lock_path,
            lock,
        })
    }

    /// The names of the machines that live, sorted; leftovers of dead ones are removed.
    pub fn names(&self) -> Result<Vec<String>, DirectoryError> {
        let entries = fs::read_dir(&self.0).map_err(io("reading", &self.0))?;
        let mut names = Vec::new();
        for entry in entries.flatten() {
            let file = entry.file_name().to_string_lossy().into_owned();
            let Some(name) = file.strip_suffix(".lock") else {
                continue;
            };
            if check_name(name).is_err() {
                continue;
            }
            if self.lives(name) {
                names.push(name.to_owned());
            } else {
                let _ = fs::remove_file(self.socket(name));
                let _ = fs::remove_file(entry.path());
            }
        }
        names.sort();
        Ok(names)
    }

    /// The name of the machine that this process runs, if it runs one.
    pub fn name_of(&self, pid: u32) -> Result<Option<String>, DirectoryError> {
        let names = self.names()?.into_iter();
        let is_it = |name: &String| {
            let lock = File::open(self.0.join(format!("{name}.lock")));
            lock.is_ok_and(|mut lock| read_pid(&mut lock) == Some(pid))
        };
        Ok(names.into_iter().find(is_it))
    }

    /// The socket of a machine that lives.
    pub fn find(&self, name: &str) -> Result<PathBuf, DirectoryError> {
        check_name(name)?;
        if self.lives(name) {
            return Ok(self.socket(name));
        }
        Err(DirectoryError::Unknown {
            name: name.to_owned(),
            known: self.names()?,
        })
    }

    fn lives(&self, name: &str) -> bool {
        File::open(self.0.join(format!("{name}.lock")))
            .is_ok_and(|lock| !try_lock(&lock, libc::LOCK_SH))
    }
}

impl Claim {
    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The socket's path.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The descriptor of the lock.
    pub(crate) fn lock_fd(&self) -> RawFd {
        self.lock.as_raw_fd()
    }

    /// Removes the socket and the lock's file.
    pub(crate) fn remove_files(&self) {
        let _ = fs::remove_file(&self.socket);
        let _ = fs::remove_file(&self.lock_path);
    }

    /// Listens; from now on the machine can be reached.
    pub(crate) fn listen(&self) -> Result<UnixListener, DirectoryError> {
        let listener = UnixListener::bind(&self.socket).map_err(io("binding", &self.socket))?;
        // The folder keeps others out meanwhile.
        let owner_only = Permissions::from_mode(0o600);
        fs::set_permissions(&self.socket, owner_only).map_err(io("protecting", &self.socket))?;
        Ok(listener)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.remove_files();
        // The lock itself goes with the file.
        let _ = self.lock.flush();
    }
}

fn check_name(name: &str) -> Result<(), DirectoryError> {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if (1..=48).contains(&name.len()) && !name.starts_with('.') && name.chars().all(good) {
        Ok(())
    } else {
        let name = name.to_owned();
        Err(DirectoryError::Name { name })
    }
}

fn open_lock(path: &Path) -> Result<File, DirectoryError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).mode(0o600);
    options
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(io("opening", path))
}

/// Takes the lock for good. Somebody who only looks holds it for some microseconds.
fn lock_patiently(file: &File) -> bool {
    (0..20).any(|_| {
        let locked = try_lock(file, libc::LOCK_EX);
        if !locked {
            thread::sleep(Duration::from_millis(2));
        }
        locked
    })
}

fn try_lock(file: &File, kind: libc::c_int) -> bool {
    // SAFETY: the descriptor is open for the call's length.
    unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) == 0 }
}

fn read_pid(lock: &mut File) -> Option<u32> {
    let mut text = String::new();
    lock.rewind().ok()?;
    lock.take(16).read_to_string(&mut text).ok()?;
    text.parse().ok()
}

/// The user that this process acts as.
pub(crate) fn effective_user() -> u32 {
    // SAFETY: takes nothing and gives a number.
    unsafe { libc::geteuid() }
}

fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> DirectoryError + 'a {
    move |source| DirectoryError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str) -> Directory {
        let path = env::temp_dir().join(format!("fourfold-test-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Directory::at(path).unwrap()
    }

    #[test]
    fn one_name_is_one_machine() {
        let directory = directory("claim");
        let claim = directory.claim("a").unwrap();
        let second = directory.claim("a").unwrap_err().to_string();
        let pid = format!("(pid {})", std::process::id());
        assert!(second.contains("named a runs already") && second.contains(&pid));
        assert_eq!(directory.names().unwrap(), ["a"]);
        let own = directory.name_of(std::process::id()).unwrap();
        assert_eq!(own.as_deref(), Some("a"));
        assert_eq!(directory.name_of(u32::MAX).unwrap(), None);
        drop(claim);
        assert_eq!(directory.names().unwrap(), [""; 0]);
        let missing = directory.find("a").unwrap_err().to_string();
        assert!(missing.contains("none runs now"), "{missing}");
        fs::remove_dir_all(directory.0).unwrap();
    }

    #[test]
    fn what_a_dead_machine_left_is_no_machine() {
        let directory = directory("stale");
        fs::write(directory.0.join("dead.lock"), "1").unwrap();
        fs::write(directory.socket("dead"), "").unwrap();
        assert!(directory.find("dead").is_err());
        assert!(!directory.socket("dead").exists(), "removed");
        fs::write(directory.0.join("dead.lock"), "1").unwrap();
        let claim = directory.claim("dead").unwrap();
        assert!(claim.listen().is_ok());
        fs::remove_dir_all(directory.0.clone()).unwrap();
    }

    #[test]
    fn names_are_file_names_and_the_folder_is_ours() {
        let directory = directory("names");
        for name in ["", ".", "..", "a/b", ".hidden", "ä", &"x".repeat(49)] {
            assert!(
                matches!(directory.claim(name), Err(DirectoryError::Name { .. })),
                "{name}"
            );
        }
        fs::set_permissions(&directory.0, Permissions::from_mode(0o777)).unwrap();
        let shared = Directory::at(directory.0.clone());
        assert!(matches!(shared, Err(DirectoryError::NotOurs { .. })));
        fs::remove_dir_all(directory.0).unwrap();
    }
}
