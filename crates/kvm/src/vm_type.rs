//! Types of virtual machines: the argument of `KVM_CREATE_VM`.

use crate::second_stage::Kind;
use kvm_bindings::{KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM, KVM_X86_TDX_VM};
use rustix::io::Errno;
use twofold_mmu::{AccessKind, Conversion, PrivateMemory};

/// What kind of machine a VM is, as far as its memory is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VmType {
    /// `KVM_X86_DEFAULT_VM`
    Default,
    /// `KVM_X86_SW_PROTECTED_VM`: private memory without a processor that protects it.
    SoftwareProtected,
    /// `KVM_X86_TDX_VM`: a trust domain.
    TrustDomain,
}

impl VmType {
    /// The types that a machine with such processors has: `KVM_CAP_VM_TYPES`.
    pub(crate) const fn supported(kind: Kind) -> u32 {
        let everywhere = 1 << KVM_X86_DEFAULT_VM | 1 << KVM_X86_SW_PROTECTED_VM;
        match kind {
            Kind::Ept => everywhere | 1 << KVM_X86_TDX_VM,
            Kind::Npt => everywhere,
        }
    }

    /// The type with this number.
    ///
    /// # Errors
    /// `EINVAL` for one that such processors do not have.
    pub(crate) fn new(number: u64, kind: Kind) -> Result<Self, Errno> {
        match u32::try_from(number) {
            Ok(KVM_X86_DEFAULT_VM) => Ok(Self::Default),
            Ok(KVM_X86_SW_PROTECTED_VM) => Ok(Self::SoftwareProtected),
            Ok(KVM_X86_TDX_VM) if kind == Kind::Ept => Ok(Self::TrustDomain),
            _ => Err(Errno::INVAL),
        }
    }

    /// What private memory is like, if there is any.
    pub(crate) const fn private_memory(self) -> Option<PrivateMemory> {
        match self {
            Self::Default => None,
            Self::SoftwareProtected => Some(PrivateMemory {
                access: AccessKind::ByAttribute,
                conversion: Conversion::ZapOpposite,
            }),
            Self::TrustDomain => Some(PrivateMemory {
                access: AccessKind::ByProcessor,
                conversion: Conversion::ZapOpposite,
            }),
        }
    }

    pub(crate) const fn has_private_memory(self) -> bool {
        self.private_memory().is_some()
    }
}
