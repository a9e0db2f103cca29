//! The page that a vCPU and its program share: `struct kvm_run`, and the data of port I/O.
//!
//! The program maps it from the vCPU's descriptor: page 0 is `struct kvm_run`, page 1 holds the
//! data of port I/O (`KVM_PIO_PAGE_OFFSET`), page 2 shows the VM's coalesced ring
//! (`KVM_COALESCED_MMIO_PAGE_OFFSET`). A dirty ring, if the VM has them, begins at page 64
//! (`KVM_DIRTY_LOG_PAGE_OFFSET`).

use crate::shared::SharedMemory;
use crate::usercopy::Plain;
use kvm_bindings::{
    KVM_DIRTY_LOG_PAGE_OFFSET, KVM_EXIT_DEBUG, KVM_EXIT_HYPERCALL, KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_IO, KVM_EXIT_IOAPIC_EOI, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_SYSTEM_EVENT,
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_run,
    kvm_run__bindgen_ty_1,
};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::mem::offset_of;
use std::sync::Arc;
use twofold_abi::spp::{KVM_EXIT_SPP, kvm_spp_exit};
use twofold_mmu::{DirtyGfn, RingMemory};

/// Bytes in a page.
const PAGE: usize = 4096;
/// Bytes that `KVM_GET_VCPU_MMAP_SIZE` reports: `kvm_run`, port data, coalesced ring.
pub const VCPU_MMAP_SIZE: usize = 3 * PAGE;
/// Offset of the data of port I/O, in bytes.
pub(crate) const PIO_DATA_OFFSET: usize = PAGE;
/// Bytes of port data that one exit carries at most.
pub(crate) const PIO_DATA_SIZE: usize = PAGE;

/// Offset of the dirty ring, in bytes.
const DIRTY_RING_OFFSET: usize = KVM_DIRTY_LOG_PAGE_OFFSET as usize * PAGE;

const fn ring_bytes(entries: u32) -> usize {
    entries as usize * size_of::<DirtyGfn>()
}

/// Why KVM refuses a mapping of a vCPU's file: `EINVAL` for one that begins or ends in the dirty
/// ring and is private or executable.
pub(crate) fn mapping_check(
    ring_entries: u32,
    offset: u64,
    length: usize,
    shared: bool,
    executable: bool,
) -> Option<Errno> {
    let first = DIRTY_RING_OFFSET as u64;
    let ring = first..first + ring_bytes(ring_entries) as u64;
    let last = offset.saturating_add((length as u64).saturating_sub(1));
    let touches = ring.contains(&offset) || ring.contains(&last);
    (touches && (executable || !shared)).then_some(Errno::INVAL)
}

macro_rules! exit {
    ($($path:tt)*) => {
        offset_of!(kvm_run, __bindgen_anon_1) + offset_of!(kvm_run__bindgen_ty_1, $($path)*)
    };
}

/// Our side of the shared pages.
#[derive(Debug)]
pub(crate) struct RunPage(Arc<SharedMemory>);

/// The vCPU's dirty ring, for the MMU.
pub(crate) struct VcpuRing {
    memory: Arc<SharedMemory>,
    entries: u32,
}

impl RingMemory for VcpuRing {
    #[inline]
    fn entries(&self) -> &[DirtyGfn] {
        self.memory
            .dirty_entries(DIRTY_RING_OFFSET, self.entries as usize)
    }
}

impl RunPage {
    /// The pages of a new vCPU and the file that the program maps them from.
    /// With `ring_entries` there is room for a dirty ring.
    pub(crate) fn new(id: u32, ring_entries: u32) -> Result<(Self, OwnedFd), Errno> {
        let length = match ring_entries {
            0 => VCPU_MMAP_SIZE,
            entries => DIRTY_RING_OFFSET + ring_bytes(entries),
        };
        let (memory, file) = SharedMemory::with_file(&format!("kvm-vcpu:{id}"), length)?;
        Ok((Self(Arc::new(memory)), file))
    }

    /// The dirty ring in these pages, which were made for as many entries.
    pub(crate) fn ring(&self, entries: u32) -> VcpuRing {
        VcpuRing {
            memory: Arc::clone(&self.0),
            entries,
        }
    }

    #[inline]
    pub(crate) fn immediate_exit(&self) -> bool {
        self.0.read::<u8>(offset_of!(kvm_run, immediate_exit)) != 0
    }

