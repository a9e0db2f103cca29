//! What a program enables for a VM: `KVM_ENABLE_CAP`.

use super::Vm;
use crate::capability;
use crate::irqchip::Model;
use crate::vm_type::VmType;
use kvm_bindings as kvm;
use kvm_bindings::kvm_enable_cap;
use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use twofold_abi::spp;

bitflags::bitflags! {
    /// Hypercalls that leave the guest for the program (`KVM_CAP_EXIT_HYPERCALL`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct HypercallExits: u32 {
        const MAP_GPA_RANGE = 1 << 12;
    }
}

/// Pins that a split interrupt controller may reserve (`MAX_NR_RESERVED_IOAPIC_PINS`).
const MAX_RESERVED_PINS: u64 = 4096;

/// What running vCPUs ask of it.
pub(super) struct Options {
    exception_payload: AtomicBool,
    /// `KVM_MSR_EXIT_REASON_*` that leave the guest.
    msr_exits: AtomicU32,
    hides_platform_info: AtomicBool,
    hypercall_exits: AtomicU32,
    halts_in_guest: AtomicBool,
    /// Nanoseconds of the local APICs' bus clock's cycle.
    apic_cycle: AtomicU64,
    /// The program's formats have APIC ids of 32 bits.
    wide_apic_ids: AtomicBool,
    /// A bus that names APIC 0xff does not mean everybody in x2APIC mode.
    plain_broadcasts: AtomicBool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            exception_payload: AtomicBool::new(false),
            msr_exits: AtomicU32::new(0),
            hides_platform_info: AtomicBool::new(false),
            hypercall_exits: AtomicU32::new(0),
            halts_in_guest: AtomicBool::new(false),
            apic_cycle: AtomicU64::new(1),
            wide_apic_ids: AtomicBool::new(false),
            plain_broadcasts: AtomicBool::new(false),
        }
    }
}

impl Vm {
    /// Whether HLT of a guest is not the program's to hear of, or to emulate.
    pub(crate) fn halts_in_guest(&self) -> bool {
        self.options.halts_in_guest.load(Ordering::Relaxed)
    }

    /// Nanoseconds of a cycle of the bus clock that the local APICs' timers count.
    pub(crate) fn apic_cycle(&self) -> u64 {
        self.options.apic_cycle.load(Ordering::Relaxed)
    }

    /// `KVM_CAP_X86_APIC_BUS_CYCLES_NS`: `ENXIO` without local APICs, `EINVAL` for no time at all or
    /// one that makes the longest count too long, and once there are vCPUs.
    fn set_apic_cycle(&self, nanoseconds: u64) -> Result<(), Errno> {
        const LONGEST_COUNT: u64 = u32::MAX as u64 * 128;
        if self.irqchip_model() == Model::None {
            return Err(Errno::NXIO);
        }
        if nanoseconds == 0 || nanoseconds.checked_mul(LONGEST_COUNT).is_none() {
            return Err(Errno::INVAL);
        }
        self.before_vcpus(|| {
            self.options
                .apic_cycle
                .store(nanoseconds, Ordering::Relaxed)
        })
    }

    /// Whether 0xff is the id of one APIC in x2APIC mode for buses too.
    pub(crate) fn plain_broadcasts(&self) -> bool {
        self.options.plain_broadcasts.load(Ordering::Relaxed)
    }

    /// Whether APIC ids have 32 bits in what the program and the kernel exchange.
    pub(crate) fn wide_apic_ids(&self) -> bool {
        self.options.wide_apic_ids.load(Ordering::Relaxed)
    }

    #[inline]
    pub(crate) fn exception_payload(&self) -> bool {
        self.options.exception_payload.load(Ordering::Relaxed)
    }

    /// Whether a failed RDMSR or WRMSR leaves the guest for this reason.
    pub(crate) fn exits_for_msr(&self, reason: u32) -> bool {
        self.options.msr_exits.load(Ordering::Relaxed) & reason != 0
    }

    /// Whether the guest may not read MSR_PLATFORM_INFO.
    pub(crate) fn hides_platform_info(&self) -> bool {
        self.options.hides_platform_info.load(Ordering::Relaxed)
    }

    pub(crate) fn hypercall_exits(&self) -> HypercallExits {
        HypercallExits::from_bits_truncate(self.options.hypercall_exits.load(Ordering::Relaxed))
    }

    /// `KVM_CAP_MAX_VCPU_ID`: lowers the limit of vCPU ids, once.
    fn limit_vcpu_ids(&self, limit: u64) -> Result<(), Errno> {
        let mut config = self.config.lock();
        let limit = u32::try_from(limit)
            .ok()
            .filter(|limit| *limit <= capability::MAX_VCPU_ID && self.boot_cpu_id() <= *limit)
            .ok_or(Errno::INVAL)?;
        if limit == 0 || config.max_vcpu_ids.is_some_and(|fixed| fixed != limit) {
            return Err(Errno::INVAL);
        }
        config.max_vcpu_ids = Some(limit);
        Ok(())
    }

