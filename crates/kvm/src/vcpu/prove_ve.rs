//! The mode that proves that no virtualization exception reaches a normal guest (KVM's
//! `CONFIG_KVM_INTEL_PROVE_VE`).
//!
//! Every empty entry of the tables has bit 63 set, so that an EPT violation always leaves the guest.
//! With the control "EPT-violation #VE" on, an entry that lacks the bit shows: the processor raises
//! #VE, which leaves for the hypervisor too, and is a bug of the MMU.

use super::{Vcpu, VcpuState};
use crate::parameter;
use crate::second_stage::Kind;
use crate::vm::Vm;
use rustix::io::Errno;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use twofold_arch::{Hpa, Level};
use twofold_cpu::{VeControl, VeInfo};

/// The page that a processor writes to when it raises #VE.
#[repr(align(4096))]
struct Page([AtomicU64; 512]);

/// A processor's information page.
pub(super) struct VePage(Box<Page>);

impl VePage {
    fn new() -> Self {
        Self(Box::new(Page([const { AtomicU64::new(0) }; 512])))
    }

    /// What the processor is told: the page, and to leave.
    fn control(&self) -> VeControl {
        VeControl {
            page: Hpa::new(self.0.0.as_ptr().expose_provenance() as u64),
            intercept: true,
        }
    }

    /// Lets the processor raise the next.
    fn release(&self) {
        // Reason and busy word.
        self.0.0[0].store(0, Ordering::Relaxed);
    }
}

/// Whether the vCPUs of a VM are to prove it: they are if the parameter says so, and if their
/// processor has #VE and it means nothing else.
pub(super) fn wanted(vm: &Vm) -> bool {
    vm.second_stage() == Kind::Ept && vm.td().is_none() && parameter::PROVE_VE.is_on()
}

impl VcpuState {
    /// From now on an entry without bit 63 that ends a walk is noticed.
    pub(super) fn prove_ve(&mut self) {
        let page = VePage::new();
        self.cpu.set_ve(Some(page.control()));
        self.ve_page = Some(page);
    }
}

impl Vcpu {
    /// A #VE in a normal guest: reported with the walk that led to it.
    pub(super) fn unexpected_ve(&self, state: &VcpuState, info: &VeInfo) -> Errno {
        tracing::error!(
            vcpu = self.core.id,
            rip = format_args!("{:#x}", state.rip()),
            gpa = %info.gpa,
            gla = format_args!("{:#x}", info.gla),
            qualification = format_args!("{:#x}", info.qualification),
            walk = describe(&state.cpu.second_stage_walk(info.gpa)),
            "the tables let a violation of a normal guest become #VE: this is a bug of Twofold"
        );
        if let Some(page) = &state.ve_page {
            page.release();
        }
        Errno::IO
    }
}

/// The entries of a walk, from the root down.
fn describe(walk: &[(Level, u64)]) -> String {
    let mut text = String::new();
    for (level, entry) in walk {
        let separator = if text.is_empty() { "" } else { ", " };
        // Writing to a string does not fail.
        let _ = write!(text, "{separator}{level} {entry:#018x}");
    }
    text
}

#[cfg(test)]
#[expect(unsafe_code)]
// UNSAFETY: changes an entry of the tables behind the MMU's back.
mod tests {
    use super::*;
    use crate::kvm::Kvm;
    use kvm_bindings::kvm_userspace_memory_region2;
    use std::sync::Arc;
    use twofold_arch::ept::ADDRESS_MASK;
    use twofold_arch::{Gpa, PAGE_SIZE};
    use twofold_cpu::Exit;

    const GUEST_BYTES: usize = 0x10000;
    const DATA: u64 = 0x8000;

    #[repr(align(4096))]
    struct Memory([u8; GUEST_BYTES]);

    /// A vCPU in protected mode that halts, and then reads from a page that it has not touched.
    fn guest(memory: &mut Memory) -> (Arc<Vm>, Vcpu) {
        // hlt; mov al, [0x8000]; hlt
        memory.0[0x1000..0x1005].copy_from_slice(&[0xf4, 0xa0, 0x00, 0x80, 0xf4]);
        let vm = Kvm.create_vm(0).unwrap();
        vm.set_user_memory_region(&kvm_userspace_memory_region2 {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: GUEST_BYTES as u64,
            userspace_addr: memory.0.as_mut_ptr().expose_provenance() as u64,
            ..Default::default()
        })
        .unwrap();
        let (vcpu, _file) = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        sregs.cr0 |= 1;
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs();
        regs.rip = 0x1000;
        vcpu.set_regs(&regs);
        (vm, vcpu)
    }

    /// Runs to the HLT before `rip`.
    fn halts_before(vcpu: &Vcpu, rip: u64) -> bool {
        vcpu.run().is_ok() && vcpu.get_regs().rip == rip
    }

    #[test]
    fn a_guest_whose_tables_are_right_runs_as_ever() {
        let mut memory = Box::new(Memory([0; GUEST_BYTES]));
        let (_vm, vcpu) = guest(&mut memory);
        vcpu.state().prove_ve();
        assert!(halts_before(&vcpu, 0x1001));
        assert!(halts_before(&vcpu, 0x1005));
    }

    #[test]
    fn an_empty_entry_without_bit_63_is_reported_and_only_in_this_mode() {
        for proved in [false, true] {
            let mut memory = Box::new(Memory([0; GUEST_BYTES]));
            let (_vm, vcpu) = guest(&mut memory);
            if proved {
                vcpu.state().prove_ve();
            } else {
                vcpu.state().cpu.set_ve(None);
            }
            assert!(halts_before(&vcpu, 0x1001));
            let walk = vcpu.state().cpu.second_stage_walk(Gpa::new(DATA));
            let [.., (_, table), (Level::L4K, empty)] = walk[..] else {
                panic!("{walk:x?}");
            };
            assert_eq!(empty, 1 << 63);
            let table = (table & ADDRESS_MASK) as usize + (DATA / PAGE_SIZE) as usize * 8;
            // SAFETY: an entry of a table that the vCPU's root leads to; nobody runs.
            unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(table)) }
                .store(0, Ordering::Relaxed);
            if proved {
                // The second is found as well as the first.
                assert_eq!(vcpu.run(), Err(Errno::IO));
                assert_eq!(vcpu.run(), Err(Errno::IO));
            } else {
                let exit = vcpu.state().cpu.run();
                assert!(matches!(exit, Exit::SecondStage(_)), "{exit:?}");
            }
        }
    }

    #[test]
    fn a_report_names_every_entry_by_its_level() {
        let walk = [(Level::L512G, 0x1007), (Level::L4K, 0)];
        assert_eq!(
            describe(&walk),
            "512G 0x0000000000001007, 4K 0x0000000000000000"
        );
    }
}
