//! Classic BPF as seccomp runs it (the kernel's `Documentation/networking/filter.rst` and
//! `userspace-api/seccomp_filter.rst`): an accumulator, an index, sixteen words, and the system call
//! as data. Programs are short and jump forwards only.

/// `struct sock_filter`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Op {
    pub(crate) code: u16,
    pub(crate) jt: u8,
    pub(crate) jf: u8,
    pub(crate) k: u32,
}

/// `struct sock_fprog`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Program {
    len: u16,
    ops: *const Op,
}

/// `struct seccomp_data`, as words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SeccompData([u32; 16]);

const ARCH_X86_64: u32 = 0xc000_003e;

impl SeccompData {
    /// A system call of this architecture.
    pub(crate) fn new(number: u32, args: [u64; 6]) -> Self {
        let mut words = [0; 16];
        words[0] = number;
        words[1] = ARCH_X86_64;
        for (i, arg) in args.into_iter().enumerate() {
            words[4 + 2 * i] = arg as u32;
            words[5 + 2 * i] = (arg >> 32) as u32;
        }
        Self(words)
    }

    fn word(&self, offset: u32) -> Option<u32> {
        let aligned = offset.is_multiple_of(4);
        aligned.then(|| self.0.get(offset as usize / 4).copied())?
    }
}

/// What the program returns for a call; `None` where it is not one that the kernel would take.
///
/// # Safety
/// `program` is null or points to a program whose operations can be read.
pub(crate) unsafe fn run(program: *const Program, data: &SeccompData) -> Option<u32> {
    // SAFETY: as the caller says.
    let ops = unsafe {
        let program = program.as_ref()?;
        if program.ops.is_null() {
            return None;
        }
        std::slice::from_raw_parts(program.ops, usize::from(program.len))
    };
    execute(ops, data)
}

fn execute(ops: &[Op], data: &SeccompData) -> Option<u32> {
    let (mut a, mut x, mut memory) = (0u32, 0u32, [0u32; 16]);
    let mut at = 0usize;
    loop {
        let op = ops.get(at)?;
        at += 1;
        let operand = if op.code & 0x08 == 0 { op.k } else { x };
        let slot = op.k as usize;
        match op.code {
            // ret k, ret a
            0x06 => return Some(op.k),
            0x16 => return Some(a),
            // ld [k], ld #k, ld M[k], ld len; ldx alike
            0x20 => a = data.word(op.k)?,
            0x00 => a = op.k,
            0x60 => a = *memory.get(slot)?,
            0x80 => a = 64,
            0x01 => x = op.k,
            0x61 => x = *memory.get(slot)?,
            0x81 => x = 64,
            // st, stx, tax, txa
            0x02 => *memory.get_mut(slot)? = a,
            0x03 => *memory.get_mut(slot)? = x,
            0x07 => x = a,
            0x87 => a = x,
            0x84 => a = a.wrapping_neg(),
            0x05 => at = at.checked_add(slot)?,
            code if code & 0x07 == 0x05 => {
                let holds = match code & 0xf0 {
                    0x10 => a == operand,
                    0x20 => a > operand,
                    0x30 => a >= operand,
                    0x40 => a & operand != 0,
                    _ => return None,
                };
                at += usize::from(if holds { op.jt } else { op.jf });
            }
            code if code & 0x07 == 0x04 => a = arithmetic(code & 0xf0, a, operand)?,
            _ => return None,
        }
    }
}

fn arithmetic(operation: u16, a: u32, operand: u32) -> Option<u32> {
    Some(match operation {
        0x00 => a.wrapping_add(operand),
        0x10 => a.wrapping_sub(operand),
        0x20 => a.wrapping_mul(operand),
        0x30 => a.checked_div(operand)?,
        0x40 => a | operand,
        0x50 => a & operand,
        0x60 => a.checked_shl(operand)?,
        0x70 => a.checked_shr(operand)?,
        0xa0 => a ^ operand,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(code: u16, jt: u8, jf: u8, k: u32) -> Op {
        Op { code, jt, jf, k }
    }

    #[test]
    fn a_filter_by_number_and_argument() {
        // Allows call 1, and call 9 only where its third argument has no bit 2.
        let ops = [
            op(0x20, 0, 0, 0),
            op(0x15, 4, 0, 1),
            op(0x15, 0, 2, 9),
            op(0x20, 0, 0, 32),
            op(0x45, 0, 1, 4),
            op(0x06, 0, 0, 7),
            op(0x06, 0, 0, 42),
        ];
        let run = |number, args| execute(&ops, &SeccompData::new(number, args));
        assert_eq!(run(1, [0; 6]), Some(42));
        assert_eq!(run(9, [0, 0, 3, 0, 0, 0]), Some(42));
        assert_eq!(run(9, [0, 0, 7, 0, 0, 0]), Some(7));
        assert_eq!(run(2, [0; 6]), Some(7));
    }

    #[test]
    fn programs_that_the_kernel_would_refuse_end() {
        let data = SeccompData::new(0, [0; 6]);
        assert_eq!(execute(&[], &data), None);
        assert_eq!(execute(&[op(0x05, 0, 0, u32::MAX)], &data), None);
        assert_eq!(execute(&[op(0x20, 0, 0, 63)], &data), None);
        assert_eq!(execute(&[op(0x34, 0, 0, 0)], &data), None);
        assert_eq!(execute(&[op(0x02, 0, 0, 99)], &data), None);
    }
}
