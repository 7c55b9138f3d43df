//! The monitor is killed while the guest writes: the guest's file system recovers as after a power
//! cut, and everything that was synchronised is there.

use std::{process::Stdio, time::Duration};

use crate::host::{Image, Running, in_guest, output, programs, read_until, run};

/// Writes until it is killed, `milliseconds` after the first file is on the disk; gives the last
/// number that the guest announced.
fn write_until_killed(program: &str, image: &Image, milliseconds: u64) -> u64 {
    let command = "mount -t ext4 /dev/vda /mnt && ./guest journal /mnt";
    let args = ["--exec", command, "--file", program, "--disk", image.path()];
    let mut child = Running(run(&args).stdout(Stdio::piped()).spawn().unwrap());
    let mut out = child.0.stdout.take().unwrap();
    let limit = Duration::from_secs(180);
    let mut seen = read_until(&mut out, limit, |seen| seen.contains("synced 1"));
    std::thread::sleep(Duration::from_millis(milliseconds));
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    seen += &read_until(&mut out, limit, |_| false);
    let last = seen.lines().filter_map(|line| {
        let number = line.trim_end().strip_prefix("synced ")?;
        number.parse().ok()
    });
    // A last line that was cut short is smaller, not larger.
    last.max().expect("something was written")
}

fn cut(times: u64) {
    let Some(image) = Image::ext4("power-cut", 64) else {
        return;
    };
    if output(&["--exec", "true"]).is_none() {
        return;
    }
    let program = programs();
    for time in 0..times {
        // Not at random, but at no moment that means anything to the guest.
        let last = write_until_killed(&program, &image, time * 373 % 1500);
        let check = format!("mount -t ext4 /dev/vda /mnt && ./guest journal-check /mnt {last}");
        in_guest(&["--file", &program, "--disk", image.path()], &check);
        image.assert_clean();
    }
}

#[test]
fn synchronised_files_survive_the_end_of_the_monitor() {
    cut(1);
}

#[test]
#[ignore = "minutes: cargo xtask guest-tests"]
fn synchronised_files_survive_many_ends() {
    cut(20);
}
