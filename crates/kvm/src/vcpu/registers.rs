//! General, segment and control registers: `KVM_GET_REGS`, `KVM_SET_SREGS` and their family.

use super::VcpuState;
use crate::cpuid;
use kvm_bindings::{
    KVM_NR_INTERRUPTS, KVM_SREGS2_FLAGS_PDPTRS_VALID, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs,
    kvm_sregs2,
};
use rustix::io::Errno;
use twofold_cpu::state::{cr0, cr4, efer, gpr, rflags};
use twofold_cpu::xsave;
use twofold_cpu::{Registers, Segment, SystemRegisters, TableRegister};

impl VcpuState {
    /// `KVM_GET_REGS`
    pub(super) fn regs(&self) -> kvm_regs {
        let Registers { gpr, rip, rflags } = self.cpu.registers();
        kvm_regs {
            rax: gpr[gpr::RAX],
            rbx: gpr[gpr::RBX],
            rcx: gpr[gpr::RCX],
            rdx: gpr[gpr::RDX],
            rsi: gpr[gpr::RSI],
            rdi: gpr[gpr::RDI],
            rsp: gpr[gpr::RSP],
            rbp: gpr[gpr::RBP],
            r8: gpr[8],
            r9: gpr[9],
            r10: gpr[10],
            r11: gpr[11],
            r12: gpr[12],
            r13: gpr[13],
            r14: gpr[14],
            r15: gpr[15],
            rip,
            rflags,
        }
    }

    /// `KVM_SET_REGS`. An exception that was pending is dropped; one that was injected stays.
    pub(super) fn set_regs(&mut self, regs: &kvm_regs) {
        let mut gpr = [0; 16];
        gpr[gpr::RAX] = regs.rax;
        gpr[gpr::RBX] = regs.rbx;
        gpr[gpr::RCX] = regs.rcx;
        gpr[gpr::RDX] = regs.rdx;
        gpr[gpr::RSI] = regs.rsi;
        gpr[gpr::RDI] = regs.rdi;
        gpr[gpr::RSP] = regs.rsp;
        gpr[gpr::RBP] = regs.rbp;
        gpr[8..].copy_from_slice(&[
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ]);
        let events = self.cpu.events();
        self.cpu.set_registers(&Registers {
            gpr,
            rip: regs.rip,
            rflags: regs.rflags | rflags::ONE,
        });
        if self.exception_injected && events.exception.is_some() {
            self.cpu.set_events(&events);
        }
    }

    /// `KVM_GET_SREGS`
    pub(super) fn sregs(&self) -> kvm_sregs {
        let system = self.cpu.system_registers();
        let mut interrupt_bitmap = [0; 4];
        if let Some(vector) = self.cpu.events().interrupt {
            interrupt_bitmap[usize::from(vector) / 64] = 1 << (vector % 64);
        }
        kvm_sregs {
            cs: segment_to_user(&system.cs),
            ds: segment_to_user(&system.ds),
            es: segment_to_user(&system.es),
            fs: segment_to_user(&system.fs),
            gs: segment_to_user(&system.gs),
            ss: segment_to_user(&system.ss),
            tr: segment_to_user(&system.tr),
            ldt: segment_to_user(&system.ldt),
            gdt: table_to_user(system.gdt),
            idt: table_to_user(system.idt),
            cr0: system.cr0,
            cr2: system.cr2,
            cr3: system.cr3,
            cr4: system.cr4,
            cr8: system.cr8,
            efer: system.efer,
            apic_base: self.apic_base,
            interrupt_bitmap,
        }
    }

