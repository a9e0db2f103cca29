//! What `KVM_CHECK_EXTENSION` answers: one table.
//!
//! A capability is listed when everything that it stands for is there. What is not listed
//! answers 0, as KVM does for numbers it does not know.

use crate::second_stage::Kind;
use crate::vcpu::MACHINE_CHECK_BANKS;
use crate::vm::HypercallExits;
use crate::vm_type::VmType;
use kvm_bindings as kvm;
use twofold_abi::spp;

/// vCPUs that one VM may have.
pub const MAX_VCPUS: u32 = 1024;
/// vCPU ids are below this.
pub const MAX_VCPU_ID: u32 = 4096;
/// Slots that a program may use in each address space.
pub const NR_MEMSLOTS: u32 = 32764;
/// Routes that `KVM_SET_GSI_ROUTING` takes (`KVM_MAX_IRQ_ROUTES`).
pub(crate) const MAX_IRQ_ROUTES: u32 = 4096;
/// The page of a vCPU's mapping that shows the coalesced ring.
pub const COALESCED_MMIO_PAGE_OFFSET: u32 = 2;
/// The quirks that `KVM_CAP_DISABLE_QUIRKS2` can turn off. `CD_NW_CLEARED` makes no difference
/// here: the processor keeps CD and NW as the guest sets them.
pub const VALID_QUIRKS: u32 = kvm::KVM_X86_QUIRK_SLOT_ZAP_ALL | kvm::KVM_X86_QUIRK_CD_NW_CLEARED;
/// The bits of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
const MANUAL_PROTECT: u32 =
    kvm::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | kvm::KVM_DIRTY_LOG_INITIALLY_SET;
/// Bytes of the largest dirty ring.
const MAX_DIRTY_RING_BYTES: u32 =
    twofold_mmu::dirty_ring::MAX_ENTRIES * size_of::<twofold_mmu::DirtyGfn>() as u32;
/// The flags of `kvm_clock_data` that `KVM_GET_CLOCK` may set.
pub const CLOCK_FLAGS: u32 =
    kvm::KVM_CLOCK_TSC_STABLE | kvm::KVM_CLOCK_REALTIME | kvm::KVM_CLOCK_HOST_TSC;
/// The bits of `kvm_guest_debug.control` that work.
pub const GUEST_DEBUG_BITS: u32 = kvm::KVM_GUESTDBG_ENABLE
    | kvm::KVM_GUESTDBG_SINGLESTEP
    | kvm::KVM_GUESTDBG_USE_SW_BP
    | kvm::KVM_GUESTDBG_USE_HW_BP
    | kvm::KVM_GUESTDBG_INJECT_DB
    | kvm::KVM_GUESTDBG_INJECT_BP
    | kvm::KVM_GUESTDBG_BLOCKIRQ;

/// Bytes that `KVM_GET_XSAVE2` writes.
const XSAVE_BYTES: u32 = size_of::<kvm::kvm_xsave>() as u32;

/// A capability, with what it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// `KVM_CAP_*`.
    pub number: u32,
    /// Its name without the prefix.
    pub name: &'static str,
    /// What `KVM_CHECK_EXTENSION` answers; never 0.
    pub value: u32,
}

macro_rules! capabilities {
    ($($name:ident: $symbol:ident = $value:expr,)*) => {
        &[$(Capability { number: kvm::$symbol, name: stringify!($name), value: $value },)*]
    };
}

/// The bits of `KVM_CAP_X86_DISABLE_EXITS`. PAUSE never leaves the guest.
pub const DISABLED_EXITS: u32 = kvm::KVM_X86_DISABLE_EXITS_HLT | kvm::KVM_X86_DISABLE_EXITS_PAUSE;
/// The bits of `KVM_CAP_X2APIC_API`.
pub const X2APIC_FORMATS: u32 =
    kvm::KVM_X2APIC_API_USE_32BIT_IDS | kvm::KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;

