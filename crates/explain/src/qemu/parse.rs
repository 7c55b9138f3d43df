//! What QEMU's monitor prints (`target/i386/cpu-dump.c`, `system/memory.c`,
//! `monitor/hmp-cmds-target.c`).

use mmu::PagingRegisters;

use super::number;

/// Registers of one CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuRegisters {
    /// Those that govern translation, but for the PDPTEs.
    pub paging: PagingRegisters,
    /// What it runs.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Its privilege level.
    pub cpl: u8,
}

/// `NAME=hexadecimal` somewhere in the text.
fn value(text: &str, name: &str) -> Option<u64> {
    let words = text.split_whitespace();
    let value = words
        .filter_map(|word| word.split_once('='))
        .find(|(found, _)| *found == name)
        .map(|(_, value)| value)?;
    number(value)
}

/// From `info registers`.
pub(super) fn registers(text: &str) -> Option<CpuRegisters> {
    Some(CpuRegisters {
        paging: PagingRegisters {
            cr0: value(text, "CR0")?,
            cr3: value(text, "CR3")?,
            cr4: value(text, "CR4")?,
            efer: value(text, "EFER").unwrap_or(0),
            ..PagingRegisters::default()
        },
        rip: value(text, "RIP").or_else(|| value(text, "EIP"))?,
        rflags: value(text, "RFL").or_else(|| value(text, "EFL"))?,
        cpl: value(text, "CPL")? as u8,
    })
}

/// A range of guest physical memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// Its first address.
    pub start: u64,
    /// Its size.
    pub bytes: u64,
    /// `ram`, `rom`, `romd`, `i/o` and so on.
    pub kind: String,
    /// What QEMU calls it.
    pub name: String,
}

impl Range {
    /// Whether bytes lie there.
    pub(super) fn is_memory(&self) -> bool {
        matches!(&*self.kind, "ram" | "rom" | "romd" | "ramd")
    }

    /// Whether it holds an address.
    pub(super) fn contains(&self, address: u64) -> bool {
        address
            .checked_sub(self.start)
            .is_some_and(|offset| offset < self.bytes)
    }
}

/// The flat view of the address space `memory`, from `info mtree -f`.
pub(super) fn system_memory(text: &str) -> Vec<Range> {
    let views = text.split("FlatView #");
    let system = views
        .into_iter()
        .find(|view| view.contains("AS \"memory\""))
        .unwrap_or_default();
    system.lines().filter_map(range).collect()
}

/// `  0000000000000000-000000000009ffff (prio 0, ram): pc.ram @0000000000000000 KVM`
fn range(line: &str) -> Option<Range> {
    let (span, rest) = line.trim().split_once(" (prio ")?;
    let (from, to) = span.split_once('-')?;
    let (attributes, name) = rest.split_once("): ")?;
    let kind = attributes.split(", ").nth(1)?;
    let (start, last) = (number(from)?, number(to)?);
    let name = name.split(" @").next()?.trim_end_matches(" KVM");
    Some(Range {
        start,
        bytes: last.checked_sub(start)?.checked_add(1)?,
        kind: kind.to_owned(),
        name: name.to_owned(),
    })
}

/// The last word that is a number with `0x`: `… is 0x7f0000000000`.
pub(super) fn last_number(text: &str) -> Option<u64> {
    let words = text.split_whitespace().rev();
    words.filter(|word| word.starts_with("0x")).find_map(number)
}

/// The number behind a label: `gpa: 0x1000`.
pub(super) fn labelled(text: &str, label: &str) -> Option<u64> {
    let (_, rest) = text.split_once(label)?;
    number(rest.split_whitespace().next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_of_both_widths() {
        let text = "RAX=0000000000000001 RBX=0\r\nRIP=ffffffff81000010 RFL=00000246 [---Z-P-] \
            CPL=3 II=0\r\nCR0=80050033 CR2=0 CR3=0000000001234000 CR4=000006f0\r\n\
            EFER=0000000000000d01\r\n";
        let found = registers(text).unwrap();
        assert_eq!((found.rip, found.cpl), (0xffff_ffff_8100_0010, 3));
        assert_eq!((found.paging.cr3, found.paging.efer), (0x123_4000, 0xd01));
        let short = "EAX=1\nEIP=0000fff0 EFL=00000002 [-------] CPL=0\n\
            CR0=60000010 CR2=0 CR3=0 CR4=0\n";
        assert_eq!(registers(short).unwrap().rip, 0xfff0);
        assert_eq!(registers("nothing of the kind"), None);
    }

    #[test]
    fn the_flat_view_of_memory_alone() {
        let text = "FlatView #0\n AS \"I/O\", root: io\n  0000000000000000-0000000000000007 (prio 0, i/o): dma\n\n\
            FlatView #1\n AS \"memory\", root: system\n AS \"cpu-memory-0\", root: system\n Root memory region: system\n\
            \x20 0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM\n\
            \x20 00000000000c0000-00000000000cbfff (prio 0, rom): pc.ram @00000000000c0000 KVM\n\
            \x20 00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi\n";
        let ranges = system_memory(text);
        assert_eq!(ranges.len(), 3);
        assert_eq!((ranges[0].bytes, &*ranges[0].name), (0xa_0000, "pc.ram"));
        assert!(ranges[1].is_memory() && ranges[1].kind == "rom");
        assert!(!ranges[2].is_memory() && ranges[2].contains(0xfee0_0020));
        assert_eq!(system_memory("garbage"), []);
    }

    #[test]
    fn numbers_in_sentences() {
        let hva = "Host virtual address for 0x1000 (pc.ram) is 0x7f0012345000\r\n";
        assert_eq!(last_number(hva), Some(0x7f00_1234_5000));
        assert_eq!(labelled("gpa: 0x1234000\r\n", "gpa:"), Some(0x123_4000));
        assert_eq!(labelled("Unmapped\r\n", "gpa:"), None);
    }
}
