//! Trust domains: KVM's side of TDX (SPEC 3.4, 5.5; KVM API, "Intel Trust Domain Extensions").
//!
//! A VM of the type `KVM_X86_TDX_VM` is a TD. Its private memory and the tables that map it belong
//! to the [TDX module](twofold_tdx), which KVM asks for every change; shared memory is mapped as in
//! any other VM. The program builds a TD with the commands of `KVM_MEMORY_ENCRYPT_OP`:
//!
//! | command | on | module |
//! |---|---|---|
//! | `CAPABILITIES` | VM | |
//! | `INIT_VM` | VM | MNG.CREATE, KEY.CONFIG, ADDCX, MNG.INIT |
//! | `INIT_VCPU` | vCPU | VP.CREATE, ADDCX, VP.INIT |
//! | `INIT_MEM_REGION` | vCPU | SEPT.ADD, PAGE.ADD, MR.EXTEND |
//! | `FINALIZE_VM` | VM | MR.FINALIZE |
//! | `GET_CPUID` | vCPU | |
//!
//! `abi` has their structures. `vm` and `vcpu` carry them out, `region` the one that adds memory;
//! `life` creates a TD and takes it apart; `mirror` does in the Secure EPT what the MMU does in the
//! copy that it keeps (the mirror); `entry` lets a virtual processor into the TD; `protected` says
//! which ioctls are refused since the guest's state is its own; `platform` is the machine below the
//! module, and `inject` makes it fail on purpose.

pub(crate) mod abi;
mod cpuid;
mod entry;
mod inject;
mod life;
mod mirror;
mod platform;
mod protected;
mod region;
mod start;
#[cfg(test)]
mod tests;
mod vcpu;
mod vm;

pub(crate) use life::{Stage, Td, TdVcpu};
pub(crate) use platform::{ProcessPlatform, lock_for_fork, module, unlock_after_fork};
pub(crate) use protected::{emulates_msr, is_read_only_msr, refuses};
