//! Sub-page write permissions, by instructions that write in every way there is.
//!
//! A guest executes one instruction after the other in memory of which pieces of 128 bytes may be
//! written. A model knows which bytes each instruction writes in which order, and says whether it
//! completes and, if not, which byte it is denied and what has been written before.
#![expect(clippy::unwrap_used)] // Helpers outside #[test] functions.

use crate::guest::Guest;
use proptest::prelude::*;
use proptest::sample::select;
use twofold_arch::Gpa;
use twofold_arch::ept::EptFlags;
use twofold_arch::qualification::Qualification;
use twofold_arch::sppt::{AccessMap, SUB_PAGE_BYTES, SpptEntry, WriteVector};
use twofold_cpu::{Exit, Pml, Registers, SecondStageFault};

/// Frames whose permissions change.
const FIRST: u64 = 0x20;
const FRAMES: u64 = 8;
const AREA: u64 = FIRST << 12;
const AREA_BYTES: u64 = FRAMES << 12;
/// What string instructions copy.
const SOURCE: u64 = 0x2_a000;
const CODE: u64 = 0x1000;
/// The log, and the table, which begins at its root.
const LOG: u64 = 0x3b;
const SPPT: u64 = 0x3c;

/// One way to write. The numbers are bytes of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Mov(u8),
    Add { bytes: u8, locked: bool },
    Exchange(u8),
    CompareExchange(u8),
    Vector { aligned: bool },
    NonTemporal { vector: bool },
    Masked,
    Push,
    Call,
    Enter,
    SaveState,
    StoreTable,
    Interrupt,
    RepeatStore(u8),
    RepeatMove(u8),
    RepeatMoveDown(u8),
}

/// An instruction, and the pieces that it writes one after the other. Nothing is written of a piece
/// that has a denied byte.
struct Write {
    code: Vec<u8>,
    pieces: Vec<(u64, u64)>,
    registers: Registers,
    /// What each piece holds afterwards is known: its bytes.
    content: Option<fn(u64, u64) -> u8>,
}

const VALUE: u64 = 0xd1c2_b3a4_9586_7758;

fn value(piece: u64, at: u64) -> u8 {
    (VALUE >> ((at - piece) % 8 * 8)) as u8
}

fn moved(_: u64, at: u64) -> u8 {
    source_byte(SOURCE + (at - AREA))
}

fn source_byte(at: u64) -> u8 {
    (at as u8).wrapping_mul(37) | 1
}

/// The opcode with its prefixes for an operand of so many bytes, of an instruction whose form for
/// one byte has the last bit of the opcode clear.
fn sized(prefixes: &[u8], bytes: u8, opcode: &[u8]) -> Vec<u8> {
    let mut code = Vec::new();
    if bytes == 2 {
        code.push(0x66);
    }
    code.extend_from_slice(prefixes);
    if bytes == 8 {
        code.push(0x48);
    }
    code.extend_from_slice(opcode);
    code
}

/// An opcode that is one less for a byte.
const fn or_byte(bytes: u8, opcode: u8) -> u8 {
    opcode - (bytes == 1) as u8
}