    /// `KVM_SET_SREGS`: `EINVAL` for a state that no processor can be in.
    pub(super) fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), Errno> {
        self.set_system(&system_from_user(sregs), sregs.apic_base)?;
        let interrupt = (0..KVM_NR_INTERRUPTS as usize)
            .find(|vector| sregs.interrupt_bitmap[vector / 64] >> (vector % 64) & 1 == 1);
        if let Some(vector) = interrupt {
            self.cpu.inject_interrupt(vector as u8);
        }
        Ok(())
    }

    /// `KVM_GET_SREGS2`. The guest's PDPTEs are never kept apart from memory, so none are valid.
    pub(super) fn sregs2(&self) -> kvm_sregs2 {
        let sregs = self.sregs();
        kvm_sregs2 {
            cs: sregs.cs,
            ds: sregs.ds,
            es: sregs.es,
            fs: sregs.fs,
            gs: sregs.gs,
            ss: sregs.ss,
            tr: sregs.tr,
            ldt: sregs.ldt,
            gdt: sregs.gdt,
            idt: sregs.idt,
            cr0: sregs.cr0,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            cr8: sregs.cr8,
            efer: sregs.efer,
            apic_base: sregs.apic_base,
            flags: 0,
            pdptrs: [0; 4],
        }
    }

    /// `KVM_SET_SREGS2`: `EINVAL` for an unknown flag, for PDPTEs outside PAE paging, and as
    /// [`Self::set_sregs`].
    pub(super) fn set_sregs2(&mut self, sregs: &kvm_sregs2) -> Result<(), Errno> {
        let valid = u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID);
        let pae =
            sregs.cr0 & cr0::PG != 0 && sregs.cr4 & cr4::PAE != 0 && sregs.efer & efer::LMA == 0;
        if sregs.flags & !valid != 0 || sregs.flags & valid != 0 && !pae {
            return Err(Errno::INVAL);
        }
        let system = system_from_user(&kvm_sregs {
            cs: sregs.cs,
            ds: sregs.ds,
            es: sregs.es,
            fs: sregs.fs,
            gs: sregs.gs,
            ss: sregs.ss,
            tr: sregs.tr,
            ldt: sregs.ldt,
            gdt: sregs.gdt,
            idt: sregs.idt,
            cr0: sregs.cr0,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            cr8: sregs.cr8,
            efer: sregs.efer,
            apic_base: sregs.apic_base,
            interrupt_bitmap: [0; 4],
        });
        self.set_system(&system, sregs.apic_base)
    }

    fn set_system(&mut self, system: &SystemRegisters, apic_base: u64) -> Result<(), Errno> {
        if !self.is_possible(system) || !self.takes_base(apic_base, false) {
            return Err(Errno::INVAL);
        }
        self.set_base(apic_base);
        self.cpu.set_system_registers(system);
        Ok(())
    }

    /// Whether a processor can be in this state, as KVM asks it: the mode bits agree, and no bit is
    /// set that the vCPU's CPUID does not offer.
    fn is_possible(&self, system: &SystemRegisters) -> bool {
        let SystemRegisters {
            cr0,
            cr3,
            cr4,
            efer,
            ..
        } = *system;
        if cr0 & cr0::PG != 0 && efer & efer::LME != 0 {
            if cr4 & cr4::PAE == 0 || efer & efer::LMA == 0 {
                return false;
            }
            if cr3 >> cpuid::GUEST_ADDRESS_BITS != 0 {
                return false;
            }
        } else if efer & efer::LMA != 0 || system.cs.long {
            return false;
        }
        if cr0 >> 32 != 0
            || cr0 & cr0::NW != 0 && cr0 & cr0::CD == 0
            || cr0 & cr0::PG != 0 && cr0 & cr0::PE == 0
        {
            return false;
        }
        cr4 & !self.cr4_offered() == 0
    }

    /// The bits of CR4 that the vCPU's CPUID table offers; before it gets one, those that KVM offers.
    fn cr4_offered(&self) -> u64 {
        // The legacy extensions are in every processor that KVM knows.
        let allowed = self.cpu.cr4_allowed() | cr4::VME | cr4::PVI;
        // Until the program has chosen, what it is offered counts.
        if self.cpuid.is_empty() && !xsave::host_has_pkru() {
            allowed & !cr4::PKE
        } else {
            allowed
        }
    }
}

fn system_from_user(sregs: &kvm_sregs) -> SystemRegisters {
    SystemRegisters {
        cs: segment_from_user(&sregs.cs),
        ds: segment_from_user(&sregs.ds),
        es: segment_from_user(&sregs.es),
        fs: segment_from_user(&sregs.fs),
        gs: segment_from_user(&sregs.gs),
        ss: segment_from_user(&sregs.ss),
        tr: segment_from_user(&sregs.tr),
        ldt: segment_from_user(&sregs.ldt),
        gdt: TableRegister {
            base: sregs.gdt.base,
            limit: sregs.gdt.limit,
        },
        idt: TableRegister {
            base: sregs.idt.base,
            limit: sregs.idt.limit,
        },
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8 & 0xf,
        efer: sregs.efer & (efer::SCE | efer::LME | efer::LMA | efer::NXE),
    }
}

fn segment_from_user(segment: &kvm_segment) -> Segment {
    Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        kind: segment.type_ & 0xf,
        dpl: segment.dpl & 3,
        code_or_data: segment.s & 1 != 0,
        present: segment.present & 1 != 0,
        available: segment.avl & 1 != 0,
        long: segment.l & 1 != 0,
        big: segment.db & 1 != 0,
        granular: segment.g & 1 != 0,
        unusable: segment.unusable & 1 != 0,
    }
}

fn segment_to_user(segment: &Segment) -> kvm_segment {
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: segment.kind,
        present: segment.present.into(),
        dpl: segment.dpl,
        db: segment.big.into(),
        s: segment.code_or_data.into(),
        l: segment.long.into(),
        g: segment.granular.into(),
        avl: segment.available.into(),
        unusable: segment.unusable.into(),
        padding: 0,
    }
}

fn table_to_user(table: TableRegister) -> kvm_dtable {
    kvm_dtable {
        base: table.base,
        limit: table.limit,
        padding: [0; 3],
    }
}
