//! Every form of instruction that iced-x86 knows, in or out, and why.

use std::collections::BTreeMap;

use iced_x86::{Code, EncodingKind, Mnemonic, OpCodeOperandKind};

use super::features::{self, Exclusion};
use crate::case::Mode;

/// What the comparison must not look at, because it can't be the same twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tolerance {
    /// General registers, one bit each in the encoding's order.
    pub gprs: u16,
    /// Registers named by the first operand.
    pub first_operand: bool,
    /// Which byte of a large or scattered operand a page fault names: the manuals don't say in which
    /// order they are touched.
    pub fault_address: bool,
}

impl Tolerance {
    /// Whether all registers are compared.
    pub fn is_exact(self) -> bool {
        self.gprs == 0 && !self.first_operand
    }
}

/// A form of instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// iced's name of it.
    pub code: Code,
    /// In which mode.
    pub mode: Mode,
    /// What is not compared.
    pub tolerance: Tolerance,
}

/// All forms of one mode.
pub struct Catalogue {
    /// Those that are compared.
    pub forms: Vec<Form>,
    /// Those that are not.
    pub excluded: BTreeMap<Exclusion, Vec<Code>>,
}

impl Catalogue {
    /// Sorts all of iced's forms.
    pub fn new(mode: Mode) -> Self {
        let mut catalogue = Self {
            forms: Vec::new(),
            excluded: BTreeMap::new(),
        };
        for code in Code::values() {
            match exclusion(code, mode) {
                Some(reason) => catalogue.exclude(code, reason),
                None => catalogue.forms.push(Form {
                    code,
                    mode,
                    tolerance: tolerance(code),
                }),
            }
        }
        catalogue
    }

    /// Takes a form out.
    pub fn exclude(&mut self, code: Code, reason: Exclusion) {
        self.forms.retain(|form| form.code != code);
        self.excluded.entry(reason).or_default().push(code);
    }

    /// Keeps the forms whose name holds `pattern`, upper or lower case.
    pub fn restrict(&mut self, pattern: &str) {
        let pattern = pattern.to_lowercase();
        self.forms
            .retain(|form| format!("{:?}", form.code).to_lowercase().contains(&pattern));
    }

    /// Whether programs may contain this form.
    pub fn contains(&self, code: Code) -> bool {
        self.forms.iter().any(|form| form.code == code)
    }
}

fn exclusion(code: Code, mode: Mode) -> Option<Exclusion> {
    let info = code.op_code();
    if !info.is_instruction() {
        return Some(Exclusion::Pseudo);
    }
    if info.fwait() {
        return Some(Exclusion::TwoInstructions);
    }
    if !info.is_available_in_mode(mode.bitness()) {
        return Some(Exclusion::OtherMode);
    }
    match info.encoding() {
        EncodingKind::Legacy | EncodingKind::VEX => {}
        EncodingKind::EVEX => return Some(Exclusion::NotOffered),
        _ => return Some(Exclusion::OtherProcessor),
    }
    if info.decoder_option() != 0 {
        return Some(Exclusion::OtherProcessor);
    }
    by_feature(code).or_else(|| by_mnemonic(code, mode))
}

fn by_feature(code: Code) -> Option<Exclusion> {
    code.cpuid_features()
        .iter()
        .find_map(|feature| features::exclusion(*feature))
}

fn by_mnemonic(code: Code, mode: Mode) -> Option<Exclusion> {
    match code.mnemonic() {
        Mnemonic::Cpuid => Some(Exclusion::MonitorAnswers),
        Mnemonic::Sgdt | Mnemonic::Sidt | Mnemonic::Sldt | Mnemonic::Str | Mnemonic::Smsw => {
            Some(Exclusion::KernelEmulates)
        }
        Mnemonic::Sysret | Mnemonic::Sysretq | Mnemonic::Sysexit | Mnemonic::Sysexitq => {
            Some(Exclusion::VendorsDiffer)
        }
        Mnemonic::Int1 => Some(Exclusion::HostHypervisor),
        _ if is_far_64(code) => Some(Exclusion::VendorsDiffer),
        _ if mode == Mode::Long && is_16_bit_branch(code) => Some(Exclusion::VendorsDiffer),
        _ => None,
    }
}

/// With a 66 prefix in 64-bit mode, Intel's processors ignore the prefix, AMD's truncate RIP
/// (SDM 2B, "Jcc"; APM 3, "JMP near").
fn is_16_bit_branch(code: Code) -> bool {
    let near = code.is_jcc_short_or_near()
        || code.is_jmp_short_or_near()
        || code.is_jmp_near_indirect()
        || code.is_call_near()
        || code.is_call_near_indirect()
        || code.is_loop()
        || code.is_loopcc()
        || code.is_jcx_short();
    let info = code.op_code();
    let narrow_target = info.op_kinds().iter().any(|kind| {
        matches!(
            kind,
            OpCodeOperandKind::br16_1 | OpCodeOperandKind::br16_2 | OpCodeOperandKind::r16_or_mem
        )
    });
    (near && narrow_target) || matches!(code, Code::Retnw | Code::Retnw_imm16)
}

/// AMD's processors have no far pointers with 64-bit offsets; they ignore the REX.W (APM 3, "LSS").
fn is_far_64(code: Code) -> bool {
    matches!(
        code,
        Code::Call_m1664
            | Code::Jmp_m1664
            | Code::Lfs_r64_m1664
            | Code::Lgs_r64_m1664
            | Code::Lss_r64_m1664
    )
}

fn tolerance(code: Code) -> Tolerance {
    const RAX: u16 = 1;
    const RCX: u16 = 2;
    const RDX: u16 = 4;
    let mut tolerance = Tolerance {
        fault_address: touches_at_will(code),
        ..Tolerance::default()
    };
    match code.mnemonic() {
        Mnemonic::Rdtsc | Mnemonic::Xgetbv => tolerance.gprs = RAX | RDX,
        Mnemonic::Rdtscp => tolerance.gprs = RAX | RDX | RCX,
        Mnemonic::Rdrand | Mnemonic::Rdseed => tolerance.first_operand = true,
        _ => {}
    }
    tolerance
}

fn touches_at_will(code: Code) -> bool {
    code.op_code().is_save_restore()
        || matches!(
            code.mnemonic(),
            Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq | Mnemonic::Retf
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_form_is_forgotten() {
        let catalogue = Catalogue::new(Mode::Long);
        let excluded: usize = catalogue.excluded.values().map(Vec::len).sum();
        assert_eq!(catalogue.forms.len() + excluded, Code::values().len());
        assert!(catalogue.contains(Code::Add_rm64_r64));
        assert!(catalogue.contains(Code::VEX_Vfmadd231ps_ymm_ymm_ymmm256));
        assert!(!catalogue.contains(Code::Aaa));
        assert!(!catalogue.contains(Code::EVEX_Vaddps_zmm_k1z_zmm_zmmm512b32_er));
    }
}
