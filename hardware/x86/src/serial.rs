//! Output: port 0xe9, which Bochs and QEMU both print to standard output.

use crate::instructions::out8;
use core::fmt;

/// The port that both machines print.
const PORT: u16 = 0xe9;

/// Where [`print!`](crate::print) goes.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            out8(PORT, byte);
        }
        Ok(())
    }
}

/// Prints a line.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => {{
        use core::fmt::Write as _;
        // The console never fails.
        let _ = writeln!($crate::serial::Console, $($argument)*);
    }};
}