static CAPABILITIES: &[Capability] = capabilities! {
    IRQCHIP: KVM_CAP_IRQCHIP = 1,
    HLT: KVM_CAP_HLT = 1,
    PIT: KVM_CAP_PIT = 1,
    MMU_SHADOW_CACHE_CONTROL: KVM_CAP_MMU_SHADOW_CACHE_CONTROL = 1,
    USER_MEMORY: KVM_CAP_USER_MEMORY = 1,
    SET_TSS_ADDR: KVM_CAP_SET_TSS_ADDR = 1,
    EXT_CPUID: KVM_CAP_EXT_CPUID = 1,
    NR_MEMSLOTS: KVM_CAP_NR_MEMSLOTS = NR_MEMSLOTS,
    NOP_IO_DELAY: KVM_CAP_NOP_IO_DELAY = 1,
    MP_STATE: KVM_CAP_MP_STATE = 1,
    COALESCED_MMIO: KVM_CAP_COALESCED_MMIO = COALESCED_MMIO_PAGE_OFFSET,
    SYNC_MMU: KVM_CAP_SYNC_MMU = 1,
    DESTROY_MEMORY_REGION_WORKS: KVM_CAP_DESTROY_MEMORY_REGION_WORKS = 1,
    IRQ_INJECT_STATUS: KVM_CAP_IRQ_INJECT_STATUS = 1,
    IRQFD: KVM_CAP_IRQFD = 1,
    PIT2: KVM_CAP_PIT2 = 1,
    PIT_STATE2: KVM_CAP_PIT_STATE2 = 1,
    TSC_DEADLINE_TIMER: KVM_CAP_TSC_DEADLINE_TIMER = 1,
    SIGNAL_MSI: KVM_CAP_SIGNAL_MSI = 1,
    IRQFD_RESAMPLE: KVM_CAP_IRQFD_RESAMPLE = 1,
    X86_DISABLE_EXITS: KVM_CAP_X86_DISABLE_EXITS = DISABLED_EXITS,
    CLOCKSOURCE: KVM_CAP_CLOCKSOURCE = 1,
    ENFORCE_PV_FEATURE_CPUID: KVM_CAP_ENFORCE_PV_FEATURE_CPUID = 1,
    X2APIC_API: KVM_CAP_X2APIC_API = X2APIC_FORMATS,
    X86_APIC_BUS_CYCLES_NS: KVM_CAP_X86_APIC_BUS_CYCLES_NS = 1,
    USER_NMI: KVM_CAP_USER_NMI = 1,
    SET_GUEST_DEBUG: KVM_CAP_SET_GUEST_DEBUG = 1,
    IRQ_ROUTING: KVM_CAP_IRQ_ROUTING = MAX_IRQ_ROUTES,
    JOIN_MEMORY_REGIONS_WORKS: KVM_CAP_JOIN_MEMORY_REGIONS_WORKS = 1,
    SET_BOOT_CPU_ID: KVM_CAP_SET_BOOT_CPU_ID = 1,
    IOEVENTFD: KVM_CAP_IOEVENTFD = 1,
    SET_IDENTITY_MAP_ADDR: KVM_CAP_SET_IDENTITY_MAP_ADDR = 1,
    ADJUST_CLOCK: KVM_CAP_ADJUST_CLOCK = CLOCK_FLAGS,
    INTERNAL_ERROR_DATA: KVM_CAP_INTERNAL_ERROR_DATA = 1,
    VCPU_EVENTS: KVM_CAP_VCPU_EVENTS = 1,
    INTR_SHADOW: KVM_CAP_INTR_SHADOW = 1,
    DEBUGREGS: KVM_CAP_DEBUGREGS = 1,
    MCE: KVM_CAP_MCE = MACHINE_CHECK_BANKS,
    X86_ROBUST_SINGLESTEP: KVM_CAP_X86_ROBUST_SINGLESTEP = 1,
    ENABLE_CAP: KVM_CAP_ENABLE_CAP = 1,
    XSAVE: KVM_CAP_XSAVE = 1,
    XCRS: KVM_CAP_XCRS = 1,
    XSAVE2: KVM_CAP_XSAVE2 = XSAVE_BYTES,
    SYS_ATTRIBUTES: KVM_CAP_SYS_ATTRIBUTES = 1,
    TSC_CONTROL: KVM_CAP_TSC_CONTROL = 1,
    GET_TSC_KHZ: KVM_CAP_GET_TSC_KHZ = 1,
    MAX_VCPUS: KVM_CAP_MAX_VCPUS = MAX_VCPUS,
    SYNC_REGS: KVM_CAP_SYNC_REGS = kvm::KVM_SYNC_X86_VALID_FIELDS,
    KVMCLOCK_CTRL: KVM_CAP_KVMCLOCK_CTRL = 1,
    READONLY_MEM: KVM_CAP_READONLY_MEM = 1,
    EXT_EMUL_CPUID: KVM_CAP_EXT_EMUL_CPUID = 1,
    ENABLE_CAP_VM: KVM_CAP_ENABLE_CAP_VM = 1,
    IOEVENTFD_NO_LENGTH: KVM_CAP_IOEVENTFD_NO_LENGTH = 1,
    CHECK_EXTENSION_VM: KVM_CAP_CHECK_EXTENSION_VM = 1,
    DISABLE_QUIRKS: KVM_CAP_DISABLE_QUIRKS = 1,
    SPLIT_IRQCHIP: KVM_CAP_SPLIT_IRQCHIP = 1,
    IOEVENTFD_ANY_LENGTH: KVM_CAP_IOEVENTFD_ANY_LENGTH = 1,
    MAX_VCPU_ID: KVM_CAP_MAX_VCPU_ID = MAX_VCPU_ID,
    IMMEDIATE_EXIT: KVM_CAP_IMMEDIATE_EXIT = 1,
    GET_MSR_FEATURES: KVM_CAP_GET_MSR_FEATURES = 1,
    MSR_PLATFORM_INFO: KVM_CAP_MSR_PLATFORM_INFO = 1,
    COALESCED_PIO: KVM_CAP_COALESCED_PIO = 1,
    EXCEPTION_PAYLOAD: KVM_CAP_EXCEPTION_PAYLOAD = 1,
    MANUAL_DIRTY_LOG_PROTECT2: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = MANUAL_PROTECT,
    DIRTY_LOG_RING: KVM_CAP_DIRTY_LOG_RING = MAX_DIRTY_RING_BYTES,
    DIRTY_LOG_RING_ACQ_REL: KVM_CAP_DIRTY_LOG_RING_ACQ_REL = MAX_DIRTY_RING_BYTES,
    X86_USER_SPACE_MSR: KVM_CAP_X86_USER_SPACE_MSR = 1,
    VCPU_ATTRIBUTES: KVM_CAP_VCPU_ATTRIBUTES = 1,
    X86_MSR_FILTER: KVM_CAP_X86_MSR_FILTER = 1,
    SET_GUEST_DEBUG2: KVM_CAP_SET_GUEST_DEBUG2 = GUEST_DEBUG_BITS,
    SREGS2: KVM_CAP_SREGS2 = 1,
    EXIT_HYPERCALL: KVM_CAP_EXIT_HYPERCALL = HypercallExits::all().bits(),
    BINARY_STATS_FD: KVM_CAP_BINARY_STATS_FD = 1,
    EXIT_ON_EMULATION_FAILURE: KVM_CAP_EXIT_ON_EMULATION_FAILURE = 1,
    DISABLE_QUIRKS2: KVM_CAP_DISABLE_QUIRKS2 = VALID_QUIRKS,
    VM_TSC_CONTROL: KVM_CAP_VM_TSC_CONTROL = 1,
    VM_DISABLE_NX_HUGE_PAGES: KVM_CAP_VM_DISABLE_NX_HUGE_PAGES = 1,
    USER_MEMORY2: KVM_CAP_USER_MEMORY2 = 1,
    MEMORY_FAULT_INFO: KVM_CAP_MEMORY_FAULT_INFO = 1,
    MEMORY_ATTRIBUTES: KVM_CAP_MEMORY_ATTRIBUTES = kvm::KVM_MEMORY_ATTRIBUTE_PRIVATE,
    GUEST_MEMFD: KVM_CAP_GUEST_MEMFD = 1,
    PRE_FAULT_MEMORY: KVM_CAP_PRE_FAULT_MEMORY = 1,
};

