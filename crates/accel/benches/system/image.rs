//! The guest: code that times itself and tells what it found on the first serial port.
//!
//! One image for every machine: 32-bit code at [`ENTRY`] (the state of the PVH boot protocol: flat
//! segments, no paging), which maps memory, enters 64-bit mode and runs one loop after the other, each
//! often enough for a millisecond, several times. For each it prints the least time, in ticks of the
//! time stamp counter, and the number of rounds, both hexadecimal; [`ABSENT`] where the loop met an
//! exception that it did not ask for, as of an instruction that this CPU hasn't. At the end it prints
//! [`DONE`].
//!
//! | address | what |
//! |---|---|
//! | 1 MiB | the image; the only large page that user mode may use |
//! | 2 MiB | page tables: two sets that share the kernel's part |
//! | 3 MiB | words, stacks, XSAVE area, tables of descriptors |
//! | 1 GiB | 512 small pages for user mode, those at 4 MiB |
//! | 2 GiB - 2 MiB | the APIC |
//! | 2 GiB | nothing |

#![expect(unsafe_code, reason = "names machine code, and reads its bytes")]

use std::arch::global_asm;

/// Where the image is loaded, and begins to run.
pub(crate) const ENTRY: u64 = 0x10_0000;
/// What is printed instead of a time.
pub(crate) const ABSENT: u64 = u64::MAX;
/// The last line.
pub(crate) const DONE: &str = "done";

/// Pages that the loops about paging use.
const PAGES: u32 = 512;

/// One row of the table.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    /// How many of what the name says one round does.
    pub(crate) each: u32,
}

macro_rules! rows {
    ($($label:ident $each:literal $name:literal, $asm:literal;)*) => {
        /// All loops, in the order in which the guest runs them.
        pub(crate) const ROWS: &[Row] = &[$(Row { name: $name, each: $each }),*];

        global_asm!(
            BOOT!(),
            concat!(
                ".p2align 6\n",
                ".globl system_image_table\nsystem_image_table:\ntable:\n",
                $(".quad row_", stringify!($label), " - image_start + 0x100000\n",)*
                ".quad 0\n",
                $(".p2align 6\nrow_", stringify!($label), ":\n", $asm, "\n",)*
                ".globl system_image_end\nsystem_image_end:\n.popsection\n",
            ),
            pml4 = const 0x20_0000,
            other_pml4 = const 0x20_1000,
            page_table = const 0x20_6000,
            // Words.
            kernel_rsp = const 0x30_0000,
            unwind = const 0x30_0008,
            began = const 0x30_0010,
            word = const 0x30_0018,
            tasks = const 0x30_0020,
            per_cpu = const 0x30_0040,
            stack = const 0x31_0000,
            inner_stack = const 0x32_0000,
            task_stack = const 0x33_0000,
            xsave_area = const 0x34_0000,
            idt = const 0x35_0000,
            gdt = const 0x35_1000,
            pseudo = const 0x35_1100,
            tss = const 0x35_2000,
            area = const 0x4000_0000_u32,
            area_end = const 0x4000_0000_u32 + PAGES * 4096,
            working_set_end = const 0x4000_0000_u32 + 64 * 4096,
            nothing = const 0x8000_0000_u32,
            apic = const 0x7fe0_0000_u32,
            cr0 = const 0x8001_0033_u32,
            cr4 = const 0x4_06a0,
        );
    };
}

