//! Tells the linker where the image's layout is.

fn main() {
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo::rerun-if-changed=../x86/link.ld");
    println!("cargo::rustc-link-arg-bins=-T{here}/../x86/link.ld");
}
