//! Tells the linker where each program's layout is.

fn main() {
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    for program in ["el2", "host"] {
        println!("cargo::rerun-if-changed={program}.ld");
        println!("cargo::rustc-link-arg-bin={program}=-T{here}/{program}.ld");
    }
}