rows! {
    nothing 1 "an empty loop", "
    2:  dec rsi
        jnz 2b
        ret";
    syscall 1 "SYSCALL, SYSRET", "
        mov ecx, 0xc0000082
        lea rax, [rip + 3f]
        xor edx, edx
        wrmsr
        lea rax, [rip + 2f]
        jmp in_user
    2:  syscall
        dec rsi
        jnz 2b
        int 0x81
    3:  sysretq";
    syscall_frame 1 "the same with SWAPGS, a stack, registers saved", "
        mov ecx, 0xc0000082
        lea rax, [rip + 3f]
        xor edx, edx
        wrmsr
        mov qword ptr [{per_cpu}], {inner_stack}
        lea rax, [rip + 2f]
        jmp in_user
    2:  syscall
        dec rsi
        jnz 2b
        int 0x81
    3:  swapgs
        mov gs:[8], rsp
        mov rsp, gs:[0]
        push 0x23
        push gs:[8]
        push r11
        push 0x2b
        push rcx
        push rdi
        push rsi
        push rdx
        push rbp
        push rbx
        push r12
        push r13
        sti
        cli
        pop r13
        pop r12
        pop rbx
        pop rbp
        pop rdx
        pop rsi
        pop rdi
        pop rcx
        add rsp, 8
        pop r11
        mov rsp, [rsp]
        swapgs
        sysretq";
    int_kernel 1 "INT n, IRETQ, in the kernel", "
        lea rax, [rip + 3f]
        mov edi, 0x80
        call gate
    2:  int 0x80
        dec rsi
        jnz 2b
        ret
    3:  iretq";
    int_user 1 "INT n, IRETQ, from user mode", "
        lea rax, [rip + 3f]
        mov edi, 0x80
        call gate
        lea rax, [rip + 2f]
        jmp in_user
    2:  int 0x80
        dec rsi
        jnz 2b
        int 0x81
    3:  iretq";
    fault_kernel 1 "#PF, skipped, IRETQ, in the kernel", "
        lea rax, [rip + skip_fault]
        mov edi, 14
        call gate
        mov ebx, {nothing}
    2:  mov rax, [rbx]
        dec rsi
        jnz 2b
        ret";
    fault_user 1 "#PF, skipped, IRETQ, from user mode", "
        lea rax, [rip + skip_fault]
        mov edi, 14
        call gate
        lea rax, [rip + 2f]
        mov ebx, {nothing}
        jmp in_user
    2:  mov rax, [rbx]
        dec rsi
        jnz 2b
        int 0x81";
    page_kernel 512 "#PF, page made present, IRETQ, in the kernel", "
        lea rax, [rip + bring_page]
        mov edi, 14
        call gate
    3:  call take_pages
        mov ebx, {area}
    2:  mov rax, [rbx]
        add ebx, 4096
        cmp ebx, {area_end}
        jb 2b
        dec rsi
        jnz 3b
        ret";
    page_user 512 "#PF, page made present, IRETQ, from user mode", "
        lea rax, [rip + bring_page]
        mov edi, 14
        call gate
    3:  call take_pages
        lea rax, [rip + 2f]
        mov ebx, {area}
        call in_user
        dec rsi
        jnz 3b
        ret
    2:  mov rax, [rbx]
        add ebx, 4096
        cmp ebx, {area_end}
        jb 2b
        int 0x81";
    cr3_same 1 "MOV to CR3, the same table", "
        call give_pages
        mov rax, cr3
    2:  mov cr3, rax
        dec rsi
        jnz 2b
        ret";
    cr3_no_global 1 "the same without global pages", "
        mov eax, {cr4} - 0x80
        mov cr4, rax
        mov rax, cr3
    2:  mov cr3, rax
        dec rsi
        jnz 2b
        ret";
    cr3_two 1 "MOV to CR3, another table each time", "
        mov rax, cr3
        mov ebx, {pml4}
        xor ebx, {other_pml4}
    2:  xor rax, rbx
        mov cr3, rax
        dec rsi
        jnz 2b
        ret";
    cr3_two_touch 1 "the same, and 64 pages read", "
        mov rdi, cr3
        mov ebx, {pml4}
        xor ebx, {other_pml4}
    3:  xor rdi, rbx
        mov cr3, rdi
        call touch
        dec rsi
        jnz 3b
        ret";
    cr3_pcid 1 "MOV to CR3, another table and PCID, kept", "
        mov r8d, 0x20000
        call need
        mov eax, {cr4} + 0x20000
        mov cr4, rax
        mov eax, {pml4} + 1
        mov ebx, {pml4} + 1
        xor ebx, {other_pml4} + 2
        bts rax, 63
    2:  xor rax, rbx
        mov cr3, rax
        dec rsi
        jnz 2b
        mov eax, {pml4}
        mov cr3, rax
        ret";
    cr3_pcid_touch 1 "the same, and 64 pages read", "
        mov r8d, 0x20000
        call need
        mov eax, {cr4} + 0x20000
        mov cr4, rax
        mov edi, {pml4} + 1
        mov ebx, {pml4} + 1
        xor ebx, {other_pml4} + 2
        bts rdi, 63
    3:  xor rdi, rbx
        mov cr3, rdi
        call touch
        dec rsi
        jnz 3b
        mov eax, {pml4}
        mov cr3, rax
        ret";
    pages_read 1 "64 pages read, that alone", "
    3:  call touch
        dec rsi
        jnz 3b
        ret";
    invlpg 1 "INVLPG of a page not used", "
        mov ebx, {area}
    2:  invlpg [rbx]
        dec rsi
        jnz 2b
        ret";
    invlpg_read 1 "INVLPG, and the page read", "
        mov ebx, {area}
    2:  invlpg [rbx]
        mov rax, [rbx]
        dec rsi
        jnz 2b
        ret";
    cr0_same 1 "MOV to CR0, the same", "
        mov rax, cr0
    2:  mov cr0, rax
        dec rsi
        jnz 2b
        ret";
    cr0_ts 1 "MOV to CR0 that sets TS, CLTS", "
        mov rax, cr0
        or eax, 8
    2:  mov cr0, rax
        clts
        dec rsi
        jnz 2b
        ret";
    cr0_wp 2 "MOV to CR0 that changes WP", "
        mov rax, cr0
    2:  xor eax, 0x10000
        mov cr0, rax
        xor eax, 0x10000
        mov cr0, rax
        dec rsi
        jnz 2b
        ret";
    cr4_same 1 "MOV to CR4, the same", "
        mov rax, cr4
    2:  mov cr4, rax
        dec rsi
        jnz 2b
        ret";
    cr4_pge 1 "MOV to CR4 that clears PGE, and back", "
        mov rax, cr4
    2:  xor eax, 0x80
        mov cr4, rax
        xor eax, 0x80
        mov cr4, rax
        dec rsi
        jnz 2b
        ret";
    cr8 1 "MOV to CR8", "
        xor eax, eax
    2:  mov cr8, rax
        dec rsi
        jnz 2b
        ret";
    dr7 1 "MOV to DR7", "
        mov eax, 0x400
    2:  mov dr7, rax
        dec rsi
        jnz 2b
        ret";
    wrmsr_fs 1 "WRMSR FS_BASE", "
        mov ecx, 0xc0000100
        mov eax, {per_cpu}
        xor edx, edx
    2:  wrmsr
        dec rsi
        jnz 2b
        ret";
    wrmsr_gs 1 "WRMSR KERNEL_GS_BASE", "
        mov ecx, 0xc0000102
        mov eax, {per_cpu}
        xor edx, edx
    2:  wrmsr
        dec rsi
        jnz 2b
        ret";
    rdmsr_fs 1 "RDMSR FS_BASE", "
        mov ecx, 0xc0000100
    2:  rdmsr
        dec rsi
        jnz 2b
        ret";
    eoi_memory 1 "EOI by the APIC's page", "
    2:  mov dword ptr [{apic} + 0xb0], 0
        dec rsi
        jnz 2b
        ret";
    self_memory 1 "an interrupt by the APIC's page, handled, EOI", "
        lea rax, [rip + interrupt]
        mov edi, 0x40
        call gate
        sti
    2:  mov dword ptr [{apic} + 0x300], 0x44040
        dec rsi
        jnz 2b
        ret";
    halt 1 "HLT, woken by the APIC's timer after 20 us", "
        lea rax, [rip + interrupt]
        mov edi, 0x41
        call gate
        mov dword ptr [{apic} + 0x320], 0x41
        mov dword ptr [{apic} + 0x3e0], 11
    2:  mov dword ptr [{apic} + 0x380], 20000
        sti
        hlt
        cli
        dec rsi
        jnz 2b
        ret";
    deadline 1 "WRMSR TSC_DEADLINE, far away", "
        mov r8d, 0x1000000
        call need
        mov dword ptr [{apic} + 0x320], 0x40041
        rdtsc
        add edx, 100
        mov ecx, 0x6e0
    2:  wrmsr
        dec rsi
        jnz 2b
        xor eax, eax
        xor edx, edx
        wrmsr
        mov dword ptr [{apic} + 0x320], 0x10041
        ret";
    eoi 1 "WRMSR x2APIC EOI", "
        call messages
        mov ecx, 0x80b
        xor eax, eax
        xor edx, edx
    2:  wrmsr
        dec rsi
        jnz 2b
        ret";
    self_message 1 "WRMSR x2APIC ICR to itself, handled, EOI", "
        call messages
        lea rax, [rip + message_interrupt]
        mov edi, 0x40
        call gate
        sti
        mov ecx, 0x830
        mov eax, 0x44040
        xor edx, edx
    2:  wrmsr
        dec rsi
        jnz 2b
        ret";
    cpuid 1 "CPUID", "
    2:  mov eax, 1
        xor ecx, ecx
        cpuid
        dec rsi
        jnz 2b
        ret";
    swapgs 1 "SWAPGS", "
        and rsi, -2
    2:  swapgs
        dec rsi
        jnz 2b
        ret";
    cli_sti 1 "CLI, STI", "
    2:  cli
        sti
        dec rsi
        jnz 2b
        ret";
    popf 1 "PUSHFQ, CLI, POPFQ", "
        sti
    2:  pushfq
        cli
        popfq
        dec rsi
        jnz 2b
        ret";
    stac 1 "STAC, CLAC", "
        mov eax, {cr4} + 0x200000
        mov cr4, rax
    2:  stac
        clac
        dec rsi
        jnz 2b
        mov eax, {cr4}
        mov cr4, rax
        ret";
    rdtsc 1 "RDTSC", "
    2:  rdtsc
        dec rsi
        jnz 2b
        ret";
    rdtscp 1 "RDTSCP", "
    2:  rdtscp
        dec rsi
        jnz 2b
        ret";
    xgetbv 1 "XGETBV", "
        xor ecx, ecx
    2:  xgetbv
        dec rsi
        jnz 2b
        ret";
    wrpkru 1 "WRPKRU, the same", "
        mov eax, {cr4} + 0x400000
        mov cr4, rax
        xor eax, eax
        xor ecx, ecx
        xor edx, edx
    2:  wrpkru
        dec rsi
        jnz 2b
        ret";
    verw 1 "VERW", "
        mov word ptr [{word}], 16
    2:  verw word ptr [{word}]
        dec rsi
        jnz 2b
        ret";
    lsl 1 "LSL", "
        mov ecx, 16
    2:  lsl eax, ecx
        dec rsi
        jnz 2b
        ret";
    mov_ds 1 "MOV to DS", "
        mov eax, 16
    2:  mov ds, eax
        dec rsi
        jnz 2b
        ret";
    mov_ss 1 "MOV to SS", "
        mov eax, 16
    2:  mov ss, eax
        dec rsi
        jnz 2b
        ret";
    mov_fs 1 "MOV to FS of a null selector", "
        xor eax, eax
    2:  mov fs, eax
        dec rsi
        jnz 2b
        ret";
    ltr 1 "LTR", "
        mov eax, 0x30
    2:  and byte ptr [{gdt} + 53], 0xfd
        ltr ax
        dec rsi
        jnz 2b
        ret";
    lgdt 1 "LGDT", "
    2:  lgdt [{pseudo}]
        dec rsi
        jnz 2b
        ret";
    lidt 1 "LIDT", "
    2:  lidt [{pseudo} + 16]
        dec rsi
        jnz 2b
        ret";
    retf 1 "RETFQ", "
        lea rax, [rip + 3f]
    2:  push 8
        push rax
        retfq
    3:  dec rsi
        jnz 2b
        ret";
    far_jump 1 "JMP far", "
        lea rax, [rip + 3f]
        mov [{word}], eax
        mov word ptr [{word} + 4], 8
    2:  jmp fword ptr [{word}]
    3:  dec rsi
        jnz 2b
        ret";
    wbinvd 1 "WBINVD", "
    2:  wbinvd
        dec rsi
        jnz 2b
        ret";
    fxsave 1 "FXSAVE64, FXRSTOR64", "
        mov edi, {xsave_area}
    2:  fxsave64 [rdi]
        fxrstor64 [rdi]
        dec rsi
        jnz 2b
        ret";
    xsave 1 "XSAVE64, XRSTOR64", "
        mov edi, {xsave_area}
        mov eax, 7
        xor edx, edx
    2:  xsave64 [rdi]
        xrstor64 [rdi]
        dec rsi
        jnz 2b
        ret";
    xsaveopt 1 "XSAVEOPT64, XRSTOR64", "
        mov edi, {xsave_area}
        mov eax, 7
        xor edx, edx
    2:  xsaveopt64 [rdi]
        xrstor64 [rdi]
        dec rsi
        jnz 2b
        ret";
    xsaves 1 "XSAVES64, XRSTORS64", "
        mov edi, {xsave_area} + 0x1000
        mov eax, 7
        xor edx, edx
    2:  xsaves64 [rdi]
        xrstors64 [rdi]
        dec rsi
        jnz 2b
        ret";
    switch_stack 2 "a switch of kernel stacks", "
        lea rax, [rip + 3f]
        call new_task
    2:  call switch_stack
        dec rsi
        jnz 2b
        ret
    3:  call switch_stack
        jmp 3b";
    switch_space 2 "the same, and CR3", "
        lea rax, [rip + 3f]
        call new_task
        mov edi, {pml4}
        mov r8d, {other_pml4}
    2:  mov cr3, r8
        call switch_stack
        dec rsi
        jnz 2b
        ret
    3:  mov cr3, rdi
        call switch_stack
        jmp 3b";
    switch_thread 2 "the same, PCIDs kept, XSAVE, XRSTOR, FS_BASE", "
        mov r8d, 0x20000
        call need
        mov eax, {cr4} + 0x20000
        mov cr4, rax
        lea rax, [rip + 3f]
        call new_task
        mov edi, {pml4} + 1
        mov r8d, {other_pml4} + 2
        bts rdi, 63
        bts r8, 63
        mov r9d, {xsave_area}
    2:  call 4f
        mov cr3, r8
        call switch_stack
        dec rsi
        jnz 2b
        mov eax, {pml4}
        mov cr3, rax
        ret
    3:  call 4f
        mov cr3, rdi
        call switch_stack
        jmp 3b
    4:  mov eax, 7
        xor edx, edx
        xsaveopt64 [r9]
        xrstor64 [r9]
        mov ecx, 0xc0000100
        xor eax, eax
        wrmsr
        ret";
}

/// The image, with those loops only whose numbers are given.
pub(crate) fn with_rows(rows: &[usize]) -> Vec<u8> {
    unsafe extern "C" {
        safe static system_image_start: u8;
        safe static system_image_table: u8;
        safe static system_image_end: u8;
    }
    let start = &raw const system_image_start;
    // SAFETY: all are labels of the one `global_asm!` above, in this order, around constant bytes.
    let (table, image) = unsafe {
        let length = (&raw const system_image_end).offset_from_unsigned(start);
        let table = (&raw const system_image_table).offset_from_unsigned(start);
        (table, std::slice::from_raw_parts(start, length))
    };
    let mut image = image.to_vec();
    let (entries, _) = image[table..].as_chunks_mut::<8>();
    let all: Vec<_> = entries[..ROWS.len()].to_vec();
    let wanted = rows.iter().map(|row| all[*row]);
    for (entry, address) in entries.iter_mut().zip(wanted.chain([[0; 8]])) {
        *entry = address;
    }
    image
}
