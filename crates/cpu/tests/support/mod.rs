//! What the tests and the speed measurement build their guests from: memory, a second stage that
//! maps it, a processor on both, and flat segments.
//!
//! Host-physical addresses in the tables are not the process's own, so that nothing comes to depend
//! on their being the same.
#![allow(unsafe_code, dead_code, missing_docs)]
// UNSAFETY: builds a guest's memory.
// Each user needs only a part.

use std::sync::Arc;
use twofold_arch::ept::{EptFlags, Eptp};
use twofold_arch::{Hpa, Level};
use twofold_cpu::{Cpu, Machine, MachineConfig, SecondStage, Segment};

/// What the tables call the first byte of guest memory.
const HPA: u64 = 0x12_3440_0000;
/// Bytes of second-stage tables behind the memory.
const TABLES: usize = 0x4000;
const LARGE: usize = 2 << 20;

/// Guest-physical memory from address 0, and the second-stage tables that map it.
pub(crate) struct Arena {
    mapping: *mut libc::c_void,
    mapped: usize,
    /// The first byte of guest memory.
    start: *mut u8,
    bytes: usize,
}

impl Arena {
    /// Memory of up to 2 MiB, mapped by 4 KiB pages.
    pub(crate) fn new(bytes: usize) -> Self {
        assert!(bytes.is_multiple_of(0x1000) && bytes <= LARGE);
        let mut arena = Self::reserve(bytes);
        for frame in 0..bytes as u64 >> 12 {
            arena.map(frame, true);
        }
        arena
    }

    /// Memory mapped by 2 MiB pages.
    pub(crate) fn large(bytes: usize) -> Self {
        assert!(bytes.is_multiple_of(LARGE) && bytes <= 1 << 30);
        let mut arena = Self::reserve(bytes);
        for page in 0..bytes / LARGE {
            let hpa = HPA + (page * LARGE) as u64;
            arena.put(bytes + 0x2000 + page * 8, hpa | 7 | 6 << 3 | 1 << 7);
        }
        arena
    }

    /// Memory with the upper three levels of tables.
    fn reserve(bytes: usize) -> Self {
        let mapped = bytes + TABLES + LARGE;
        // SAFETY: the kernel chooses the address.
        let mapping = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(mapping, libc::MAP_FAILED);
        let skip = (mapping as usize).next_multiple_of(LARGE) - mapping as usize;
        let mut arena = Self {
            mapping,
            mapped,
            // SAFETY: within the mapping.
            start: unsafe { mapping.cast::<u8>().add(skip) },
            bytes,
        };
        for level in 0..3 {
            let next = arena.tables() + (level as u64 + 1) * 0x1000;
            arena.put(bytes + level * 0x1000, next | 7);
        }
        arena
    }

    /// Host-physical address of the root table.
    fn tables(&self) -> u64 {
        HPA + self.bytes as u64
    }

    /// Writes a word at an offset that may lie in the tables.
    fn put(&mut self, offset: usize, value: u64) {
        assert!(offset + 8 <= self.bytes + TABLES);
        // SAFETY: within the mapping.
        unsafe { self.start.add(offset).cast::<u64>().write_unaligned(value) }
    }

    /// A processor of a machine of its own whose addresses have `physical_bits` bits.
    pub(crate) fn processor(&self, physical_bits: u8) -> Cpu {
        let machine = Machine::new(MachineConfig {
            maxphyaddr: physical_bits,
            hpa_offset: (self.start as usize).wrapping_sub(HPA as usize),
            ..MachineConfig::default()
        });
        self.another_processor(&machine, 0)
    }

    /// A processor of the machine of one from [`Arena::processor`].
    pub(crate) fn another_processor(&self, machine: &Arc<Machine>, index: u32) -> Cpu {
        let mut cpu = Cpu::new(Arc::clone(machine), index);
        let pointer = Eptp::new(Hpa::new(self.tables()), Level::L512G, true);
        cpu.set_second_stage(SecondStage::Ept(pointer));
        cpu
    }

    /// Maps a frame of the guest in the second stage, or takes it away. Not for large pages.
    pub(crate) fn map(&mut self, frame: u64, present: bool) {
        let entry = (HPA + (frame << 12)) | 7 | 6 << 3;
        let place = self.bytes + 0x3000 + frame as usize * 8;
        self.put(place, if present { entry } else { 0 });
    }

    /// Maps a frame of the guest to the memory of another one. Not for large pages.
    pub(crate) fn alias(&mut self, frame: u64, other: u64) {
        let entry = (HPA + (other << 12)) | 7 | 6 << 3;
        self.put(self.bytes + 0x3000 + frame as usize * 8, entry);
    }

    /// Gives a frame's entry in the second stage these flags, instead of R, W and X. Not for large
    /// pages.
    pub(crate) fn set_flags(&mut self, frame: u64, flags: EptFlags) {
        let entry = (HPA + (frame << 12)) | 6 << 3 | flags.bits();
        self.put(self.bytes + 0x3000 + frame as usize * 8, entry);
    }

    /// The flags in a frame's entry.
    pub(crate) fn flags(&self, frame: u64) -> EptFlags {
        let place = self.bytes + 0x3000 + frame as usize * 8;
        // SAFETY: the tables are within the mapping.
        let entry = unsafe { self.start.add(place).cast::<u64>().read_unaligned() };
        EptFlags::from_bits_truncate(entry)
    }

    /// What the tables call a frame of the guest.
    pub(crate) fn hpa(&self, frame: u64) -> Hpa {
        Hpa::new(HPA + (frame << 12))
    }

    /// Guest memory. The processor must not be running.
    pub(crate) fn memory(&mut self, gpa: u64, length: usize) -> &mut [u8] {
        assert!(gpa as usize + length <= self.bytes);
        // SAFETY: within the mapping, and only used through this value.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(gpa as usize), length) }
    }

    pub(crate) fn write(&mut self, gpa: usize, bytes: &[u8]) {
        self.memory(gpa as u64, bytes.len()).copy_from_slice(bytes);
    }

    pub(crate) fn write_u64(&mut self, gpa: usize, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    pub(crate) fn read_u64(&self, gpa: usize) -> u64 {
        assert!(gpa + 8 <= self.bytes);
        // SAFETY: within the mapping.
        unsafe { self.start.add(gpa).cast::<u64>().read_unaligned() }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: nothing uses the memory any more: no processor is running.
        unsafe { libc::munmap(self.mapping, self.mapped) };
    }
}

/// A writable data segment of 4 GiB from 0.
pub(crate) fn flat_data(selector: u16, dpl: u8) -> Segment {
    Segment {
        selector,
        limit: u32::MAX,
        kind: 3,
        dpl,
        code_or_data: true,
        present: true,
        big: true,
        granular: true,
        ..Segment::default()
    }
}

/// A segment of 64-bit code.
pub(crate) fn code64(selector: u16, dpl: u8) -> Segment {
    Segment {
        kind: 11,
        long: true,
        big: false,
        ..flat_data(selector, dpl)
    }
}

/// The task state segment at `base`.
pub(crate) fn task_state(selector: u16, base: u64) -> Segment {
    Segment {
        selector,
        base,
        limit: 0x67,
        kind: 11,
        present: true,
        ..Segment::default()
    }
}
