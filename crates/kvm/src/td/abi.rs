//! The structures of `KVM_MEMORY_ENCRYPT_OP` for TDs (KVM API, "Intel Trust Domain Extensions").

/// Commands: `kvm_tdx_cmd.id`.
pub(crate) mod command {
    pub(crate) const CAPABILITIES: u32 = 0;
    pub(crate) const INIT_VM: u32 = 1;
    pub(crate) const INIT_VCPU: u32 = 2;
    pub(crate) const INIT_MEM_REGION: u32 = 3;
    pub(crate) const FINALIZE_VM: u32 = 4;
    pub(crate) const GET_CPUID: u32 = 5;
}

/// Flag of `INIT_MEM_REGION`: the content is part of the measurement.
pub(crate) const MEASURE_MEMORY_REGION: u32 = 1 << 0;

/// `struct kvm_tdx_cmd`
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct TdxCommand {
    pub(crate) id: u32,
    pub(crate) flags: u32,
    /// A value, or where the command's own structure is.
    pub(crate) data: u64,
    /// What the module answered, where the command failed because of that.
    pub(crate) hw_error: u64,
}

/// `struct kvm_tdx_init_mem_region`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct MemoryRegion {
    pub(crate) source_addr: u64,
    pub(crate) gpa: u64,
    pub(crate) nr_pages: u64,
}

/// Words of `struct kvm_tdx_capabilities` before its CPUID table: attributes, XFAM, four words about
/// TDG.VP.VMCALL, and 250 reserved ones.
pub(crate) const CAPABILITIES_WORDS: usize = 256;

/// `struct kvm_tdx_init_vm` before the entries of its CPUID table: attributes, XFAM, three digests of
/// 48 bytes, 12 reserved words, and the table's count and padding.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct InitVm {
    pub(crate) attributes: u64,
    pub(crate) xfam: u64,
    pub(crate) digests: [[u64; 6]; 3],
    pub(crate) reserved: [u64; 12],
    pub(crate) cpuid_count: u32,
    pub(crate) cpuid_padding: u32,
}

const _: () = {
    assert!(size_of::<TdxCommand>() == 24);
    assert!(size_of::<MemoryRegion>() == 24);
    assert!(size_of::<InitVm>() == 256 + 8);
};
