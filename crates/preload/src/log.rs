//! Where Twofold's messages go: the program's standard error, as far as `TWOFOLD_LOG` lets them.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Starts logging. The filter is in `tracing-subscriber`'s syntax, for example
/// `twofold_mmu=debug,warn`; without one, warnings are shown.
pub(crate) fn start() {
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::WARN.into())
        .with_env_var("TWOFOLD_LOG")
        .from_env_lossy();
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(true)
        .without_time()
        .try_init();
    // A subscriber can only be there already if this library was, so there is nobody to tell.
    drop(started);
}
