//! A TD with one vCPU that executes what a test tells it to.

use crate::common::td::*;
use crate::common::*;
use crate::stub::{self, Instruction, MAILBOX, PAGES, PAGES_AT, SHARED, mailbox, port};
use kvm_bindings::*;

pub(crate) const PAGE: u64 = 4096;
/// Private memory, which no guest has accepted.
pub(crate) const RAM: u64 = 0x20_0000;
pub(crate) const RAM_BYTES: u64 = 8 << 20;
/// An address without memory.
pub(crate) const DEVICE: u64 = 0xc000_0000;

/// Index of a register in the mailbox.
pub(crate) mod reg {
    pub(crate) const RAX: usize = 0;
    pub(crate) const RCX: usize = 1;
    pub(crate) const RDX: usize = 2;
    pub(crate) const RBX: usize = 3;
    pub(crate) const RDI: usize = 7;
    pub(crate) const R8: usize = 8;
    pub(crate) const R9: usize = 9;
    pub(crate) const R10: usize = 10;
    pub(crate) const R11: usize = 11;
    pub(crate) const R12: usize = 12;
    pub(crate) const R13: usize = 13;
    pub(crate) const R14: usize = 14;
    pub(crate) const R15: usize = 15;
}

/// Statuses of TDG.VP.VMCALL.
pub(crate) const INVALID_OPERAND: u64 = 1 << 63;
pub(crate) const ALIGN_ERROR: u64 = 1 << 63 | 2;
pub(crate) const UNSUPPORTED: u64 = 1 << 63 | 3;
pub(crate) const RETRY: u64 = 1;

/// What a test may choose.
#[derive(Clone, Copy)]
pub(crate) struct Options {
    /// 47 or 51.
    pub(crate) shared_bit: u32,
    pub(crate) attributes: u64,
    /// Exit for hypercalls that convert memory.
    pub(crate) map_gpa: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            shared_bit: 47,
            attributes: 0,
            map_gpa: true,
        }
    }
}

pub(crate) struct Td {
    pub(crate) vcpu: Fd,
    pub(crate) run: Memory,
    _file: Fd,
    pub(crate) vm: Fd,
    /// Memory of the slots as the program sees them: only what is shared means anything.
    pub(crate) ram: Memory,
    _boot: Memory,
    mailbox: Memory,
    pub(crate) shared_bit: u32,
    _kvm: Fd,
}

