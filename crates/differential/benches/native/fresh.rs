//! Fresh code: the C library's own instructions, each run once.
//!
//! Memory operands are moved onto a buffer, conditional branches lead to the next instruction, and
//! what can't run out of context (calls, returns, system calls, divisions) is left out; so the mix of
//! instructions and the length of basic blocks are those of compiled code.

use anyhow::{Context, Result};
use iced_x86::{
    BlockEncoder, BlockEncoderOptions, Code, Decoder, DecoderOptions, FlowControl, Instruction,
    InstructionBlock, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};

/// The register through which all memory operands go.
const BASE: Register = Register::RBX;

/// Code for this address, and how many instructions it has. It ends by `RET`.
pub(crate) fn code(at: u64, instructions: usize) -> Result<(Vec<u8>, usize)> {
    let text = library_text()?;
    let mut items = prologue();
    let decoder = Decoder::new(64, &text, DecoderOptions::NONE);
    let mut info = InstructionInfoFactory::new();
    for instruction in decoder {
        if items.len() >= instructions {
            break;
        }
        if let Some(item) = adapt(instruction, items.len(), &mut info) {
            items.push(item);
        }
    }
    items.push(numbered(Instruction::with(Code::Retnq), items.len()));
    let block = InstructionBlock::new(&items, at);
    let encoded = BlockEncoder::encode(64, block, BlockEncoderOptions::NONE)?;
    Ok((encoded.code_buffer, items.len()))
}

/// `mov %rdi, %rbx`
fn prologue() -> Vec<Instruction> {
    let set = Instruction::with2(Code::Mov_r64_rm64, BASE, Register::RDI);
    set.into_iter().map(|item| numbered(item, 0)).collect()
}

fn numbered(mut item: Instruction, index: usize) -> Instruction {
    item.set_ip(index as u64 + 1);
    item
}

fn adapt(
    instruction: Instruction,
    index: usize,
    info: &mut InstructionInfoFactory,
) -> Option<Instruction> {
    let mut item = numbered(instruction, index);
    match item.flow_control() {
        FlowControl::Next => {}
        FlowControl::ConditionalBranch if item.op0_kind() == OpKind::NearBranch64 => {
            item.set_near_branch64(index as u64 + 2);
            return Some(item);
        }
        _ => return None,
    }
    if is_out_of_context(&item) {
        return None;
    }
    if (0..item.op_count()).any(|operand| item.op_kind(operand) == OpKind::Memory) {
        redirect(&mut item);
    }
    let spoils = info.info(&item).used_registers().iter().any(|used| {
        let full = used.register().full_register();
        let writes = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
        writes && (full == BASE || full == Register::RSP)
    });
    (!spoils).then_some(item)
}

fn is_out_of_context(item: &Instruction) -> bool {
    let info = item.op_code();
    let implied = item.op_count() > 0 && is_implied_memory(item.op_kind(0))
        || item.op_count() > 1 && is_implied_memory(item.op_kind(1));
    info.is_privileged()
        || info.may_require_cpl0()
        || info.is_input_output()
        || implied
        || item.is_vsib()
        || item.op_code().encoding() == iced_x86::EncodingKind::EVEX
        || item.segment_prefix() != Register::None
        || matches!(
            item.mnemonic(),
            Mnemonic::Div
                | Mnemonic::Idiv
                | Mnemonic::Cpuid
                | Mnemonic::Xgetbv
                | Mnemonic::Xsavec
                | Mnemonic::Xsave
                | Mnemonic::Xrstor
                | Mnemonic::Fxsave
                | Mnemonic::Fxrstor
                | Mnemonic::Ldmxcsr
                | Mnemonic::Fldcw
                | Mnemonic::Fldenv
                | Mnemonic::Fnstenv
                | Mnemonic::Fnsave
                | Mnemonic::Frstor
                | Mnemonic::Popfq
                | Mnemonic::Bt
                | Mnemonic::Bts
                | Mnemonic::Btr
                | Mnemonic::Btc
                | Mnemonic::INVALID
        )
}

fn is_implied_memory(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemorySegDI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegRDI
            | OpKind::MemoryESDI
            | OpKind::MemoryESEDI
            | OpKind::MemoryESRDI
    )
}

/// Onto the buffer, aligned for vectors, with a displacement as long as before.
fn redirect(item: &mut Instruction) {
    let before = item.memory_displacement64();
    let displacement = before & if before < 0x80 { 0x40 } else { 0x3c0 };
    item.set_memory_base(BASE);
    item.set_memory_index(Register::None);
    item.set_memory_index_scale(1);
    item.set_memory_displ_size(if displacement == 0 { 0 } else { 8 });
    item.set_memory_displacement64(displacement);
}

/// The executable segment of the C library of this process.
fn library_text() -> Result<Vec<u8>> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let line = maps
        .lines()
        .find(|line| line.contains("r-xp") && line.contains("libc.so"))
        .context("this process has no C library mapped")?;
    let mut fields = line.split_whitespace();
    let (range, offset) = (fields.next(), fields.nth(1));
    let path = fields.next_back().context("a mapping without a file")?;
    let (start, end) = range
        .and_then(|range| range.split_once('-'))
        .context("a mapping without a range")?;
    let number = |text: &str| usize::from_str_radix(text, 16);
    let len = number(end)? - number(start)?;
    let offset = number(offset.context("a mapping without an offset")?)?;
    let file = std::fs::read(path)?;
    let end = (offset + len).min(file.len());
    Ok(file[offset..end].to_vec())
}