/// Every capability that answers something other than 0, in ascending order of numbers.
pub fn all() -> impl Iterator<Item = Capability> {
    let mut all = CAPABILITIES.to_vec();
    all.push(Capability {
        number: kvm::KVM_CAP_NR_VCPUS,
        name: "NR_VCPUS",
        value: recommended_vcpus(),
    });
    all.extend(sub_pages(Kind::from_environment()));
    all.push(Capability {
        number: kvm::KVM_CAP_VM_TYPES,
        name: "VM_TYPES",
        value: vm_types(),
    });
    all.sort_by_key(|capability| capability.number);
    all.into_iter()
}

/// Sub-page write protection, which Twofold adds to KVM, where processors have it: with EPT.
fn sub_pages(kind: Kind) -> Option<Capability> {
    (kind == Kind::Ept).then_some(Capability {
        number: spp::KVM_CAP_X86_SPP,
        name: "X86_SPP",
        value: spp::KVM_SUBPAGE_MAX_PAGES,
    })
}

/// What `KVM_CHECK_EXTENSION` answers on a VM with this second stage: as on the system, but for what
/// belongs to another type of VM.
pub(crate) fn check_vm(kind: VmType, second_stage: Kind, number: u64) -> u32 {
    if number == u64::from(spp::KVM_CAP_X86_SPP) {
        // A trust domain's tables are not the hypervisor's to write.
        return match kind {
            VmType::TrustDomain => 0,
            VmType::Default | VmType::SoftwareProtected => {
                sub_pages(second_stage).map_or(0, |capability| capability.value)
            }
        };
    }
    let private = [kvm::KVM_CAP_MEMORY_ATTRIBUTES, kvm::KVM_CAP_GUEST_MEMFD];
    if private.iter().any(|known| u64::from(*known) == number) && !kind.has_private_memory() {
        return 0;
    }
    if kind == VmType::TrustDomain {
        // Nobody outside sees or sets the guest's registers, and there is no emulator that would
        // carry out a write to read-only memory.
        let hidden = [kvm::KVM_CAP_SYNC_REGS, kvm::KVM_CAP_READONLY_MEM];
        if hidden.iter().any(|known| u64::from(*known) == number) {
            return 0;
        }
        if number == u64::from(kvm::KVM_CAP_MAX_VCPUS) {
            return max_vcpus(kind);
        }
    }
    check(number)
}

