//! Forms that the host's processor cannot judge, each with the reason.

use iced_x86::{Code, Mnemonic};

/// Why a form is not put before the judge.
pub fn excluded(code: Code) -> Option<&'static str> {
    use Mnemonic as M;
    let op = code.op_code();
    match code.mnemonic() {
        M::Syscall | M::Sysenter | M::Sysret | M::Sysexit | M::Int | M::Int1 | M::Into => {
            return Some("enters the host's kernel");
        }
        M::Rdtsc | M::Rdtscp | M::Rdrand | M::Rdseed | M::Rdpid | M::Cpuid | M::Xgetbv => {
            return Some("its result is the processor's own");
        }
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => {
            return Some("the host's kernel emulates it for user code");
        }
        M::Wrfsbase | M::Rdfsbase | M::Wrgsbase | M::Lfs => {
            return Some("would take the test's own thread-local storage away");
        }
        M::Lar
        | M::Lsl
        | M::Verr
        | M::Verw
        | M::Lds
        | M::Les
        | M::Lss
        | M::Lgs
        | M::Iret
        | M::Iretd
        | M::Iretq
        | M::Retf => return Some("depends on the host's descriptors"),
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 => {
            return Some("what it leaves out depends on what the processor keeps track of");
        }
        M::Monitor | M::Mwait | M::Rdpmc | M::Rdmsr | M::Wrmsr | M::Vmcall | M::Vmmcall => {
            return Some("depends on what the host lets user code do");
        }
        _ => {}
    }
    if matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
    ) {
        return Some("does nothing on Intel's processors, and is an invalid opcode on AMD's");
    }
    let segment = |operand| {
        use iced_x86::OpCodeOperandKind as K;
        let kind = op.try_op_kind(operand).unwrap_or(K::None);
        matches!(
            kind,
            K::seg_reg | K::es | K::cs | K::ss | K::ds | K::fs | K::gs
        )
    };
    if matches!(code.mnemonic(), M::Mov | M::Pop) && segment(0)
        || matches!(code.mnemonic(), M::Mov | M::Push) && (segment(1) || segment(0))
    {
        return Some("depends on the host's descriptors");
    }
    if matches!(code.mnemonic(), M::Jmp | M::Call)
        && op.op_kinds().iter().any(|kind| {
            use iced_x86::OpCodeOperandKind as K;
            matches!(kind, K::farbr2_2 | K::farbr4_2)
        })
        || code.op_code().instruction_string().contains("m16:")
    {
        return Some("depends on the host's descriptors");
    }
    if is_near_branch(code.mnemonic()) && op.operand_size() == 16 {
        return Some("vendors differ in what an operand size prefix does to a near branch");
    }
    None
}

/// Whether this is a near branch of some kind.
fn is_near_branch(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Jmp
            | M::Call
            | M::Ret
            | M::Jo
            | M::Jno
            | M::Jb
            | M::Jae
            | M::Je
            | M::Jne
            | M::Jbe
            | M::Ja
            | M::Js
            | M::Jns
            | M::Jp
            | M::Jnp
            | M::Jl
            | M::Jge
            | M::Jle
            | M::Jg
            | M::Loop
            | M::Loope
            | M::Loopne
            | M::Jcxz
            | M::Jecxz
            | M::Jrcxz
    )
}
