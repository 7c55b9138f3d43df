//! A machine of QEMU's, run by its TCG: the same answers as QEMU's own monitor gives, and more.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use explain::Chain;

use crate::machine::fourfold;

struct Qemu {
    child: Child,
    folder: PathBuf,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Qemu {
    /// Runs a kernel without a disk: it ends in a panic and stays there, with its tables in place.
    fn start(kernel: &Path) -> Option<Self> {
        let folder = std::env::temp_dir().join(format!("ff-{}-qemu", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let qmp = format!("unix:{},server=on,wait=off", folder.join("qmp").display());
        let child = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults"])
            .args(["-display", "none", "-qmp", &qmp])
            .arg("-kernel")
            .arg(kernel)
            .args(["-append", "nokaslr panic=0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        match child {
            Ok(child) => Some(Self { child, folder }),
            Err(why) => {
                eprintln!("skipped, qemu-system-x86_64 does not start: {why}");
                let _ = fs::remove_dir_all(&folder);
                None
            }
        }
    }

    fn explain(&self, arguments: &[&str]) -> Result<Chain, String> {
        let pid = self.child.id().to_string();
        let mut all = vec!["explain", "--pid", &pid, "--json"];
        all.extend(arguments);
        let output = fourfold(&all, &self.folder);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            return Err(errors);
        }
        serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
    }
}

#[test]
fn qemus_own_monitor_agrees() {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
    let kernel = cache.join("fourfold/debian-cloud/vmlinuz");
    if !kernel.is_file() {
        // Fetches it.
        fourfold(&["run", "--accel", "user", "--exec", "true"], &cache);
    }
    if !kernel.is_file() {
        eprintln!("skipped, there is no kernel to boot");
        return;
    }
    let Some(qemu) = Qemu::start(&kernel) else {
        return;
    };
    let symbols = kernel.to_str().unwrap();
    let banner = ["linux_banner", "--symbols", symbols];
    // Until the kernel has tables of its own, with everything mapped.
    let deadline = Instant::now() + Duration::from_secs(60);
    let chain = loop {
        match qemu.explain(&banner) {
            Ok(chain) if chain.gpa.is_some() && chain.entries.len() >= 3 => break chain,
            other if Instant::now() > deadline => panic!("{other:?}"),
            _ => std::thread::sleep(Duration::from_millis(200)),
        }
    };
    agrees(&chain);
    assert_eq!(chain.symbol.as_deref(), Some("linux_banner+0x0"));
    let mut compared = 0;
    for page in 0..24 {
        // The kernel's map of all memory, where its text is, and addresses that lead nowhere.
        let address = match page % 3 {
            0 => format!("gva:{:#x}", 0xffff_8880_0000_0000_u64 + page * 0x9d_7123),
            1 => format!("gva:{:#x}", 0xffff_ffff_8100_0000_u64 + page * 0x1_1111),
            _ => format!("gpa:{:#x}", page * 0x31_1111),
        };
        let chain = qemu.explain(&[&address]).unwrap();
        agrees(&chain);
        compared += chain.checks.len();
    }
    println!("{compared} answers of QEMU's monitor agree");
    assert!(compared > 30);
    let device = qemu.explain(&["gpa:0xfec00000"]).unwrap();
    assert_eq!(device.region.as_deref(), Some("ioapic"));
    let refused = qemu.explain(&["no_such_symbol", "--symbols", symbols]);
    assert!(refused.unwrap_err().contains("neither an address"));
}

fn agrees(chain: &Chain) {
    for check in &chain.checks {
        assert!(check.contains("agrees"), "{chain}");
    }
}
