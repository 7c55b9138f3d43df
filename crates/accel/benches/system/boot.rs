//! What of the guest runs before and between its loops: the way into 64-bit mode, tables, exceptions, the
//! serial port, and what the loops call. A macro, because [`super::image`] puts it and the loops into one
//! piece of assembly, whose labels they share.

/// What runs before and between the loops.
macro_rules! BOOT {
    () => {
        "
        .pushsection .rodata.system_image, \"a\", @progbits
        .p2align 12
        .globl system_image_start
    system_image_start:
    image_start:
        .code32
        cli
        mov esp, {stack}
        mov dword ptr [0x200000], 0x202007
        mov dword ptr [0x201000], 0x207007
        mov dword ptr [0x202000], 0x203007
        mov dword ptr [0x202008], 0x205007
        mov dword ptr [0x207000], 0x203007
        mov dword ptr [0x207008], 0x208007
        mov dword ptr [0x205000], 0x206007
        mov dword ptr [0x208000], 0x209007
        mov dword ptr [0x205ff8], 0xfee000f3
        mov dword ptr [0x208ff8], 0xfee000f3
        mov edi, 0x203000
        mov eax, 0x1e3
    2:  mov [edi], eax
        add edi, 8
        add eax, 0x200000
        cmp edi, 0x204000
        jb 2b
        or dword ptr [0x203000], 4
        mov edi, 0x206000
        mov eax, 0x400067
    2:  mov [edi], eax
        mov [edi + 0x3000], eax
        add edi, 8
        add eax, 0x1000
        cmp edi, 0x207000
        jb 2b
        mov dword ptr [{gdt} + 8], 0xffff
        mov dword ptr [{gdt} + 12], 0x00af9b00
        mov dword ptr [{gdt} + 16], 0xffff
        mov dword ptr [{gdt} + 20], 0x00cf9300
        mov dword ptr [{gdt} + 24], 0xffff
        mov dword ptr [{gdt} + 28], 0x00cffb00
        mov dword ptr [{gdt} + 32], 0xffff
        mov dword ptr [{gdt} + 36], 0x00cff300
        mov dword ptr [{gdt} + 40], 0xffff
        mov dword ptr [{gdt} + 44], 0x00affb00
        mov dword ptr [{gdt} + 48], 0x20000067
        mov dword ptr [{gdt} + 52], 0x00008935
        mov word ptr [{pseudo}], 0x3f
        mov dword ptr [{pseudo} + 2], {gdt}
        lgdt [{pseudo}]
        mov eax, {cr4}
        mov cr4, eax
        mov eax, {pml4}
        mov cr3, eax
        mov ecx, 0xc0000080
        rdmsr
        or eax, 0x101
        wrmsr
        mov eax, {cr0}
        mov cr0, eax
        push 8
        push 0x100400
        retf

        .org image_start + 0x400
        .code64
        mov eax, 16
        mov ds, eax
        mov es, eax
        mov ss, eax
        mov fs, eax
        mov gs, eax
        mov esp, {stack}
        mov dword ptr [{tss} + 4], {inner_stack}
        mov eax, 0x30
        ltr ax
        xor ecx, ecx
        xor edx, edx
        mov eax, 7
        xsetbv
        mov al, 0xff
        out 0x21, al
        out 0xa1, al
        mov dword ptr [{apic} + 0xf0], 0x1ff
        mov word ptr [{pseudo} + 16], 0xfff
        mov qword ptr [{pseudo} + 18], {idt}
        lidt [{pseudo} + 16]
        mov ecx, 0xc0000081
        xor eax, eax
        mov edx, 0x001b0008
        wrmsr
        mov ecx, 0xc0000084
        mov eax, 0x47700
        xor edx, edx
        wrmsr
        mov ecx, 0xc0000102
        mov eax, {per_cpu}
        wrmsr
        lea rbx, [rip + table]
    next_row:
        cmp qword ptr [rbx], 0
        je finished
        mov r12d, 16
    2:  call run_row
        cmp rax, -1
        je 4f
        cmp rax, 2000000
        jae 3f
        shl r12, 1
        jmp 2b
    3:  mov r13, rax
        mov r14d, 15
    2:  call run_row
        cmp rax, r13
        cmovb r13, rax
        dec r14
        jnz 2b
        mov rax, r13
    4:  call print
        mov al, 32
        out dx, al
        mov rax, r12
        call print
        mov al, 10
        out dx, al
        add rbx, 8
        jmp next_row
    finished:
        mov dx, 0x3f8
        mov al, 100
        out dx, al
        mov al, 111
        out dx, al
        mov al, 110
        out dx, al
        mov al, 101
        out dx, al
        mov al, 10
        out dx, al
    2:  cli
        hlt
        jmp 2b

        // Prints RAX.
    print:
        mov rsi, rax
        mov ecx, 16
        mov dx, 0x3f8
    2:  rol rsi, 4
        mov eax, esi
        and eax, 15
        add al, 48
        cmp al, 58
        jb 3f
        add al, 39
    3:  out dx, al
        dec ecx
        jnz 2b
        ret

        // Runs row [RBX] for R12 rounds: ticks in RAX, or -1.
    run_row:
        push rbx
        push r12
        push r13
        push r14
        call reset
        mov rsi, r12
        mov rbp, [rbx]
        mov [{unwind}], rsp
        rdtsc
        mov [{began}], eax
        mov [{began} + 4], edx
        call rbp
        rdtsc
        shl rdx, 32
        or rax, rdx
        sub rax, [{began}]
    leave_row:
        cli
        cld
        pop r14
        pop r13
        pop r12
        pop rbx
        ret
    unexpected:
        mov rsp, [{unwind}]
        mov rax, -1
        jmp leave_row

        // What every row may count on.
    reset:
        mov eax, {cr0}
        mov cr0, rax
        mov eax, {pml4}
        mov cr3, rax
        mov eax, {cr4}
        mov cr4, rax
        xor eax, eax
        mov cr8, rax
        mov edi, {idt}
        lea rax, [rip + unexpected]
    2:  call put_gate
        cmp edi, {idt} + 4096
        jb 2b
        mov edi, {idt} + 0x810
        lea rax, [rip + back_from_user]
        call put_gate
        mov byte ptr [{idt} + 0x815], 0xee
        ret

        // A gate for RAX at RDI, which moves on.
    put_gate:
        mov [rdi], ax
        mov word ptr [rdi + 2], 8
        mov word ptr [rdi + 4], 0x8e00
        mov rdx, rax
        shr rdx, 16
        mov [rdi + 6], edx
        mov dword ptr [rdi + 10], 0
        mov word ptr [rdi + 14], 0
        add rdi, 16
        ret
        // A gate for RAX at vector EDI, for user mode, too.
    gate:
        shl edi, 4
        add edi, {idt}
        call put_gate
        mov byte ptr [rdi - 11], 0xee
        ret

        // Runs RAX in user mode until INT 0x81. RSI, RDI and RBX are handed on.
    in_user:
        mov [{kernel_rsp}], rsp
        push 0x23
        push 0
        push 0x202
        push 0x2b
        push rax
        iretq
    back_from_user:
        mov rsp, [{kernel_rsp}]
        ret

        // Page faults: goes on behind a load of three bytes; or makes the page present.
    skip_fault:
        add qword ptr [rsp + 8], 3
        add rsp, 8
        iretq
    bring_page:
        push rax
        mov rax, cr2
        sub rax, {area}
        shr rax, 12
        or dword ptr [{page_table} + rax * 8], 1
        pop rax
        add rsp, 8
        iretq
        // Takes all pages away.
    take_pages:
        mov eax, {page_table}
    2:  and dword ptr [rax], -2
        add eax, 8
        cmp eax, {page_table} + 4096
        jb 2b
        mov rax, cr3
        mov cr3, rax
        ret
        // Puts them back.
    give_pages:
        mov eax, {page_table}
    2:  or dword ptr [rax], 1
        add eax, 8
        cmp eax, {page_table} + 4096
        jb 2b
        ret
        // Reads from 64 pages.
    touch:
        mov eax, {area}
    2:  mov ecx, [rax]
        add eax, 4096
        cmp eax, {working_set_end}
        jb 2b
        ret
        // Leaves the row unless CPUID.1:ECX has the bits in R8D.
    need:
        mov eax, 1
        xor ecx, ecx
        cpuid
        and ecx, r8d
        cmp ecx, r8d
        jne unexpected
        ret

        // Goes to the other of two stacks, as kernels do.
    switch_stack:
        push rbp
        push rbx
        push r12
        push r13
        push r14
        push r15
        mov rax, [{tasks}]
        mov [{tasks}], rsp
        mov rsp, rax
        pop r15
        pop r14
        pop r13
        pop r12
        pop rbx
        pop rbp
        ret
        // The other stack begins at RAX.
    new_task:
        mov [{task_stack} - 8], rax
        mov qword ptr [{tasks}], {task_stack} - 56
        ret

        // Interrupt handlers.
    interrupt:
        mov dword ptr [{apic} + 0xb0], 0
        iretq
    message_interrupt:
        push rax
        push rcx
        push rdx
        mov ecx, 0x80b
        xor eax, eax
        xor edx, edx
        wrmsr
        pop rdx
        pop rcx
        pop rax
        iretq
        // The x2APIC instead of the APIC.
    messages:
        mov r8d, 0x200000
        call need
        mov ecx, 0x1b
        rdmsr
        or eax, 0xc00
        wrmsr
        ret
        "
    };
}
