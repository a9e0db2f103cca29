//! A virtual machine as the host sees it, and memory for it.

// UNSAFETY: the guests' code as bytes.
#![expect(unsafe_code)]

use crate::calls::call;
use crate::probe;
use core::arch::global_asm;
use twofold_pkvm::hypercall::Call;
use twofold_pkvm::run::Reason;
use twofold_pkvm::{HostVcpu, HostVm};

global_asm!(include_str!("guest.s"));

pub(crate) const PAGE: u64 = 4096;
/// Where guests begin.
pub(crate) const ENTRY: u64 = 0x8_0000;

/// Pages that have not been handed out yet.
pub(crate) struct Pages(pub(crate) u64);

impl Pages {
    /// The next.
    pub(crate) fn take(&mut self) -> u64 {
        let page = self.0;
        self.0 += PAGE;
        page
    }

    /// A stack of pages for tables: the first's address.
    pub(crate) fn stack(&mut self, count: u64) -> u64 {
        let mut head = 0;
        for _ in 0..count {
            let page = self.take();
            set(page, head);
            head = page;
        }
        head
    }
}

/// A word of the host's memory.
pub(crate) fn get(address: u64) -> u64 {
    match probe::read(address) {
        Some(value) => value,
        None => panic!("{address:#x} should be readable"),
    }
}

/// Changes a word of it.
pub(crate) fn set(address: u64, value: u64) {
    assert!(
        probe::write(address, value),
        "{address:#x} should be writable"
    );
}

/// Something that must be so; says it.
macro_rules! check {
    ($condition:expr, $($text:tt)*) => {{
        assert!($condition, "this should hold: {}", format_args!($($text)*));
        bare::say!("host: {}", format_args!($($text)*));
    }};
}
pub(crate) use check;

