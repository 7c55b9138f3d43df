//! ACPI tables: what a guest needs to find CPUs, interrupt controllers, PCI, serial ports, the
//! clock, and the registers for power-off and reset (ACPI 6.5, chapter 5).
//!
//! ```text
//!   RSDP ─> XSDT ─┬─> FADT ─> DSDT     registers; devices in AML
//!                 ├─> MADT             local APICs, IOAPIC
//!                 └─> MCFG             ECAM
//! ```

use acpi_tables::{
    Aml,
    aml::{
        AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
        Package, ResourceTemplate, Scope, ZERO,
    },
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace as GasSpace, GAS},
    mcfg::MCFG,
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use addr::Gpa;
use devices::{cmos, pci::root::ECAM_SIZE, pm, power, serial, serial::ComPort};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{error::BuildError, layout};

const OEM: [u8; 6] = *b"FOURFD";
const TABLE: [u8; 8] = *b"FOURFOLD";
const REVISION: u32 = 1;

/// Writes the tables for `cpus` vCPUs; the RSDP lies at [`layout::ACPI_TABLES`].
pub(crate) fn write(memory: &GuestMemoryMmap, cpus: u8) -> Result<(), BuildError> {
    let rsdp_at = layout::ACPI_TABLES;
    let mut writer = Writer {
        memory,
        next: Gpa::new(rsdp_at.raw() + 0x40),
    };
    let dsdt = writer.put(&dsdt())?;
    let tables = [fadt(dsdt), madt(cpus), mcfg()];
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    for table in tables {
        xsdt.add_entry(writer.put(&table)?.raw());
    }
    let xsdt = writer.put(&bytes(&xsdt))?;
    writer.next = rsdp_at;
    writer.put(&bytes(&Rsdp::new(OEM, xsdt.raw())))?;
    Ok(())
}

struct Writer<'m> {
    memory: &'m GuestMemoryMmap,
    next: Gpa,
}