    /// `KVM_CAP_VM_DISABLE_NX_HUGE_PAGES`. Where processors have the erratum, a guest without
    /// the mitigation can stop the machine; so the program must be allowed to reboot it.
    fn disable_nx_huge_pages(&self, argument: u64) -> Result<(), Errno> {
        let capabilities = rustix::thread::capabilities(None)?;
        if !capabilities.effective.contains(CapabilitySet::SYS_BOOT) {
            return Err(Errno::PERM);
        }
        if argument != 0 {
            return Err(Errno::INVAL);
        }
        self.tables.disable_nx_huge_pages();
        Ok(())
    }

    /// `KVM_ENABLE_CAP` on a VM.
    ///
    /// # Errors
    /// `EINVAL` for flags, for capabilities that cannot be enabled, and for arguments that are out
    /// of range; for an interrupt controller as [`Self::create_irqchip`]; for sub-page permissions
    /// `ENODEV`, `EPERM`, `ENOMEM`.
    pub fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<(), Errno> {
        if cap.flags != 0 {
            return Err(Errno::INVAL);
        }
        let argument = cap.args[0];
        match cap.cap {
            kvm::KVM_CAP_DISABLE_QUIRKS2 | kvm::KVM_CAP_DISABLE_QUIRKS => {
                if cap.cap == kvm::KVM_CAP_DISABLE_QUIRKS2
                    && argument & !u64::from(capability::VALID_QUIRKS) != 0
                {
                    return Err(Errno::INVAL);
                }
                let zap_all = argument & u64::from(kvm::KVM_X86_QUIRK_SLOT_ZAP_ALL) == 0;
                // The quirk is one of the default type.
                self.tables
                    .set_slot_zap_all(zap_all && self.vm_type == VmType::Default);
                Ok(())
            }
            kvm::KVM_CAP_SPLIT_IRQCHIP => {
                if argument > MAX_RESERVED_PINS {
                    return Err(Errno::INVAL);
                }
                self.create_split_irqchip(argument as u32)
            }
            kvm::KVM_CAP_X86_DISABLE_EXITS => {
                if argument & !u64::from(capability::DISABLED_EXITS) != 0 {
                    return Err(Errno::INVAL);
                }
                if argument & u64::from(kvm::KVM_X86_DISABLE_EXITS_HLT) != 0 {
                    self.options.halts_in_guest.store(true, Ordering::Relaxed);
                }
                Ok(())
            }
            kvm::KVM_CAP_X86_APIC_BUS_CYCLES_NS => self.set_apic_cycle(argument),
            kvm::KVM_CAP_X2APIC_API => {
                if argument & !u64::from(capability::X2APIC_FORMATS) != 0 {
                    return Err(Errno::INVAL);
                }
                if argument & u64::from(kvm::KVM_X2APIC_API_USE_32BIT_IDS) != 0 {
                    self.options.wide_apic_ids.store(true, Ordering::Relaxed);
                }
                if argument & u64::from(kvm::KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK) != 0 {
                    self.options.plain_broadcasts.store(true, Ordering::Relaxed);
                }
                Ok(())
            }
            kvm::KVM_CAP_MAX_VCPU_ID => self.limit_vcpu_ids(argument),
            kvm::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => self.set_manual_protect(argument),
            kvm::KVM_CAP_DIRTY_LOG_RING | kvm::KVM_CAP_DIRTY_LOG_RING_ACQ_REL => {
                self.enable_dirty_ring(argument)
            }
            kvm::KVM_CAP_VM_DISABLE_NX_HUGE_PAGES => self.disable_nx_huge_pages(argument),
            kvm::KVM_CAP_EXCEPTION_PAYLOAD => {
                self.options
                    .exception_payload
                    .store(argument != 0, Ordering::Relaxed);
                Ok(())
            }
            kvm::KVM_CAP_X86_USER_SPACE_MSR => {
                if argument & !u64::from(kvm::KVM_MSR_EXIT_REASON_VALID_MASK) != 0 {
                    return Err(Errno::INVAL);
                }
                self.options
                    .msr_exits
                    .store(argument as u32, Ordering::Relaxed);
                Ok(())
            }
            kvm::KVM_CAP_MSR_PLATFORM_INFO => {
                self.options
                    .hides_platform_info
                    .store(argument == 0, Ordering::Relaxed);
                Ok(())
            }
            kvm::KVM_CAP_EXIT_HYPERCALL => {
                if argument & !u64::from(HypercallExits::all().bits()) != 0 {
                    return Err(Errno::INVAL);
                }
                self.options
                    .hypercall_exits
                    .store(argument as u32, Ordering::Relaxed);
                Ok(())
            }
            // Every failure exits here, whatever the program says.
            kvm::KVM_CAP_EXIT_ON_EMULATION_FAILURE if argument <= 1 => Ok(()),
            spp::KVM_CAP_X86_SPP => self.enable_sub_pages(&cap.args),
            _ => Err(Errno::INVAL),
        }
    }
}