/// How many vCPUs a VM may have. The TDX module allows as many as there are processors.
pub(crate) fn max_vcpus(kind: VmType) -> u32 {
    match kind {
        VmType::TrustDomain => recommended_vcpus(),
        VmType::Default | VmType::SoftwareProtected => MAX_VCPUS,
    }
}

fn vm_types() -> u32 {
    VmType::supported(Kind::from_environment())
}

/// What `KVM_CHECK_EXTENSION` answers for a number on the system.
pub fn check(number: u64) -> u32 {
    if number == u64::from(kvm::KVM_CAP_NR_VCPUS) {
        return recommended_vcpus();
    }
    if number == u64::from(kvm::KVM_CAP_VM_TYPES) {
        return vm_types();
    }
    if number == u64::from(spp::KVM_CAP_X86_SPP) {
        return sub_pages(Kind::from_environment()).map_or(0, |capability| capability.value);
    }
    CAPABILITIES
        .iter()
        .find(|capability| u64::from(capability.number) == number)
        .map_or(0, |capability| capability.value)
}

/// How many vCPUs a VM should have at most: as many as there are processors, and no fewer than
/// programs take for granted (KVM's documentation names 4 where the capability is missing).
fn recommended_vcpus() -> u32 {
    let online = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(online)
        .unwrap_or(MAX_VCPUS)
        .clamp(4, MAX_VCPUS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_kvms() {
        assert_eq!(check(kvm::KVM_CAP_MAX_VCPUS.into()), 1024);
        assert_eq!(check(kvm::KVM_CAP_MAX_VCPU_ID.into()), 4096);
        assert_eq!(check(kvm::KVM_CAP_NR_MEMSLOTS.into()), 32764);
        assert!(check(kvm::KVM_CAP_NR_VCPUS.into()) >= 4);
    }

    #[test]
    fn unknown_capabilities_answer_zero() {
        assert_eq!(check(696_969), 0);
        assert_eq!(check(u64::MAX), 0);
        assert_eq!(check(u64::from(kvm::KVM_CAP_USER_MEMORY) | 1 << 32), 0);
        assert_eq!(check(kvm::KVM_CAP_S390_GMAP.into()), 0);
    }

    #[test]
    fn a_vm_has_private_memory_if_its_type_does() {
        for number in [kvm::KVM_CAP_MEMORY_ATTRIBUTES, kvm::KVM_CAP_GUEST_MEMFD] {
            assert_eq!(check_vm(VmType::Default, Kind::Ept, number.into()), 0);
            assert_ne!(
                check_vm(VmType::SoftwareProtected, Kind::Ept, number.into()),
                0
            );
            assert_ne!(check(number.into()), 0);
        }
        let types = check_vm(VmType::Default, Kind::Ept, kvm::KVM_CAP_VM_TYPES.into());
        assert_eq!(types, VmType::supported(Kind::from_environment()));
        assert_eq!(types & 0b11, 0b11);
    }

    #[test]
    fn sub_pages_are_protected_with_ept_only() {
        let number = u64::from(spp::KVM_CAP_X86_SPP);
        assert_eq!(check_vm(VmType::Default, Kind::Ept, number), 512);
        assert_eq!(check_vm(VmType::Default, Kind::Npt, number), 0);
        assert_eq!(check_vm(VmType::TrustDomain, Kind::Ept, number), 0);
    }

    #[test]
    fn no_capability_is_listed_twice_or_with_zero() {
        let all: Vec<_> = all().collect();
        assert!(all.windows(2).all(|pair| pair[0].number < pair[1].number));
        assert!(all.iter().all(|capability| capability.value != 0));
    }
}