macro_rules! programs {
    ($($(#[$doc:meta])* $name:ident = $start:ident, $end:ident;)*) => {
        unsafe extern "C" {
            $(static $start: u8; static $end: u8;)*
        }

        /// What a guest can run (`guest.s`).
        #[derive(Clone, Copy, Debug)]
        pub(crate) enum Program {
            $($(#[$doc])* $name,)*
        }

        impl Program {
            /// Where it begins and ends in this program.
            fn bytes(self) -> (u64, u64) {
                match self {
                    $(Self::$name => (&raw const $start as u64, &raw const $end as u64),)*
                }
            }
        }
    };
}

programs! {
    /// Keeps a secret and shows the host a page.
    Protected = protected_guest, protected_guest_end;
    /// Has one page at two addresses and may not write another.
    Ordinary = ordinary_guest, ordinary_guest_end;
    /// Reads its secret for ever.
    Spinning = spinning_guest, spinning_guest_end;
    /// Is interrupted by its timer, spinning and waiting.
    Timer = timer_guest, timer_guest_end;
    /// Tells the time and uses a device that is not there.
    Device = device_guest, device_guest_end;
    /// Calls the host for ever.
    Calling = calling_guest, calling_guest_end;
}

impl Program {
    /// Copies it to a page.
    pub(crate) fn copy_to(self, page: u64) {
        let (from, to) = self.bytes();
        assert!(to - from < PAGE);
        for offset in (0..to - from).step_by(8) {
            set(page + offset, get(from + offset));
        }
    }
}

/// A VM as the host sees it.
pub(crate) struct Vm {
    /// Its number.
    pub(crate) handle: u64,
    record: u64,
    /// The address of its vCPU's record.
    pub(crate) vcpu: u64,
}

impl Vm {
    /// A VM with one vCPU, which has a stock of `tables` pages for tables.
    pub(crate) fn new(pages: &mut Pages, protected: bool, tables: u64) -> Self {
        let record = pages.take();
        let vcpu = record + 512;
        assert_eq!(call(Call::ShareHyp, &[record / PAGE]), Ok(0));
        let handle = match call(Call::ReserveVm, &[record]) {
            Ok(handle) => handle,
            Err(error) => panic!("no handle: {error}"),
        };
        for word in 0..HostVm::WORDS as u64 {
            set(record + word * 8, 0);
        }
        set(record, handle);
        set(record + 8, 1);
        let kind = if protected { HostVm::PROTECTED } else { 0 };
        // 36 bits: a root of one page.
        set(record + 16, kind | 36 << HostVm::IPA_SHIFT);
        let (area, root) = (pages.take(), pages.take());
        assert_eq!(
            call(Call::InitVm, &[record, area / PAGE, root / PAGE]),
            Ok(handle)
        );
        assert!(
            probe::read(area).is_none(),
            "the VM's record is out of reach"
        );
        for word in 0..HostVcpu::WORDS as u64 {
            set(vcpu + word * 8, 0);
        }
        set(vcpu + 8, ENTRY);
        set(vcpu + 24, pages.stack(tables));
        set(vcpu + 32, tables);
        let area = pages.take();
        assert_eq!(call(Call::InitVcpu, &[handle, vcpu, area / PAGE]), Ok(0));
        Self {
            handle,
            record,
            vcpu,
        }
    }

    /// A word of the vCPU's record.
    pub(crate) fn word(&self, number: usize) -> u64 {
        get(self.vcpu + number as u64 * 8)
    }

    /// Changes a word of it.
    pub(crate) fn set_word(&self, number: usize, value: u64) {
        set(self.vcpu + number as u64 * 8, value);
    }

    /// Runs the vCPU once; why it stopped.
    pub(crate) fn run(&self) -> u64 {
        match call(Call::VcpuRun, &[]) {
            Ok(reason) => reason,
            Err(error) => panic!("the vCPU does not run: {error}"),
        }
    }

    /// Runs to an abort and says where it was.
    pub(crate) fn run_to_abort(&self) -> u64 {
        let reason = self.run();
        assert_eq!(
            reason,
            Reason::Abort as u64,
            "syndrome {:#x}",
            self.word(HostVcpu::SYNDROME)
        );
        self.word(HostVcpu::ADDRESS)
    }

    /// Runs to a call with this function and says its arguments.
    pub(crate) fn run_to_call(&self, function: u64) -> [u64; 3] {
        let reason = self.run();
        assert_eq!(
            reason,
            Reason::Call as u64,
            "syndrome {:#x} at {:#x}",
            self.word(HostVcpu::SYNDROME),
            self.word(HostVcpu::ADDRESS)
        );
        assert_eq!(self.word(HostVcpu::CALL), function);
        [1, 2, 3].map(|number| self.word(HostVcpu::CALL + number))
    }

    /// Ends the VM and counts the pages that came back, all of them empty but for the link.
    pub(crate) fn end(self, frames: &[u64]) -> u64 {
        assert_eq!(call(Call::StartTeardownVm, &[self.handle]), Ok(0));
        self.finish(frames)
    }

    /// The same for a VM that is dying.
    pub(crate) fn finish(self, frames: &[u64]) -> u64 {
        for frame in frames {
            assert_eq!(
                call(Call::ReclaimDyingGuestPage, &[self.handle, *frame]),
                Ok(0)
            );
        }
        assert_eq!(call(Call::FinalizeTeardownVm, &[self.handle]), Ok(0));
        let mut count = 0;
        for stack in [4, 6] {
            let mut page = get(self.record + stack * 8);
            let expected = get(self.record + stack * 8 + 8);
            let mut found = 0;
            while page != 0 {
                for word in 1..512 {
                    assert_eq!(get(page + word * 8), 0, "{page:#x} tells something");
                }
                found += 1;
                page = get(page);
            }
            assert_eq!(found, expected);
            count += found;
        }
        assert_eq!(call(Call::UnshareHyp, &[self.record / PAGE]), Ok(0));
        count
    }
}