/// How `kind` writes at `at`, or as near as it can; `count` times if it repeats.
fn write(kind: Kind, at: u64, count: u64) -> Write {
    let mut registers = Registers {
        rip: CODE,
        rflags: 2,
        ..Registers::default()
    };
    let gpr = &mut registers.gpr;
    gpr[0] = VALUE;
    gpr[4] = 0x1_0000;
    gpr[7] = at;
    let simple = |code: Vec<u8>, bytes: u64, known: bool| {
        let content: Option<fn(u64, u64) -> u8> = if known { Some(value) } else { None };
        (code, vec![(at, bytes)], content)
    };
    let (code, pieces, content) = match kind {
        Kind::Mov(n) => simple(sized(&[], n, &[or_byte(n, 0x89), 7]), n.into(), true),
        Kind::Add { bytes: n, locked } => {
            let prefixes: &[u8] = if locked { &[0xf0] } else { &[] };
            simple(sized(prefixes, n, &[or_byte(n, 0x01), 7]), n.into(), false)
        }
        Kind::Exchange(n) => simple(sized(&[], n, &[or_byte(n, 0x87), 7]), n.into(), true),
        Kind::CompareExchange(16) => {
            gpr[7] &= !15;
            let at = gpr[7];
            (vec![0xf0, 0x48, 0x0f, 0xc7, 0x0f], vec![(at, 16)], None)
        }
        Kind::CompareExchange(n) => {
            let code = sized(&[0xf0], n, &[0x0f, or_byte(n, 0xb1), 0x0f]);
            simple(code, n.into(), false)
        }
        Kind::Vector { aligned: false } => simple(vec![0x0f, 0x11, 7], 16, false),
        Kind::Vector { aligned: true } => {
            gpr[7] &= !15;
            (vec![0x0f, 0x29, 7], vec![(gpr[7], 16)], None)
        }
        Kind::NonTemporal { vector: false } => simple(vec![0x48, 0x0f, 0xc3, 7], 8, true),
        Kind::NonTemporal { vector: true } => {
            gpr[7] &= !15;
            (vec![0x0f, 0x2b, 7], vec![(gpr[7], 16)], None)
        }
        // The mask is XMM1, of which the whole is judged whatever it selects.
        Kind::Masked => simple(vec![0x66, 0x0f, 0xf7, 0xc1], 16, false),
        Kind::Push => {
            gpr[4] = at + 8;
            simple(vec![0x50], 8, true)
        }
        Kind::Call => {
            gpr[4] = at + 8;
            simple(vec![0xe8, 0, 0, 0, 0], 8, false)
        }
        // The frame is pushed, and the new top of the stack is probed.
        Kind::Enter => {
            gpr[4] = at + 8;
            simple(vec![0xc8, 0, 0, 0], 8, false)
        }
        Kind::SaveState => {
            gpr[7] &= !15;
            (vec![0x0f, 0xae, 7], vec![(gpr[7], 512)], None)
        }
        Kind::StoreTable => simple(vec![0x0f, 0x01, 7], 10, false),
        Kind::Interrupt => {
            gpr[4] = at;
            let top = at & !15;
            let frame = (1..=5).map(|word| (top - 8 * word, 8)).collect();
            (vec![0xcd, 0x30], frame, None)
        }
        Kind::RepeatStore(n) => {
            gpr[1] = count / u64::from(n);
            let pieces = (0..gpr[1]).map(|i| (at + i * u64::from(n), n.into()));
            let code = sized(&[0xf3], n, &[or_byte(n, 0xab)]);
            let content: fn(u64, u64) -> u8 = value;
            (code, pieces.collect(), Some(content))
        }
        Kind::RepeatMove(n) | Kind::RepeatMoveDown(n) => {
            let n = u64::from(n);
            gpr[1] = count / n;
            let last = gpr[1].saturating_sub(1) * n;
            let down = matches!(kind, Kind::RepeatMoveDown(_));
            if down {
                registers.rflags |= 0x400;
                gpr[7] = at + last;
            }
            gpr[6] = SOURCE + (gpr[7] - AREA);
            let piece = |i: u64| (at + if down { last - i * n } else { i * n }, n);
            let pieces = (0..gpr[1]).map(piece).collect();
            let code = sized(&[0xf3], n as u8, &[or_byte(n as u8, 0xa5)]);
            let content: fn(u64, u64) -> u8 = moved;
            (code, pieces, Some(content))
        }
    };
    Write {
        code,
        pieces,
        registers,
        content,
    }
}

/// What a frame's entry in EPT lets the guest do.
#[derive(Clone, Copy, Debug)]
enum Permission {
    /// W is set: the table has no say, whatever it says.
    Open { sub_page_bit: bool },
    /// W is clear, and so is the bit that lets the table have a say.
    Closed,
    /// The table decides.
    Map(u32),
}