/// Why the guest has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The instruction has completed.
    Done,
    /// #VE: status of VE.INFO.GET, reason, qualification, linear and physical address, length.
    Ve(Ve),
    /// Another exception: its vector, and the two words at the top of its frame.
    Exception(u64, [u64; 2]),
    /// An exit that is the program's.
    Exit(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ve {
    pub(crate) status: u64,
    pub(crate) reason: u64,
    pub(crate) qualification: u64,
    pub(crate) gla: u64,
    pub(crate) gpa: u64,
    pub(crate) length: u64,
}

impl Td {
    pub(crate) fn new() -> Self {
        Self::with(Options::default())
    }

    /// A TD that waits for its first instruction.
    pub(crate) fn with(options: Options) -> Self {
        let kvm = Fd::open();
        let vm = kvm.descriptor(KVM_CREATE_VM, KVM_X86_TDX_VM as usize);
        split_irqchip(&vm);
        if options.map_gpa {
            let mut request = kvm_enable_cap {
                cap: KVM_CAP_EXIT_HYPERCALL,
                ..Default::default()
            };
            request.args[0] = 1 << 12;
            assert_eq!(vm.set(KVM_ENABLE_CAP, request), Ok(0));
        }
        let mut init = InitVm::new(options.shared_bit + 1);
        init.attributes = options.attributes;
        init_vm(&vm, &init).unwrap();

        let boot_bytes = PAGES as u64 * PAGE;
        let mut create = kvm_create_guest_memfd {
            size: boot_bytes + RAM_BYTES,
            ..Default::default()
        };
        let argument = (&raw mut create).addr();
        let file = Fd(vm.call(KVM_CREATE_GUEST_MEMFD, argument).unwrap());
        let boot = Memory::new(boot_bytes as usize);
        let ram = Memory::new(RAM_BYTES as usize);
        let mailbox = Memory::new(PAGE as usize);
        let slot = |slot, gpa, size, memory: &Memory, offset: Option<u64>| {
            let region = kvm_userspace_memory_region2 {
                slot,
                flags: offset.map_or(0, |_| KVM_MEM_GUEST_MEMFD),
                guest_phys_addr: gpa,
                memory_size: size,
                userspace_addr: memory.address(),
                guest_memfd: offset.map_or(0, |_| file.0 as u32),
                guest_memfd_offset: offset.unwrap_or(0),
                ..Default::default()
            };
            assert_eq!(vm.set(KVM_SET_USER_MEMORY_REGION2, region), Ok(0));
            if offset.is_some() {
                set_private(&vm, gpa, size, true);
            }
        };
        slot(0, PAGES_AT, boot_bytes, &boot, Some(0));
        slot(1, RAM, RAM_BYTES, &ram, Some(boot_bytes));
        slot(2, MAILBOX, PAGE, &mailbox, None);

        let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
        let mut table = CpuidTable {
            count: 2,
            padding: 0,
            entries: [kvm_cpuid_entry2::default(); 2],
        };
        table.entries[0] = kvm_cpuid_entry2 {
            function: 1,
            ecx: 1 << 21,
            ..Default::default()
        };
        table.entries[1] = kvm_cpuid_entry2 {
            function: 0x4000_0000,
            eax: 0x4000_0001,
            ebx: 0x1234_5678,
            ..Default::default()
        };
        assert_eq!(vcpu.with(KVM_SET_CPUID2, &mut table), Ok(0));
        command(&vcpu, INIT_VCPU, 0, 0xfeed).unwrap();
        let source = Memory::new(boot_bytes as usize);
        source.write_bytes(0, &stub::pages(options.shared_bit));
        let region = Region {
            source: source.address(),
            gpa: PAGES_AT,
            pages: PAGES as u64,
        };
        command(&vcpu, INIT_MEM_REGION, MEASURE, address(&region)).unwrap();
        finalize(&vm).unwrap();
        let run = Memory::of_vcpu(&vcpu);
        let td = Self {
            vcpu,
            run,
            _file: file,
            vm,
            ram,
            _boot: boot,
            mailbox,
            shared_bit: options.shared_bit,
            _kvm: kvm,
        };
        assert_eq!(td.resume(), Ok(Stop::Done), "the guest starts");
        td
    }

    /// Where the guest sees a shared address.
    pub(crate) fn shared(gpa: u64) -> u64 {
        SHARED + gpa
    }

    /// A guest-physical address with the shared bit.
    pub(crate) fn shared_gpa(&self, gpa: u64) -> u64 {
        gpa | 1 << self.shared_bit
    }

    pub(crate) fn set_private(&self, gpa: u64, bytes: u64, private: bool) {
        set_private(&self.vm, gpa, bytes, private);
    }

    pub(crate) fn register(&self, index: usize) -> u64 {
        self.mailbox.read(8 * index)
    }

    pub(crate) fn interrupts(&self) -> u64 {
        self.mailbox.read(mailbox::INTERRUPTS)
    }

    /// Has the handler of #VE go on behind the instruction.
    pub(crate) fn skip(&self, bytes: u64) {
        self.mailbox.write(mailbox::SKIP, bytes);
    }

    /// Has the guest execute an instruction. Registers that are not named are 0.
    pub(crate) fn execute(
        &self,
        instruction: Instruction,
        registers: &[(usize, u64)],
    ) -> Result<Stop, Errno> {
        for index in 0..16 {
            let value = registers.iter().find(|(register, _)| *register == index);
            self.mailbox
                .write(8 * index, value.map_or(0, |(_, value)| *value));
        }
        self.mailbox.write(mailbox::COMMAND, instruction as u64);
        self.resume()
    }

    /// Runs the guest until it stops.
    pub(crate) fn resume(&self) -> Result<Stop, Errno> {
        self.vcpu.call(KVM_RUN, 0)?;
        let reason = self.run.read::<u32>(8);
        if reason != KVM_EXIT_IO {
            return Ok(Stop::Exit(reason));
        }
        let word = |index: usize| self.mailbox.read::<u64>(mailbox::REPORT + 8 * index);
        Ok(match self.exit::<u16>(2) {
            port::DONE => Stop::Done,
            port::VE => Stop::Ve(Ve {
                status: word(0),
                reason: word(1),
                qualification: word(2),
                gla: word(3),
                gpa: word(4),
                length: word(5),
            }),
            port::EXCEPTION => Stop::Exception(word(0), [word(1), word(2)]),
            _ => Stop::Exit(reason),
        })
    }

    /// CR2 as the guest found it after an exception.
    pub(crate) fn cr2(&self) -> u64 {
        self.mailbox.read(mailbox::REPORT + 32)
    }

    /// The structure of the exit, at the start of the union.
    pub(crate) fn exit<T: Copy>(&self, offset: usize) -> T {
        self.run.read(32 + offset)
    }

    /// Answers a hypercall exit.
    pub(crate) fn answer_hypercall(&self, result: u64) {
        self.run.write(32 + 8 + 48, result);
    }

    /// Number and first three arguments of a hypercall exit.
    pub(crate) fn hypercall(&self) -> (u64, [u64; 3]) {
        (self.exit(0), [self.exit(8), self.exit(16), self.exit(24)])
    }

    /// TDCALL that completes: RAX.
    pub(crate) fn tdcall(&self, registers: &[(usize, u64)]) -> u64 {
        assert_eq!(self.execute(Instruction::Tdcall, registers), Ok(Stop::Done));
        self.register(reg::RAX)
    }

    /// TDG.VP.VMCALL with R10 to R15 in the mask: it may need the program.
    pub(crate) fn vmcall(&self, subfunction: u64, arguments: &[u64]) -> Result<Stop, Errno> {
        let mut registers = vec![(reg::RCX, 0xfc00), (reg::R11, subfunction)];
        registers.extend((reg::R12..).zip(arguments.iter().copied()));
        self.execute(Instruction::Tdcall, &registers)
    }

    /// TDG.VP.VMCALL that KVM answers by itself: R10 and R11.
    pub(crate) fn answered_vmcall(&self, subfunction: u64, arguments: &[u64]) -> (u64, u64) {
        assert_eq!(self.vmcall(subfunction, arguments), Ok(Stop::Done));
        self.vmcall_result()
    }

    pub(crate) fn vmcall_result(&self) -> (u64, u64) {
        assert_eq!(self.register(reg::RAX), 0, "the module's status");
        (self.register(reg::R10), self.register(reg::R11))
    }

    /// TDG.MEM.PAGE.ACCEPT, again while the module is busy: the status.
    pub(crate) fn accept(&self, rcx: u64) -> u64 {
        const OPERAND_BUSY: u64 = 0x8000_0200;
        const BUSY_HOST_PRIORITY: u64 = 0x8000_0204;
        loop {
            let status = self.tdcall(&[(reg::RAX, 6), (reg::RCX, rcx)]);
            if !matches!(status >> 32, OPERAND_BUSY | BUSY_HOST_PRIORITY) {
                return status;
            }
        }
    }

    pub(crate) fn load(&self, linear: u64) -> Result<Stop, Errno> {
        self.execute(Instruction::Load, &[(reg::RDI, linear)])
    }

    pub(crate) fn store(&self, linear: u64, value: u64) -> Result<Stop, Errno> {
        let registers = [(reg::RDI, linear), (reg::RAX, value)];
        self.execute(Instruction::Store, &registers)
    }

    /// A load that succeeds.
    pub(crate) fn loaded(&self, linear: u64) -> u64 {
        assert_eq!(self.load(linear), Ok(Stop::Done));
        self.register(reg::RAX)
    }
}

#[repr(C)]
struct CpuidTable {
    count: u32,
    padding: u32,
    entries: [kvm_cpuid_entry2; 2],
}

fn set_private(vm: &Fd, address: u64, size: u64, private: bool) {
    let attributes = if private {
        u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE)
    } else {
        0
    };
    let request = kvm_memory_attributes {
        address,
        size,
        attributes,
        flags: 0,
    };
    assert_eq!(vm.set(KVM_SET_MEMORY_ATTRIBUTES, request), Ok(0));
}
