//! Types of virtual machines: the argument of `KVM_CREATE_VM`.

use kvm_bindings::{KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM};
use rustix::io::Errno;
use twofold_mmu::{AccessKind, Conversion, PrivateMemory};

/// What kind of machine a VM is, as far as its memory is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VmType {
    /// `KVM_X86_DEFAULT_VM`
    Default,
    /// `KVM_X86_SW_PROTECTED_VM`: private memory without a processor that protects it.
    SoftwareProtected,
}

impl VmType {
    /// The type with this number.
    ///
    /// # Errors
    /// `EINVAL` for one that there is not.
    pub(crate) fn new(number: u64) -> Result<Self, Errno> {
        match u32::try_from(number) {
            Ok(KVM_X86_DEFAULT_VM) => Ok(Self::Default),
            Ok(KVM_X86_SW_PROTECTED_VM) => Ok(Self::SoftwareProtected),
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
        }
    }

    pub(crate) const fn has_private_memory(self) -> bool {
        self.private_memory().is_some()
    }
}
