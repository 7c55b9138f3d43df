//! The tour as a person reads it: questions, and what the guest that just ran answers.

use std::fmt::{self, Formatter};

use super::Tour;
use super::guest;
use super::story::{Device, Dirty, Fault, GREETING, Story, Touch};

impl fmt::Display for Tour {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "FOURFOLD TOUR: from a guest's address to a place in this machine's memory\n"
        )?;
        writeln!(f, "  Accelerator: {}", self.accelerator)?;
        for line in wrapped(&self.why, 76) {
            writeln!(f, "    {line}")?;
        }
        writeln!(
            f,
            "  All addresses below are of the guest that has just run.\n"
        )?;
        allocation(f, &self.story)?;
        slot(f, &self.story)?;
        first_touch(f, &self.story.first)?;
        second_touch(f, &self.story)?;
        where_is_hva(f, &self.story)?;
        host_tables(f, &self.story.first)?;
        device(f, &self.story.device)?;
        dirty(f, &self.story)?;
        comparison(f, self)?;
        elsewhere(f)?;
        files(f)
    }
}

fn question(f: &mut Formatter<'_>, number: u32, text: &str) -> fmt::Result {
    writeln!(f, "{number}. {text}\n")
}

fn allocation(f: &mut Formatter<'_>, story: &Story) -> fmt::Result {
    question(f, 1, "How is the guest's physical memory allocated?")?;
    writeln!(
        f,
        "   By the monitor, like any memory of its own; KVM has no part in it. Here:"
    )?;
    writeln!(
        f,
        "     memfd_create, mmap: {} MiB at hva {}",
        story.ram_bytes >> 20,
        story.ram_hva,
    )?;
    writeln!(
        f,
        "   of which the host has given {} KiB so far: the guest's page tables and its\n   \
         code, which the monitor wrote there.\n",
        story.resident_before >> 10
    )
}

fn slot(f: &mut Formatter<'_>, story: &Story) -> fmt::Result {
    question(f, 2, "How does KVM know?")?;
    writeln!(f, "   By memory slots. The monitor said:")?;
    writeln!(
        f,
        "     KVM_SET_USER_MEMORY_REGION slot 0: gpa 0x0 + {} MiB -> hva {}\n",
        story.ram_bytes >> 20,
        story.ram_hva
    )
}

fn first_touch(f: &mut Formatter<'_>, touch: &Touch) -> fmt::Result {
    question(f, 3, "What happens at the first access?")?;
    writeln!(
        f,
        "   The guest executes `mov rcx, [rbx]` with rbx = {:#x}. Before that:",
        guest::DATA
    )?;
    indented(f, &touch.before.to_string())?;
    if touch.before.nested().is_some() {
        writeln!(
            f,
            "\n   The guest's own tables lead to a GPA; the second level is empty there. So:"
        )?;
        faults(f, &touch.faults)?;
        writeln!(
            f,
            "   each one: GPA, slot, HVA, host page, entry installed, instruction again."
        )?;
        writeln!(f, "   That is the lazy MMU. The same address afterwards:")?;
    } else {
        writeln!(
            f,
            "\n   What this KVM's own tables held cannot be seen from outside. Afterwards:"
        )?;
    }
    indented(f, &touch.after.to_string())?;
    writeln!(
        f,
        "\n   By the guest's clock the read took {}: the fault, the host's own fault on its\n   \
         page, and the way out of the guest's code and back.\n",
        time(touch.nanoseconds)
    )
}

fn second_touch(f: &mut Formatter<'_>, story: &Story) -> fmt::Result {
    question(f, 4, "And at the next one?")?;
    let met = match (story.shows_faults, story.second.faults.len()) {
        (false, _) => String::new(),
        (true, 0) => "A hit: no fault. ".to_owned(),
        (true, n) => format!("It met {}. ", count(n)),
    };
    writeln!(
        f,
        "   {met}The second read took {},\n   and one of {} in a loop {}.\n",
        time(story.second.nanoseconds),
        story.reads,
        time(story.hit_nanoseconds)
    )
}