impl Writer<'_> {
    fn put(&mut self, table: &[u8]) -> Result<Gpa, BuildError> {
        let gpa = self.next;
        let end = gpa.raw() + table.len() as u64;
        let what = "the ACPI tables";
        if end > layout::HIGH_MEMORY.raw() {
            return Err(BuildError::Write { what, gpa });
        }
        self.memory
            .write_slice(table, GuestAddress(gpa.raw()))
            .map_err(|_| BuildError::Write { what, gpa })?;
        self.next = Gpa::new(end.next_multiple_of(16));
        Ok(gpa)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(address: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(GasSpace::SystemIo, bits, 0, access, u64::from(address))
}

fn fadt(dsdt: Gpa) -> Vec<u8> {
    /// VGA is not there; there is no CMOS alarm that must not be touched.
    const BOOT_NO_VGA: u16 = 1 << 2;
    const BOOT_LEGACY_DEVICES: u16 = 1;
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt.raw())
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    let (control, timer) = (pm::PORT + pm::CONTROL, pm::PORT + pm::TIMER);
    fadt.sci_int = layout::SCI.into();
    fadt.pm1a_evt_blk = u32::from(pm::PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(control).into();
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = u32::from(timer).into();
    fadt.pm_tmr_len = 4;
    // No C2 and C3.
    fadt.p_lvl2_lat = 0xfff.into();
    fadt.p_lvl3_lat = 0xfff.into();
    fadt.century = cmos::CENTURY;
    fadt.iapc_boot_arch = (BOOT_LEGACY_DEVICES | BOOT_NO_VGA).into();
    fadt.reset_reg = port(power::RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = power::RESET_VALUE;
    fadt.x_pm1a_evt_blk = port(pm::PORT, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(control, 16, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = port(timer, 32, AccessSize::DwordAccess);
    bytes(&fadt.finalize())
}

fn madt(cpus: u8) -> Vec<u8> {
    const PC_COMPATIBLE: u32 = 1;
    const HEADER: u32 = 44;
    const LEVEL_HIGH: u8 = 0b1101;
    let mut madt = Sdt::new(*b"APIC", HEADER, 5, OEM, TABLE, REVISION);
    madt.write_u32(36, layout::LOCAL_APIC.raw() as u32);
    madt.write_u32(40, PC_COMPATIBLE);
    for id in 0..cpus {
        // Processor-local APIC: UID, APIC ID, enabled.
        madt.append_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    // IOAPIC: ID, address, first GSI.
    let [a, b, c, d] = (layout::IOAPIC.raw() as u32).to_le_bytes();
    madt.append_slice(&[1, 12, cpus, 0, a, b, c, d, 0, 0, 0, 0]);
    // The SCI is level-triggered and active high.
    let sci = layout::SCI as u8;
    madt.append_slice(&[2, 10, 0, sci, sci, 0, 0, 0, LEVEL_HIGH, 0]);
    // NMI at LINT1 of every CPU.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt.as_slice().to_vec()
}

fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(layout::ECAM.raw(), 0, 0, 0);
    bytes(&mcfg)
}

fn dsdt() -> Vec<u8> {
    let mut aml = Vec::new();
    let s5 = pm::SLEEP_TYPE_S5;
    Name::new("_S5_".into(), &Package::new(vec![&s5, &ZERO, &ZERO, &ZERO])).to_aml_bytes(&mut aml);
    host_bridge(&mut aml);
    motherboard(&mut aml);
    serial_port(&mut aml, "COM1", 1, ComPort::Com1);
    serial_port(&mut aml, "COM2", 2, ComPort::Com2);
    serial_port(&mut aml, "COM3", 3, ComPort::Com3);
    clock(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    dsdt.append_slice(&aml);
    dsdt.as_slice().to_vec()
}

/// A device on the system bus, with its resources.
fn device(aml: &mut Vec<u8>, name: &str, id: &str, uid: u8, resources: Vec<&dyn Aml>) {
    let id = Name::new("_HID".into(), &EISAName::new(id));
    let uid = Name::new("_UID".into(), &uid);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    let device = Device::new(name.into(), vec![&id, &uid, &resources]);
    Scope::new("_SB_".into(), vec![&device]).to_aml_bytes(aml);
}

fn host_bridge(aml: &mut Vec<u8>) {
    let window = layout::pci_window();
    let (first, last) = (window.start().raw() as u32, window.end().raw() as u32 - 1);
    let uncached = AddressSpaceCacheable::NotCacheable;
    device(
        aml,
        "PCI0",
        "PNP0A03",
        0,
        vec![
            &AddressSpace::<u16>::new_bus_number(0, 0),
            &IO::new(0xcf8, 0xcf8, 1, 8),
            &AddressSpace::<u16>::new_io(0, 0xcf7, None),
            &AddressSpace::<u16>::new_io(0xd00, 0xffff, None),
            &AddressSpace::<u32>::new_memory(uncached, true, first, last, None),
        ],
    );
}

/// Reserves ECAM, as the PCI firmware specification wants it.
fn motherboard(aml: &mut Vec<u8>) {
    let ecam = Memory32Fixed::new(true, layout::ECAM.raw() as u32, ECAM_SIZE as u32);
    device(aml, "MBRD", "PNP0C02", 0, vec![&ecam]);
}

fn serial_port(aml: &mut Vec<u8>, name: &str, uid: u8, port: ComPort) {
    let first = port.port();
    let ports = IO::new(first, first, 1, serial::LEN as u8);
    let interrupt = Interrupt::new(true, true, false, false, port.irq());
    device(aml, name, "PNP0501", uid, vec![&ports, &interrupt]);
}

fn clock(aml: &mut Vec<u8>) {
    let ports = IO::new(cmos::PORT, cmos::PORT, 1, cmos::LEN as u8);
    device(aml, "RTC0", "PNP0B00", 0, vec![&ports]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory_with_tables(cpus: u8) -> GuestMemoryMmap {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        write(&memory, cpus).unwrap();
        memory
    }

    fn read(memory: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn table(memory: &GuestMemoryMmap, at: u64) -> Vec<u8> {
        let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        let table = read(memory, at, len as usize);
        let sum = table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0, "checksum of {:?}", &table[..4]);
        table
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_tables_are_found_from_the_rsdp_and_add_up() {
        let memory = memory_with_tables(4);
        let rsdp = read(&memory, layout::ACPI_TABLES.raw(), 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let xsdt = table(&memory, u64_at(&rsdp, 24));
        let tables: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|entry| table(&memory, u64_at(entry, 0)))
            .collect();
        let signatures: Vec<_> = tables.iter().map(|t| &t[..4]).collect();
        assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG"]);
        let dsdt = table(&memory, u64_at(&tables[0], 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        let cpus = tables[1][44..].chunks(8).take_while(|e| e[..2] == [0, 8]);
        assert_eq!(cpus.count(), 4);
    }

    #[test]
    fn most_cpus_fit() {
        memory_with_tables(254);
    }
}
