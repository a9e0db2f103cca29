//! The measurement of a TD's initial memory: SHA-384 over a record for each page that was added and
//! each 256 bytes that were extended (SPEC 5.7).

use sha2::{Digest, Sha384};

/// Bytes in a record, and in each of the two blocks of content that follow an extension's.
const BLOCK: usize = 128;

/// Bytes that one extension covers.
pub const EXTENSION: usize = 2 * BLOCK;

/// Bytes in a measurement.
pub const DIGEST: usize = 48;

/// A measurement in the making. A program that wants to know beforehand what a TD's measurement
/// will be feeds one of these in the order in which it adds memory.
#[derive(Clone, Debug)]
pub struct Measurement(Sha384);

impl Default for Measurement {
    fn default() -> Self {
        Self(Sha384::new())
    }
}

impl Measurement {
    /// Nothing was added yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn record(&mut self, name: &[u8], gpa: u64) {
        let mut record = [0; BLOCK];
        record[..name.len()].copy_from_slice(name);
        record[16..24].copy_from_slice(&gpa.to_le_bytes());
        self.0.update(record);
    }

    /// A page was added at `gpa`. Its content is not part of this.
    pub fn add_page(&mut self, gpa: u64) {
        self.record(b"MEM.PAGE.ADD", gpa);
    }

    /// The 256 bytes at `gpa` were extended.
    pub fn extend(&mut self, gpa: u64, content: &[u8; EXTENSION]) {
        self.record(b"MR.EXTEND", gpa);
        self.0.update(content);
    }

    /// The measurement.
    pub fn finish(self) -> [u8; DIGEST] {
        self.0.finalize().into()
    }
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_pages_matters_and_so_does_every_byte() {
        let digest = |pages: [u64; 2], byte: u8| {
            let mut measurement = Measurement::new();
            for gpa in pages {
                measurement.add_page(gpa);
                measurement.extend(gpa, &[byte; EXTENSION]);
            }
            measurement.finish()
        };
        let one = digest([0x1000, 0x2000], 7);
        assert_eq!(one, digest([0x1000, 0x2000], 7));
        assert_ne!(one, digest([0x2000, 0x1000], 7));
        assert_ne!(one, digest([0x1000, 0x2000], 8));
    }

    #[test]
    fn a_record_is_its_name_and_its_address_in_128_bytes() {
        let mut measurement = Measurement::new();
        measurement.add_page(0x1122_3344_5566_7000);
        let mut record = [0u8; 128];
        record[..12].copy_from_slice(b"MEM.PAGE.ADD");
        record[16..24].copy_from_slice(&[0, 0x70, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        let expected: [u8; DIGEST] = Sha384::digest(record).into();
        assert_eq!(measurement.finish(), expected);
    }
}