impl Permission {
    fn allows(self, offset: u64) -> bool {
        match self {
            Self::Open { .. } => true,
            Self::Closed => false,
            Self::Map(map) => map >> (offset / SUB_PAGE_BYTES) & 1 != 0,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Run {
        kind: Kind,
        at: u64,
        count: u64,
    },
    Permit {
        frame: u64,
        permission: Permission,
    },
    /// The hypervisor clears dirty flags, as a dirty log does.
    ClearDirty,
    Read {
        at: u64,
    },
}

struct Machine {
    guest: Guest,
    permissions: [Permission; FRAMES as usize],
    /// What the area holds.
    memory: Vec<u8>,
    /// Pages written since dirty flags were cleared.
    written: [bool; FRAMES as usize],
    /// Pages in the log since then.
    logged: [bool; FRAMES as usize],
}

impl Machine {
    fn new() -> Self {
        let mut guest = Guest::long(b"");
        let arena = &mut guest.arena;
        for level in 0..3 {
            let below = SpptEntry::table(arena.hpa(SPPT + level + 1));
            arena.write_u64(((SPPT + level) << 12) as usize, below);
        }
        let (sppt, log) = (arena.hpa(SPPT), arena.hpa(LOG));
        for at in SOURCE..SOURCE + AREA_BYTES {
            guest.write(at as usize, &[source_byte(at)]);
        }
        guest.cpu.set_sppt(Some(sppt)).unwrap();
        guest.cpu.set_pml(Some(Pml::empty(log)));
        let mut fpu = guest.cpu.fpu();
        fpu.xmm[0] = u128::MAX;
        fpu.xmm[1] = u128::MAX;
        guest.cpu.set_fpu(&fpu);
        let mut machine = Self {
            guest,
            permissions: [Permission::Closed; FRAMES as usize],
            memory: vec![0; AREA_BYTES as usize],
            written: [false; FRAMES as usize],
            logged: [false; FRAMES as usize],
        };
        for frame in 0..FRAMES {
            machine.permit(frame, Permission::Map(u32::MAX));
        }
        machine
    }

    /// Changes a frame's entry and the table's, in the order and with the flush that a hypervisor
    /// needs.
    fn permit(&mut self, frame: u64, permission: Permission) {
        let arena = &mut self.guest.arena;
        let base = EptFlags::READ | EptFlags::EXECUTE;
        let (flags, map) = match permission {
            Permission::Open {
                sub_page_bit: false,
            } => (base | EptFlags::WRITE, 0),
            Permission::Open { sub_page_bit: true } => {
                (base | EptFlags::WRITE | EptFlags::SUB_PAGE_WRITE, 0)
            }
            Permission::Closed => (base, u32::MAX),
            Permission::Map(map) => (base | EptFlags::SUB_PAGE_WRITE, map),
        };
        let kept = arena.flags(FIRST + frame) & (EptFlags::ACCESSED | EptFlags::DIRTY);
        let vector = ((SPPT + 3) << 12) + (FIRST + frame) * 8;
        arena.write_u64(vector as usize, WriteVector::new(AccessMap(map)).0);
        let only_the_map = matches!(
            (self.permissions[frame as usize], permission),
            (Permission::Map(_), Permission::Map(_))
        );
        self.permissions[frame as usize] = permission;
        if !only_the_map {
            self.guest.arena.set_flags(FIRST + frame, flags | kept);
            self.guest.cpu.machine().flush_tlbs();
        }
    }

    fn allows(&self, at: u64) -> bool {
        let offset = at - AREA;
        self.permissions[(offset >> 12) as usize].allows(offset & 0xfff)
    }

    fn run(&mut self, kind: Kind, at: u64, count: u64) {
        let write = write(kind, at, count);
        let denied = write
            .pieces
            .iter()
            .flat_map(|&(piece, bytes)| (piece..piece + bytes).map(move |byte| (piece, byte)))
            .find(|&(_, byte)| !self.allows(byte));
        let mut code = write.code.clone();
        code.push(0xf4);
        self.guest.write(CODE as usize, &code);
        self.guest.cpu.set_registers(&write.registers);
        let exit = self.guest.cpu.run();
        let case = format!("{kind:?} at {at:#x}, {count} bytes");
        let registers = self.guest.cpu.registers();
        match (denied, exit) {
            (None, Exit::Halt) => {}
            (
                Some((_, byte)),
                Exit::SecondStage(SecondStageFault::EptViolation {
                    gpa,
                    qualification,
                    gla,
                }),
            ) => {
                assert_eq!((gpa, gla), (Gpa::new(byte), byte), "{case}");
                let found = Qualification::from_bits_retain(qualification);
                assert!(found.contains(Qualification::WRITE | Qualification::ENTRY_READ));
                assert!(!found.contains(Qualification::ENTRY_WRITE));
                assert_eq!(registers.rip, CODE, "{case}");
                let length = match kind {
                    Kind::Interrupt => 0,
                    _ => write.code.len() as u8,
                };
                assert_eq!(self.guest.cpu.exit_instruction_length(), length, "{case}");
            }
            (denied, exit) => panic!("{case}: {exit:?} where {denied:x?} is denied"),
        }
        let found = self.guest.arena.memory(AREA, AREA_BYTES as usize).to_vec();
        for &(piece, bytes) in &write.pieces {
            if denied.is_some_and(|(first, _)| first == piece) {
                break;
            }
            for byte in piece..piece + bytes {
                let place = (byte - AREA) as usize;
                self.memory[place] = match write.content {
                    Some(content) => content(piece, byte),
                    None => found[place],
                };
                self.written[place >> 12] = true;
            }
        }
        let differs = (0..found.len()).find(|&i| found[i] != self.memory[i]);
        assert_eq!(
            differs, None,
            "{case}: the first byte that is not as expected"
        );
        self.take_log();
        self.check_dirty(&case);
    }

    /// Empties the log, as the hypervisor does.
    fn take_log(&mut self) {
        let log = self.guest.arena.hpa(LOG);
        let next = self.guest.cpu.pml_index().unwrap();
        for index in usize::from(next.wrapping_add(1))..512 {
            let frame =
                (self.guest.read_u64((LOG << 12) as usize + index * 8) >> 12).wrapping_sub(FIRST);
            if let Some(logged) = self.logged.get_mut(frame as usize) {
                *logged = true;
            }
        }
        self.guest.cpu.set_pml(Some(Pml::empty(log)));
    }

    /// Everything that was written is dirty, and was logged.
    fn check_dirty(&self, case: &str) {
        for frame in 0..FRAMES {
            if self.written[frame as usize] {
                let flags = self.guest.arena.flags(FIRST + frame);
                let marked = flags.contains(EptFlags::DIRTY | EptFlags::ACCESSED);
                assert!(marked, "{case}: frame {frame} is not dirty");
                let logged = self.logged[frame as usize];
                assert!(logged, "{case}: frame {frame} is not logged");
            }
        }
    }

    fn clear_dirty(&mut self) {
        for frame in 0..FRAMES {
            let flags = self.guest.arena.flags(FIRST + frame) - EptFlags::DIRTY;
            self.guest.arena.set_flags(FIRST + frame, flags);
        }
        self.written = [false; FRAMES as usize];
        self.logged = [false; FRAMES as usize];
        self.guest.cpu.machine().flush_tlbs();
    }

    fn read(&mut self, at: u64) {
        // mov rax,[rdi]; hlt
        self.guest.write(CODE as usize, &[0x48, 0x8b, 7, 0xf4]);
        self.guest.set(CODE, |registers| registers.gpr[7] = at);
        assert_eq!(self.guest.cpu.run(), Exit::Halt);
        let place = (at - AREA) as usize;
        let expected = self.memory[place..place + 8].try_into().unwrap();
        assert_eq!(self.guest.gpr(0), u64::from_le_bytes(expected));
    }
}

fn kind() -> impl Strategy<Value = Kind> {
    let bytes = || select(vec![1u8, 2, 4, 8]);
    prop_oneof![
        bytes().prop_map(Kind::Mov),
        (bytes(), any::<bool>()).prop_map(|(bytes, locked)| Kind::Add { bytes, locked }),
        bytes().prop_map(Kind::Exchange),
        select(vec![1u8, 2, 4, 8, 16]).prop_map(Kind::CompareExchange),
        any::<bool>().prop_map(|aligned| Kind::Vector { aligned }),
        any::<bool>().prop_map(|vector| Kind::NonTemporal { vector }),
        select(vec![
            Kind::Masked,
            Kind::Push,
            Kind::Call,
            Kind::Enter,
            Kind::SaveState,
            Kind::StoreTable,
            Kind::Interrupt,
        ]),
        bytes().prop_map(Kind::RepeatStore),
        bytes().prop_map(Kind::RepeatMove),
        bytes().prop_map(Kind::RepeatMoveDown),
    ]
}

/// Addresses in the area, with room for 4096 bytes above and an interrupt's frame below; often next
/// to where a permission may end.
fn address() -> impl Strategy<Value = u64> {
    let (low, high) = (AREA + 64, AREA + AREA_BYTES - 4096 - 16);
    prop_oneof![
        low..high,
        (low / SUB_PAGE_BYTES..high / SUB_PAGE_BYTES, -20i64..20).prop_map(move |(piece, off)| {
            (piece * SUB_PAGE_BYTES)
                .saturating_add_signed(off)
                .clamp(low, high)
        }),
        (1..FRAMES - 1, -20i64..20)
            .prop_map(|(frame, off)| ((FIRST + frame) << 12).saturating_add_signed(off)),
    ]
}

fn permission() -> impl Strategy<Value = Permission> {
    prop_oneof![
        1 => any::<bool>().prop_map(|sub_page_bit| Permission::Open { sub_page_bit }),
        1 => Just(Permission::Closed),
        2 => any::<u32>().prop_map(Permission::Map),
        3 => (0..32u32).prop_map(|piece| Permission::Map(!(1 << piece))),
        1 => (0..32u32).prop_map(|piece| Permission::Map(1 << piece)),
        1 => Just(Permission::Map(u32::MAX)),
        1 => Just(Permission::Map(0)),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (kind(), address(), 1..=4096u64)
            .prop_map(|(kind, at, count)| Step::Run { kind, at, count }),
        3 => (0..FRAMES, permission())
            .prop_map(|(frame, permission)| Step::Permit { frame, permission }),
        1 => Just(Step::ClearDirty),
        2 => (AREA..AREA + AREA_BYTES - 8).prop_map(|at| Step::Read { at }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("TWOFOLD_SUB_PAGE_CASES")
            .ok()
            .and_then(|cases| cases.parse().ok())
            .unwrap_or(120),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_processor_decides_about_every_instruction_as_the_model_does(
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut machine = Machine::new();
        for step in steps {
            match step {
                Step::Run { kind, at, count } => machine.run(kind, at, count),
                Step::Permit { frame, permission } => machine.permit(frame, permission),
                Step::ClearDirty => machine.clear_dirty(),
                Step::Read { at } => machine.read(at),
            }
        }
    }
}
