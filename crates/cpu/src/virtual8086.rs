//! Virtual-8086 mode: how it is entered by IRET and left by events (SDM Vol. 3, "8086 Emulation").
//!
//! Code in it runs at CPL 3 with segments as in real mode. There are no virtual-mode extensions:
//! instructions that depend on IOPL raise #GP below 3.

use crate::core_state::{Core, seg};
use crate::int::Int;
use crate::segments::null_segment;
use crate::state::{gpr, rflags};
use crate::trap::Trap;

/// Segment registers that an event saves and clears, in the order in which they are pushed.
const SAVED: [u8; 4] = [seg::GS, seg::FS, seg::DS, seg::ES];

impl Core {
    /// #GP(0) if an instruction that virtual-8086 mode allows at IOPL 3 only may not be executed.
    pub(crate) fn require_v86_iopl(&mut self) -> Result<(), Trap> {
        if self.virtual_8086() && self.flags.system() & rflags::IOPL != rflags::IOPL {
            return Err(self.general_protection(0));
        }
        Ok(())
    }

    /// The selectors that an event's frame begins with when it comes in virtual-8086 mode.
    pub(crate) fn v86_selectors(&self) -> [u64; 4] {
        SAVED.map(|register| u64::from(self.segment[usize::from(register)].selector))
    }

    /// After an event has left virtual-8086 mode the data segments are null.
    pub(crate) fn clear_v86_segments(&mut self) {
        for register in SAVED {
            self.segment[usize::from(register)] = null_segment(0, 0);
        }
    }

    /// IRETD at CPL 0 with VM set in the flags that it pops: the frame holds all segments.
    pub(crate) fn return_to_v86(&mut self, ip: u64, selector: u16, image: u64) -> Result<(), Trap> {
        let mut words = [0u32; 6];
        for (distance, word) in (3u64..).zip(&mut words) {
            *word = self.peek(distance * 4)?;
        }
        let [stack, ss, es, ds, fs, gs] = words;
        if ip > 0xffff {
            return Err(self.general_protection(0));
        }
        let known = rflags::ARITHMETIC
            | rflags::TF
            | rflags::IF
            | rflags::DF
            | rflags::IOPL
            | rflags::NT
            | rflags::RF
            | rflags::VM
            | rflags::AC
            | rflags::VIF
            | rflags::VIP
            | rflags::ID;
        self.flags.set_image(image & known);
        self.cpl = 3;
        for (register, selector) in [
            (seg::SS, ss),
            (seg::ES, es),
            (seg::DS, ds),
            (seg::FS, fs),
            (seg::GS, gs),
        ] {
            self.load_real_segment(usize::from(register), selector as u16);
        }
        self.load_real_segment(usize::from(seg::CS), selector);
        self.regs[gpr::RSP] = stack.into();
        self.rip = ip;
        Ok(())
    }

    /// IRET in virtual-8086 mode, which it does not leave.
    pub(crate) fn return_within_v86<T: Int>(
        &mut self,
        ip: u64,
        selector: u16,
        image: u64,
    ) -> Result<(), Trap> {
        self.require_v86_iopl()?;
        if ip > 0xffff {
            return Err(self.general_protection(0));
        }
        let mut mask = crate::far::changeable_flags::<T>(self);
        if T::BITS > 16 {
            mask |= rflags::RF;
        }
        self.drop_stack(3 * T::BYTES);
        self.flags
            .set_image(self.flags.image() & !mask | image & mask);
        self.load_real_segment(usize::from(seg::CS), selector);
        self.rip = ip;
        Ok(())
    }
}
