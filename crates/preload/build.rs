//! Keeps the bounds of the fix-up table, which the linker defines itself, out of the library's
//! exports: two libraries with such a table would share one.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,start-stop-visibility=hidden");
}
