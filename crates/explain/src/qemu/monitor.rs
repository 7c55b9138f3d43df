//! QEMU's monitor: QMP on a Unix socket (`docs/interop/qmp-spec.rst`), through which the human
//! monitor's commands are asked.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

/// Why the monitor can't be asked.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// No such process, or not ours.
    #[error("reading the command line of process {pid}")]
    Process {
        /// Which.
        pid: u32,
        /// How it failed.
        source: io::Error,
    },
    /// Its command line names no socket.
    #[error(
        "the command line of process {pid} names no QMP socket: start QEMU with \
         `-qmp unix:PATH,server=on,wait=off`, or give --qmp PATH"
    )]
    NoSocket {
        /// Which process.
        pid: u32,
    },
    /// The socket does not answer as QMP.
    #[error("asking QEMU's monitor at {} (it serves one client at a time)", path.display())]
    Socket {
        /// Which.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
    },
    /// QEMU refused.
    #[error("QEMU refused `{command}`: {error}")]
    Refused {
        /// What was asked.
        command: String,
        /// Its words.
        error: String,
    },
}

/// A connection.
pub struct Monitor {
    path: PathBuf,
    from: BufReader<UnixStream>,
    to: UnixStream,
}

/// How long an answer may take: QEMU answers between two of its events.
const PATIENCE: Duration = Duration::from_secs(5);

impl Monitor {
    /// The monitor of a process, at `socket` or where its command line says.
    pub fn of_process(pid: u32, socket: Option<&Path>) -> Result<Self, MonitorError> {
        let path = match socket {
            Some(path) => path.to_owned(),
            None => find(pid)?,
        };
        Self::connect(&path).map_err(|source| MonitorError::Socket { path, source })
    }

    fn connect(path: &Path) -> io::Result<Self> {
        let to = UnixStream::connect(path)?;
        to.set_read_timeout(Some(PATIENCE))?;
        to.set_write_timeout(Some(PATIENCE))?;
        let from = BufReader::new(to.try_clone()?);
        let mut monitor = Self {
            path: path.to_owned(),
            from,
            to,
        };
        let greeting = monitor.message()?;
        if greeting.get("QMP").is_none() {
            return Err(io::Error::other("it does not speak QMP"));
        }
        monitor.call(&json!({ "execute": "qmp_capabilities" }))?;
        Ok(monitor)
    }

    /// A command of the human monitor, on one CPU or on the first.
    pub fn ask(&mut self, command: &str, cpu: Option<u32>) -> Result<String, MonitorError> {
        let mut arguments = json!({ "command-line": command });
        if let Some(cpu) = cpu {
            arguments["cpu-index"] = json!(cpu);
        }
        let call = json!({ "execute": "human-monitor-command", "arguments": arguments });
        let answer = self.call(&call).map_err(|source| MonitorError::Socket {
            path: self.path.clone(),
            source,
        })?;
        match (answer["return"].as_str(), answer["error"]["desc"].as_str()) {
            (Some(text), _) => Ok(text.to_owned()),
            (None, error) => Err(MonitorError::Refused {
                command: command.to_owned(),
                error: error.unwrap_or("no reason given").to_owned(),
            }),
        }
    }

    fn call(&mut self, call: &Value) -> io::Result<Value> {
        writeln!(self.to, "{call}")?;
        loop {
            let message = self.message()?;
            // Events come in between.
            if message.get("return").is_some() || message.get("error").is_some() {
                return Ok(message);
            }
        }
    }

    fn message(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.from.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}

/// The QMP socket that a command line names.
fn find(pid: u32) -> Result<PathBuf, MonitorError> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline"));
    let bytes = bytes.map_err(|source| MonitorError::Process { pid, source })?;
    let words: Vec<_> = bytes
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    let path = socket(&words).ok_or(MonitorError::NoSocket { pid })?;
    if path.is_absolute() {
        return Ok(path);
    }
    // Relative to where QEMU was started, if it is still there.
    let home = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
    Ok(home.join(path))
}

/// `-qmp unix:PATH,…`, or `-mon chardev=ID,mode=control` with `-chardev socket,id=ID,path=PATH`.
fn socket(words: &[String]) -> Option<PathBuf> {
    let pairs = || words.windows(2);
    let option = |names: &'static [&'static str]| {
        pairs().filter(move |pair| names.contains(&pair[0].trim_start_matches('-')))
    };
    let direct = option(&["qmp", "qmp-pretty"])
        .find_map(|pair| pair[1].strip_prefix("unix:"))
        .map(|rest| PathBuf::from(rest.split(',').next().unwrap_or(rest)));
    direct.or_else(|| {
        let monitor = option(&["mon"]).find(|pair| pair[1].contains("mode=control"))?;
        let id = field(&monitor[1], "chardev")?;
        let device = option(&["chardev"]).find(|pair| field(&pair[1], "id") == Some(id))?;
        field(&device[1], "path").map(PathBuf::from)
    })
}

/// The value of `name=` in a list of options.
fn field<'a>(options: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = options.split(',').filter_map(|field| field.split_once('='));
    fields
        .find(|(found, _)| *found == name)
        .map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(line: &str) -> Option<PathBuf> {
        let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        socket(&words)
    }

    #[test]
    fn sockets_are_found_on_command_lines() {
        let qmp = "qemu -m 1G -qmp unix:/run/q.sock,server=on,wait=off -nographic";
        assert_eq!(found(qmp), Some("/run/q.sock".into()));
        let libvirt =
            "qemu -chardev socket,id=mon,path=/run/m.sock,server=on -mon chardev=mon,mode=control";
        assert_eq!(found(libvirt), Some("/run/m.sock".into()));
        assert_eq!(found("qemu -monitor stdio"), None);
    }
}