    #[inline]
    pub(crate) fn request_interrupt_window(&self) -> bool {
        self.0
            .read::<u8>(offset_of!(kvm_run, request_interrupt_window))
            != 0
    }

    #[inline]
    pub(crate) fn cr8(&self) -> u64 {
        self.0.read(offset_of!(kvm_run, cr8))
    }

    #[inline]
    pub(crate) fn set_exit_reason(&self, reason: u32) {
        self.0.write(offset_of!(kvm_run, exit_reason), reason);
    }

    /// What KVM tells about the vCPU at every exit.
    #[inline]
    pub(crate) fn set_summary(&self, ready: bool, interrupts: bool, cr8: u64, apic_base: u64) {
        let page = &self.0;
        page.write(
            offset_of!(kvm_run, ready_for_interrupt_injection),
            u8::from(ready),
        );
        page.write(offset_of!(kvm_run, if_flag), u8::from(interrupts));
        page.write_bytes(offset_of!(kvm_run, flags), &[0, 0]);
        page.write(offset_of!(kvm_run, cr8), cr8);
        page.write(offset_of!(kvm_run, apic_base), apic_base);
    }

    #[inline]
    pub(crate) fn valid_regs(&self) -> u64 {
        self.0.read(offset_of!(kvm_run, kvm_valid_regs))
    }

    #[inline]
    pub(crate) fn dirty_regs(&self) -> u64 {
        self.0.read(offset_of!(kvm_run, kvm_dirty_regs))
    }

    pub(crate) fn clear_dirty_regs(&self, bits: u64) {
        let offset = offset_of!(kvm_run, kvm_dirty_regs);
        self.0.write(offset, self.0.read::<u64>(offset) & !bits);
    }

    /// One copy of a part of the registers that the program wants set, at `offset` in
    /// `struct kvm_sync_regs`.
    pub(crate) fn sync_regs_part<T: Plain>(&self, offset: usize) -> T {
        self.0.read(offset_of!(kvm_run, s) + offset)
    }

    /// Shows the program a part of the registers.
    pub(crate) fn set_sync_regs_part<T: Plain>(&self, offset: usize, value: T) {
        self.0.write(offset_of!(kvm_run, s) + offset, value);
    }

    #[inline]
    pub(crate) fn set_io(&self, write: bool, size: u8, port: u16, count: u32) {
        let page = &self.0;
        page.write(exit!(io.direction), u8::from(write));
        page.write(exit!(io.size), size);
        page.write_bytes(exit!(io.port), &port.to_le_bytes());
        page.write(exit!(io.count), count);
        page.write(exit!(io.data_offset), PIO_DATA_OFFSET as u64);
        self.set_exit_reason(KVM_EXIT_IO);
    }

    /// Puts the data of an `out` where the program looks for it.
    #[inline]
    pub(crate) fn write_io_data(&self, data: &[u8]) {
        self.0.write_bytes(PIO_DATA_OFFSET, data);
    }

    /// Takes the data of an `in` from where the program left it.
    #[inline]
    pub(crate) fn read_io_data(&self, to: &mut [u8]) {
        self.0.read_bytes(PIO_DATA_OFFSET, to);
    }

    #[inline]
    pub(crate) fn set_mmio(&self, address: u64, data: [u8; 8], length: u32, write: bool) {
        let page = &self.0;
        page.write(exit!(mmio.phys_addr), address);
        page.write_bytes(exit!(mmio.data), &data);
        page.write(exit!(mmio.len), length);
        page.write(exit!(mmio.is_write), u8::from(write));
        self.set_exit_reason(KVM_EXIT_MMIO);
    }

    #[inline]
    pub(crate) fn mmio_data(&self) -> [u8; 8] {
        let mut data = [0; 8];
        self.0.read_bytes(exit!(mmio.data), &mut data);
        data
    }

    /// `KVM_EXIT_INTERNAL_ERROR` with up to 16 words of data.
    pub(crate) fn set_internal_error(&self, suberror: u32, data: &[u64]) {
        let data = &data[..data.len().min(16)];
        self.0.write(exit!(internal.suberror), suberror);
        self.0.write(exit!(internal.ndata), data.len() as u32);
        for (index, word) in data.iter().enumerate() {
            self.0.write(exit!(internal.data) + 8 * index, *word);
        }
        self.set_exit_reason(KVM_EXIT_INTERNAL_ERROR);
    }

