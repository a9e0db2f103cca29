//! What the figures were measured on.

use std::fs::read_to_string;
use std::thread::available_parallelism;

/// The processor's name, how many there are, and whether they are virtual.
pub(crate) fn describe() -> String {
    let info = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        info.lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_once(": "))
            .map_or("", |(_, value)| value)
    };
    let count = available_parallelism().map_or(0, usize::from);
    let is_virtual = field("flags").split(' ').any(|flag| flag == "hypervisor");
    format!(
        "{}, {count} {}processors",
        field("model name"),
        if is_virtual { "virtual " } else { "" }
    )
}

/// How many threads wanted to run during the last minute, on average: the benchmark itself is one.
pub(crate) fn load() -> String {
    let load = read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or("unknown").to_owned()
}
