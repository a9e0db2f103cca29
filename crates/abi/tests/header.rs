//! The C header says what the Rust definitions say.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::mem::{offset_of, size_of};
use std::path::{Path, PathBuf};
use std::process::Command;
use twofold_abi::spp::{NUMBERS, kvm_spp_exit, kvm_subpage};

fn include() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../include")
}

/// The names that the header defines, but for its own guard and the type that it shares with
/// `linux/kvm.h`.
fn defined(header: &str) -> BTreeSet<&str> {
    header
        .lines()
        .filter_map(|line| line.strip_prefix("#define ")?.split_whitespace().next())
        .filter(|name| !matches!(*name, "TWOFOLD_KVM_SPP_H" | "KVMIO"))
        .collect()
}

#[test]
fn the_header_defines_every_number_and_no_other() {
    let header = std::fs::read_to_string(include().join("twofold/kvm_spp.h")).unwrap();
    let numbers: BTreeSet<_> = NUMBERS.iter().map(|(name, _)| *name).collect();
    assert_eq!(defined(&header), numbers);
}

#[test]
fn a_c_compiler_finds_the_same_numbers_sizes_and_offsets() {
    let mut program = String::from("#include <stddef.h>\n#include <twofold/kvm_spp.h>\n");
    let mut assert = |what: &str, value: u64| {
        writeln!(
            program,
            "_Static_assert(({what}) == {value}UL, \"{what}\");"
        )
        .unwrap();
    };
    for (name, value) in NUMBERS {
        assert(name, u64::from(*value));
    }
    macro_rules! fields {
        ($name:ident: $($field:ident),*) => {
            assert(concat!("sizeof(struct ", stringify!($name), ")"), size_of::<$name>() as u64);
            $(assert(
                concat!("offsetof(struct ", stringify!($name), ", ", stringify!($field), ")"),
                offset_of!($name, $field) as u64,
            );)*
        };
    }
    fields!(kvm_subpage: gfn_base, npages, flags, access_map);
    fields!(kvm_spp_exit: addr, insn_len, pad);
    assert("sizeof(((struct kvm_subpage *)0)->access_map[0])", 4);
    assert("sizeof(((struct kvm_spp_exit *)0)->insn_len)", 1);
    // With the kernel's own header before and behind it as well.
    for around in ["", "before", "behind"] {
        let kernel = "#include <linux/kvm.h>\n";
        let program = match around {
            "before" => format!("{kernel}{program}"),
            "behind" => format!("{program}{kernel}"),
            _ => program.clone(),
        };
        let name = format!("kvm_spp_{}_{around}.c", std::process::id());
        let source = std::env::temp_dir().join(name);
        std::fs::write(&source, program).unwrap();
        let output = Command::new("cc")
            .args(["-std=c11", "-Wall", "-Werror", "-fsyntax-only", "-I"])
            .arg(include())
            .arg(&source)
            .output();
        std::fs::remove_file(&source).unwrap();
        let output = output.expect("a C compiler, which the linker of this test is");
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{around}: {message}");
    }
}

#[test]
fn the_ioctls_are_those_that_were_given_out() {
    let number = |name| NUMBERS.iter().find(|(known, _)| *known == name).unwrap().1;
    assert_eq!(number("KVM_SUBPAGES_GET_ACCESS"), 0xc010_aef0);
    assert_eq!(number("KVM_SUBPAGES_SET_ACCESS"), 0x4010_aef1);
}