    /// `KVM_INTERNAL_ERROR_EMULATION`, with the instruction's bytes where they are known.
    pub(crate) fn set_emulation_failure(&self, instruction: &[u8]) {
        let length = instruction.len().min(15);
        let mut words = [0_u64; 3];
        if length != 0 {
            words[0] = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
            let mut bytes = [0; 16];
            bytes[0] = length as u8;
            bytes[1..=length].copy_from_slice(&instruction[..length]);
            words[1] = u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default());
            words[2] = u64::from_le_bytes(bytes[8..].try_into().unwrap_or_default());
        }
        self.set_internal_error(KVM_INTERNAL_ERROR_EMULATION, &words);
    }

    pub(crate) fn set_debug(&self, exception: u32, pc: u64, dr6: u64, dr7: u64) {
        let page = &self.0;
        page.write(exit!(debug.arch.exception), exception);
        page.write(exit!(debug.arch.pc), pc);
        page.write(exit!(debug.arch.dr6), dr6);
        page.write(exit!(debug.arch.dr7), dr7);
        self.set_exit_reason(KVM_EXIT_DEBUG);
    }

    /// `KVM_EXIT_SPP`, whose structure `kvm-bindings` does not know: at the start of the union.
    pub(crate) fn set_spp(&self, address: u64, instruction_length: u8) {
        let union = offset_of!(kvm_run, __bindgen_anon_1);
        let page = &self.0;
        page.write(union + offset_of!(kvm_spp_exit, addr), address);
        page.write(
            union + offset_of!(kvm_spp_exit, insn_len),
            instruction_length,
        );
        page.write_bytes(union + offset_of!(kvm_spp_exit, pad), &[0; 7]);
        self.set_exit_reason(KVM_EXIT_SPP);
    }

    pub(crate) fn set_memory_fault(&self, flags: u64, address: u64, size: u64) {
        let page = &self.0;
        page.write(exit!(memory_fault.flags), flags);
        page.write(exit!(memory_fault.gpa), address);
        page.write(exit!(memory_fault.size), size);
        self.set_exit_reason(KVM_EXIT_MEMORY_FAULT);
    }

    /// `KVM_EXIT_IOAPIC_EOI`: the interrupt with this vector has ended.
    pub(crate) fn set_end_of_interrupt(&self, vector: u8) {
        self.0.write(exit!(eoi.vector), vector);
        self.set_exit_reason(KVM_EXIT_IOAPIC_EOI);
    }

    /// `KVM_EXIT_SYSTEM_EVENT` with up to 16 words of data.
    pub(crate) fn set_system_event(&self, kind: u32, data: &[u64]) {
        let data = &data[..data.len().min(16)];
        let page = &self.0;
        page.write(exit!(system_event.type_), kind);
        page.write(exit!(system_event.ndata), data.len() as u32);
        for (index, word) in data.iter().enumerate() {
            page.write(exit!(system_event.__bindgen_anon_1) + 8 * index, *word);
        }
        self.set_exit_reason(KVM_EXIT_SYSTEM_EVENT);
    }

    pub(crate) fn set_hypercall(&self, number: u64, arguments: [u64; 3], flags: u64) {
        let page = &self.0;
        page.write(exit!(hypercall.nr), number);
        for index in 0..6 {
            let argument = arguments.get(index).copied().unwrap_or(0);
            page.write(exit!(hypercall.args) + 8 * index, argument);
        }
        page.write(exit!(hypercall.ret), 0_u64);
        page.write(exit!(hypercall.__bindgen_anon_1), flags);
        self.set_exit_reason(KVM_EXIT_HYPERCALL);
    }

    pub(crate) fn hypercall_result(&self) -> u64 {
        self.0.read(exit!(hypercall.ret))
    }

    /// `KVM_EXIT_X86_RDMSR` or `KVM_EXIT_X86_WRMSR`.
    pub(crate) fn set_msr(&self, exit_reason: u32, reason: u32, index: u32, data: u64) {
        let page = &self.0;
        page.write(exit!(msr.error), 0_u8);
        page.write_bytes(exit!(msr.pad), &[0; 7]);
        page.write(exit!(msr.reason), reason);
        page.write(exit!(msr.index), index);
        page.write(exit!(msr.data), data);
        self.set_exit_reason(exit_reason);
    }

    /// The program's answer to an MSR exit: its data, unless it reports an error.
    pub(crate) fn msr_answer(&self) -> Option<u64> {
        (self.0.read::<u8>(exit!(msr.error)) == 0).then(|| self.0.read(exit!(msr.data)))
    }
}
