//! What the measurement of the guest's initial memory (MRTD) must be, worked out from what was put
//! there (TDX Module Base Architecture Specification, "TD Measurement").

use sha2::{Digest, Sha384};

/// Bytes of a measurement.
pub(crate) const BYTES: usize = 48;

/// A measurement in the making.
#[derive(Default)]
pub(crate) struct Measurement(Sha384);

impl Measurement {
    /// Pages are added at `gpa`, and their content is measured or not.
    pub(crate) fn add(&mut self, gpa: u64, content: &[u8], measured: bool) {
        for (page, number) in content.chunks(4096).zip(0..) {
            let gpa = gpa + 4096 * number;
            self.record(b"MEM.PAGE.ADD", gpa);
            if !measured {
                continue;
            }
            for (piece, number) in page.chunks(256).zip(0..) {
                self.record(b"MR.EXTEND", gpa + 256 * number);
                self.0.update(piece);
            }
        }
    }

    /// What happened, in 16 bytes, where, in 8, and zeros up to 128.
    fn record(&mut self, what: &[u8], gpa: u64) {
        let mut record = [0; 128];
        record[..what.len()].copy_from_slice(what);
        record[16..24].copy_from_slice(&gpa.to_le_bytes());
        self.0.update(record);
    }

    pub(crate) fn finish(self) -> [u8; BYTES] {
        self.0.finalize().into()
    }
}