fn where_is_hva(f: &mut Formatter<'_>, story: &Story) -> fmt::Result {
    question(
        f,
        5,
        "The hardware goes from GVA to GPA to HPA. Where is HVA in that?",
    )?;
    writeln!(
        f,
        "   In no table of the hardware. It is a stage in filling them: GPA, slot, HVA,\n   \
         HPA, then the entry GPA to HPA, which kvm.ko writes and the CPU walks."
    )?;
    if story.first.after.nested().is_some() {
        writeln!(
            f,
            "   Fourfold's second level, shown above, holds host virtual addresses instead:\n   \
             the host's own MMU goes on from there, so nothing is to be undone when the\n   \
             host moves a page."
        )?;
    }
    writeln!(f)
}

fn host_tables(f: &mut Formatter<'_>, touch: &Touch) -> fmt::Result {
    question(f, 6, "Through what table, then, does HVA become HPA?")?;
    writeln!(
        f,
        "   Through the page tables of the monitor's process, as for any program. The\n   \
         host says of the page that the guest has touched (from /proc/self/pagemap):"
    )?;
    if let Some(host) = &touch.after.host {
        indented(f, &host.to_string())?;
    }
    writeln!(f)
}

fn device(f: &mut Formatter<'_>, device: &Device) -> fmt::Result {
    let Device {
        write_gpa: register,
        write_value: address,
        mapped_hva: hva,
        mapped_bytes: bytes,
        ..
    } = device;
    let greeting = String::from_utf8_lossy(GREETING);
    question(f, 7, "Who translates GPA to HVA when a device is emulated?")?;
    writeln!(
        f,
        "   The monitor. The guest wrote {address} to gpa {register}, which lies in no\n   \
         slot: an exit, KVM_EXIT_MMIO. The value is an address for the device's DMA:"
    )?;
    writeln!(f, "     map(gpa {address}, {bytes} bytes) -> hva {hva}")?;
    writeln!(
        f,
        "   as QEMU's cpu_physical_memory_map(). The device wrote\n     \
         {greeting:?}\n   \
         there and unmapped it. The guest then read {} from the device and {:?}\n   \
         from its buffer.\n\n   \
         And for code? Nobody: `mov rcx, [rbx]` runs on the CPU, which walks tables.\n   \
         HVA is needed to fill them, and to emulate.\n",
        device.answer, device.buffer
    )
}

fn dirty(f: &mut Formatter<'_>, story: &Story) -> fmt::Result {
    question(f, 8, "How does the monitor learn what was written?")?;
    writeln!(
        f,
        "   The slot was set again with KVM_MEM_LOG_DIRTY_PAGES, which takes write access"
    )?;
    writeln!(f, "   away. The guest then wrote to the page twice.")?;
    if story.shows_faults {
        logged_faults(f, &story.dirty)?;
    }
    writeln!(f, "   KVM_GET_DIRTY_LOG then named these guest frames:")?;
    writeln!(f, "     {}", frames(&story.dirty.frames))?;
    writeln!(
        f,
        "   (a guest page table is among them where an A or D bit was set), and, asked"
    )?;
    writeln!(
        f,
        "   again, {}.\n",
        frames(&story.dirty.frames_asked_again)
    )
}

fn logged_faults(f: &mut Formatter<'_>, dirty: &Dirty) -> fmt::Result {
    writeln!(
        f,
        "   The first write met {}:",
        count(dirty.first_faults.len())
    )?;
    faults(f, &dirty.first_faults)?;
    writeln!(f, "   The second met {}.", count(dirty.second_faults.len()))
}

fn frames(numbers: &[u64]) -> String {
    if numbers.is_empty() {
        return "none".to_owned();
    }
    let words: Vec<String> = numbers.iter().map(|n| format!("{n:#x}")).collect();
    words.join(" ")
}

