//! Exits about memory: what the MMU makes of them, and what the program is told.

use super::run::Next;
use super::trust_domain::without_shared_bit;
use super::{Vcpu, VcpuState};
use crate::trace;
use kvm_bindings::KVM_MEMORY_EXIT_FLAG_PRIVATE;
use rustix::io::Errno;
use std::sync::atomic::Ordering;
use twofold_arch::qualification::Qualification;
use twofold_arch::{Gpa, PAGE_SIZE, Pferr};
use twofold_cpu::{Exception, SecondStageFault, vector};
use twofold_mmu::{Fault, FaultError, Outcome};

impl Vcpu {
    pub(super) fn second_stage_fault(
        &self,
        state: &mut VcpuState,
        fault: SecondStageFault,
    ) -> Result<Next, Errno> {
        let (gpa, error) = match fault {
            SecondStageFault::EptViolation {
                gpa, qualification, ..
            } => (
                gpa,
                Qualification::from_bits_truncate(qualification).to_pferr(),
            ),
            SecondStageFault::EptMisconfiguration { gpa } => (gpa, Pferr::RSVD),
            SecondStageFault::NestedPageFault { gpa, error } => {
                (gpa, Pferr::from_bits_truncate(error))
            }
            SecondStageFault::SpptMiss { gpa, .. } => return self.sub_page_miss(state, gpa),
            SecondStageFault::SpptMisconfiguration { gpa, gla } => {
                return Ok(self.sub_page_misconfiguration(gpa, gla));
            }
        };
        let (gpa, error) = match self.vm.td() {
            None => (gpa, error),
            Some(td) => without_shared_bit(td, gpa, error),
        };
        let counters = &self.core.counters;
        counters.pf_taken.increment();
        if error.is_write() {
            counters.write_faults.increment();
        } else if error.is_fetch() {
            counters.fetch_faults.increment();
        } else {
            counters.read_faults.increment();
        }
        let VcpuState {
            reader,
            root,
            td_roots,
            ..
        } = state;
        tracing::trace!(target: trace::TARGET, vcpu = self.core.id, %gpa, ?error, "fault");
        let (tables, access) = (self.vm.tables(), Fault { gpa, error });
        let outcome = match (root, td_roots) {
            (Some(root), _) => tables.fault(reader, root, access),
            // A TD that is entered again and again for the same access looks like one that is being
            // stepped; so whoever is in the way is waited for out here.
            (None, Some(roots)) => loop {
                let outcome = tables.td_fault(reader, roots, access);
                let private = error.contains(Pferr::PRIVATE_ACCESS);
                let wanted = self.core.signalled.load(Ordering::Relaxed);
                if outcome != Ok(Outcome::Retry) || !private || wanted {
                    break outcome;
                }
                rustix::thread::sched_yield();
            },
            (None, None) => return Ok(Next::Enter),
        };
        tracing::trace!(target: trace::TARGET, vcpu = self.core.id, ?outcome, "fault ended");
        let resolved = reader.stats();
        counters.pf_fast.set(resolved.pf_fast);
        counters
            .pf_mmio_spte_created
            .set(resolved.pf_mmio_spte_created);
        match outcome {
            Ok(Outcome::Fixed { level }) => {
                counters.pf_fixed.increment();
                if let Some(mapped) = counters.mapped.get(usize::from(level.number()) - 1) {
                    mapped.increment();
                }
            }
            Ok(Outcome::Spurious) => counters.pf_spurious.increment(),
            Ok(Outcome::Retry) => {}
            Ok(Outcome::ObsoleteRoot) => (state.root, state.td_roots) = (None, None),
            Ok(Outcome::SubPageDenied) => {
                counters.pf_emulate.increment();
                if self.vm.td().is_some() {
                    // The guest hears of it by #VE, now that there is an entry that says so.
                    return Ok(Next::Enter);
                }
                return Ok(self.sub_page_denied(state, gpa, error));
            }
            Ok(Outcome::Mmio) => {
                counters.pf_emulate.increment();
                return Ok(self.no_memory(state, gpa, error, fault));
            }
            Err(FaultError::Interrupted) => return Err(self.interrupted()),
            Err(FaultError::OutOfMemory) => return Err(Errno::NOMEM),
            Err(FaultError::BadHostMemory) => return Err(self.memory_fault(gpa, false)),
            Err(FaultError::WrongKind { private }) => return Err(self.memory_fault(gpa, private)),
            Err(FaultError::BadPrivateMemory) => return Err(self.memory_fault(gpa, true)),
            Err(FaultError::Bugged) => return Err(Errno::IO),
            Err(error @ (FaultError::Poisoned | FaultError::PoisonedPrivate)) => {
                self.memory_fault(gpa, error == FaultError::PoisonedPrivate);
                return Err(Errno::HWPOISON);
            }
        }
        Ok(Next::Enter)
    }

    /// `KVM_EXIT_MEMORY_FAULT`: the guest's access to a page cannot be carried out.
    fn memory_fault(&self, gpa: Gpa, private: bool) -> Errno {
        let flags = match private {
            true => u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE),
            false => 0,
        };
        let page = gpa.get() & !(PAGE_SIZE - 1);
        self.core.run.set_memory_fault(flags, page, PAGE_SIZE);
        Errno::FAULT
    }

    /// The guest accessed an address without memory: data accesses are the program's to emulate,
    /// code and page tables cannot be.
    fn no_memory(
        &self,
        state: &mut VcpuState,
        gpa: Gpa,
        error: Pferr,
        fault: SecondStageFault,
    ) -> Next {
        if error.contains(Pferr::GUEST_PAGE) {
            // KVM's own walk finds no table there either, and gives the guest a page fault.
            if let SecondStageFault::EptViolation { gla, .. } = fault {
                let user = if state.is_user() {
                    Pferr::USER.bits() as u32
                } else {
                    0
                };
                state.cpu.queue_exception(Exception {
                    vector: vector::PF,
                    error_code: Some(user),
                    payload: Some(gla),
                });
                return Next::Enter;
            }
        } else if !error.is_fetch() {
            state.cpu.allow_mmio(gpa);
            return Next::Enter;
        }
        tracing::warn!(
            vcpu = self.core.id,
            rip = state.rip(),
            gpa = %gpa,
            "the guest's code or page tables are where there is no memory"
        );
        self.emulation_failure(&[])
    }

    /// Host memory vanished under a guest access, behind the calls that announce it. What is mapped
    /// there is dropped, so that the access faults again and finds out what became of it; if it
    /// ends here a second time without an instruction in between, the memory cannot be used.
    pub(super) fn host_fault(&self, state: &mut VcpuState, hva: u64) -> Result<Next, Errno> {
        let now = (hva & !(PAGE_SIZE - 1), state.cpu.counters().instructions);
        if state.last_host_fault.replace(now) == Some(now) {
            tracing::warn!(
                vcpu = self.core.id,
                hva = format_args!("{hva:#x}"),
                "host memory is gone"
            );
            return Err(Errno::FAULT);
        }
        let tables = self.vm.tables();
        tables.end_host_change(tables.begin_host_change(now.0..now.0 + PAGE_SIZE));
        Ok(Next::Enter)
    }
}
