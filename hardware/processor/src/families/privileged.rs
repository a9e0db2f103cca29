//! Instructions that need a privilege: by level, by IOPL, by the I/O permission bitmap; control
//! registers.

use crate::case::Case;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let denied: [(&str, &[u8]); 22] = [
        ("hlt", &[0xf4]),
        ("lgdt", &[0x0f, 0x01, 0x16, 0, 0x80]),
        ("lidt", &[0x0f, 0x01, 0x1e, 0, 0x80]),
        ("lldt", &[0x0f, 0x00, 0xd0]),
        ("ltr", &[0x0f, 0x00, 0xd8]),
        ("clts", &[0x0f, 0x06]),
        ("lmsw", &[0x0f, 0x01, 0xf0]),
        ("mov eax, cr0", &[0x0f, 0x20, 0xc0]),
        ("mov cr0, eax", &[0x0f, 0x22, 0xc0]),
        ("mov eax, cr1", &[0x0f, 0x20, 0xc8]),
        ("mov cr4, eax", &[0x0f, 0x22, 0xe0]),
        ("mov eax, dr7", &[0x0f, 0x21, 0xf8]),
        ("mov dr7, eax", &[0x0f, 0x23, 0xf8]),
        ("invlpg", &[0x0f, 0x01, 0x3e, 0, 0x80]),
        ("invd", &[0x0f, 0x08]),
        ("wbinvd", &[0x0f, 0x09]),
        ("rdmsr", &[0x0f, 0x32]),
        ("wrmsr", &[0x0f, 0x30]),
        ("swapgs", &[0x0f, 0x01, 0xf8]),
        ("sysexit", &[0x0f, 0x35]),
        ("sysret", &[0x0f, 0x07]),
        ("monitor", &[0x0f, 0x01, 0xc8]),
    ];
    for (name, code) in denied {
        for level in 1..4 {
            cases.push(Case::protected(format!("{name} cpl {level}"), 16, level).with_code(code));
        }
        cases.push(Case::virtual_8086(format!("{name} v86"), 3).with_code(code));
        cases.push(Case::long(format!("{name} in long mode"), 3).with_code(code));
    }
    cases.extend(iopl());
    cases.extend(ports());
    cases.extend(control_registers());
    cases
}

fn iopl() -> Vec<Case> {
    let mut cases = Vec::new();
    let sensitive: [(&str, &[u8]); 8] = [
        ("cli", &[0xfa]),
        ("sti", &[0xfb]),
        ("pushf", &[0x9c]),
        ("pushfd", &[0x66, 0x9c]),
        ("int", &[0xcd, 0x31]),
        ("int 0x20", &[0xcd, 0x20]),
        ("int3", &[0xcc]),
        ("out", &[0xe6, 0x80]),
    ];
    for (name, code) in sensitive {
        for iopl in 0..4 {
            for flags in [0, crate::case::flag::IF] {
                for level in 0..4 {
                    let name = format!("{name} cpl {level} iopl {iopl} flags {flags:x}");
                    let mut case = Case::protected(name, 16, level).with_code(code);
                    case.flags |= iopl << 12 | flags;
                    cases.push(case);
                }
                let name = format!("{name} v86 iopl {iopl} flags {flags:x}");
                let mut case = Case::virtual_8086(name, iopl).with_code(code);
                case.flags |= flags;
                cases.push(case);
            }
        }
    }
    cases
}

/// OUT to ports that nobody has, in the bitmap, at its end and behind.
fn ports() -> Vec<Case> {
    let mut cases = Vec::new();
    for port in (0x140..0x14a).chain(0x4b0..0x4bc).chain([0xffff]) {
        for (width, code) in [(8, &[0xee][..]), (16, &[0xef]), (32, &[0x66, 0xef])] {
            for iopl in [0, 3] {
                let name = format!("out {width} to {port:x} iopl {iopl}");
                let mut protected = Case::protected(name.clone(), 16, 3).with_code(code);
                protected.flags |= iopl << 12;
                let outside = Case::virtual_8086(format!("v86 {name}"), iopl).with_code(code);
                let code: &[u8] = match width {
                    8 => &[0xee],
                    16 => &[0x66, 0xef],
                    _ => &[0xef],
                };
                let mut long = Case::long(format!("long mode, {name}"), 3).with_code(code);
                long.flags |= iopl << 12;
                for mut case in [protected, outside, long] {
                    case.gpr[2] = port;
                    cases.push(case);
                }
            }
        }
    }
    cases
}

/// Values that control registers take and refuse.
fn control_registers() -> Vec<Case> {
    let mut cases = Vec::new();
    for bit in 0..32 {
        let value = 1u64 << bit;
        // Paging in the middle of a case needs tables: 32-bit ones are not there.
        let paging = bit == 31;
        for (name, code, base) in [
            ("cr0", [0x0f, 0x22, 0xc0], 0x31u64),
            ("cr4", [0x0f, 0x22, 0xe0], 0),
            ("cr3", [0x0f, 0x22, 0xd8], 0),
            ("dr6", [0x0f, 0x23, 0xf0], 0),
        ] {
            // Features that one has and the other has not.
            let other = name == "cr4" && matches!(bit, 0 | 1 | 12..=14 | 17 | 20.. );
            if name == "cr0" && (paging || bit == 0) || other {
                continue;
            }
            let what = format!("mov {name} bit {bit}");
            let mut case = Case::protected(what, 32, 0).with_code(&code);
            case.gpr[0] = base ^ value;
            cases.push(case);
            if name != "cr3" {
                let mut case =
                    Case::long(format!("mov {name} bit {bit} in long mode"), 0).with_code(&code);
                let base = match name {
                    "cr0" => 0x8001_0031,
                    "cr4" => 0x20,
                    _ => base,
                };
                case.gpr[0] = base ^ value;
                cases.push(case);
            }
        }
        let mut case = Case::protected(format!("lmsw bit {bit}"), 32, 0)
            .with_code(&[0x0f, 0x01, 0xf0, 0x0f, 0x01, 0xe3]);
        case.gpr[0] = value;
        cases.push(case);
    }
    cases
}