fn comparison(f: &mut Formatter<'_>, tour: &Tour) -> fmt::Result {
    question(f, 9, "Nested tables, shadow tables: what does each store?")?;
    if tour.others.is_empty() {
        return writeln!(
            f,
            "   Nested ones (AMD's NPT, Intel's EPT) hold GPA to HPA, beside the guest's own: the\n   \
             CPU walks both. Shadow tables hold GVA to HPA, in place of the guest's own, and\n   \
             are kept in step with them. This KVM keeps its tables to itself;\n   \
             `fourfold tour` on our own KVM shows all paths side by side.\n"
        );
    }
    writeln!(
        f,
        "   Nested ones (NPT, EPT) hold GPA to HPA, beside the guest's own tables: the\n   \
         CPU walks both. Shadow tables hold GVA to HPA, in place of the guest's own,\n   \
         and are kept in step. Fourfold's hold HVA where the hardware's hold HPA."
    )?;
    writeln!(
        f,
        "   The same guest, three times; the same results, to the bit.\n"
    )?;
    writeln!(
        f,
        "   {:<8} {:<30} {:>6} {:>11} {:>9} {:>8}",
        "paging", "what is stored", "faults", "first read", "in a loop", "tables"
    )?;
    for story in std::iter::once(&tour.story).chain(&tour.others) {
        let paging = story.paging.as_deref().unwrap_or("-");
        writeln!(
            f,
            "   {:<8} {:<30} {:>6} {:>11} {:>9} {:>8}",
            paging,
            stored(paging),
            story.first.faults.len(),
            time(story.first.nanoseconds),
            time(story.hit_nanoseconds),
            story
                .table_bytes
                .map_or_else(|| "-".to_owned(), |b| format!("{} KiB", b >> 10)),
        )?;
    }
    writeln!(f)
}

fn stored(paging: &str) -> &'static str {
    match paging {
        "nested" => "GPA to HVA; guest's own beside",
        "shadow" => "GVA to HVA, kept in step",
        "direct" => "nothing but the TLB",
        _ => "-",
    }
}

fn elsewhere(f: &mut Formatter<'_>) -> fmt::Result {
    question(f, 10, "Is that so on every machine?")?;
    writeln!(
        f,
        "   Elsewhere it can be otherwise. On s390 the second level leads to HVA, as ours\n   \
         does: KVM's gmap ends in the host process's own page tables, so that a page\n   \
         that the host maps or takes away is at once the guest's or no longer.\n"
    )
}

fn files(f: &mut Formatter<'_>) -> fmt::Result {
    question(f, 11, "And how do files get in and out?")?;
    writeln!(
        f,
        "   By devices, so by question 7: the guest names buffers by GPA, the monitor\n   \
         maps them. virtfs (9p over virtio) shares a folder, vvfat shows one as a\n   \
         disk; or a network, and sshfs, NFS or SMB in the guest."
    )
}

fn faults(f: &mut Formatter<'_>, faults: &[Fault]) -> fmt::Result {
    for fault in faults {
        write!(f, "     {} at gva {}", fault.cause, fault.gva)?;
        if let Some(gpa) = &fault.gpa {
            write!(f, ", gpa {gpa}")?;
        }
        writeln!(f, ": {} ns", fault.nanoseconds)?;
        let hva = fault.hva.as_deref().unwrap_or("-");
        if let Some(bytes) = fault.installed_bytes {
            writeln!(
                f,
                "       {} KiB installed, which lead to hva {hva}",
                bytes >> 10
            )?;
        }
    }
    Ok(())
}

fn count(faults: usize) -> String {
    match faults {
        0 => "no fault".to_owned(),
        1 => "one fault".to_owned(),
        n => format!("{n} faults"),
    }
}

/// Lines of at most so many characters, where words allow.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines.push(line);
    lines
}

fn time(nanoseconds: f64) -> String {
    if nanoseconds >= 1e6 {
        format!("{:.1} ms", nanoseconds / 1e6)
    } else if nanoseconds >= 1e4 {
        format!("{:.1} us", nanoseconds / 1e3)
    } else if nanoseconds >= 100.0 {
        format!("{nanoseconds:.0} ns")
    } else {
        format!("{nanoseconds:.2} ns")
    }
}

fn indented(f: &mut Formatter<'_>, text: &str) -> fmt::Result {
    for line in text.lines() {
        // The one kind of line that is a sentence.
        match line.split_once(", ").filter(|_| line.starts_with("so ")) {
            Some((first, rest)) => writeln!(f, "     {first},\n          {rest}")?,
            None => writeln!(f, "     {line}")?,
        }
    }
    Ok(())
}
