//! Printing, through the machine's PL011.

// UNSAFETY: a device register.
#![expect(unsafe_code)]

use core::fmt;

const DATA: *mut u32 = 0x0900_0000 as *mut u32;

/// The serial port.
#[derive(Debug)]
pub struct Uart;

impl fmt::Write for Uart {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: the data register of the machine's serial port; writing sends a byte.
            unsafe { DATA.write_volatile(u32::from(byte)) };
        }
        Ok(())
    }
}

/// Prints a line.
#[macro_export]
macro_rules! say {
    ($($argument:tt)*) => {{
        use core::fmt::Write as _;
        let _ = writeln!($crate::uart::Uart, $($argument)*);
    }};
}
