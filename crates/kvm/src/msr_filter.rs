//! `KVM_X86_SET_MSR_FILTER`: which registers RDMSR and WRMSR may reach without asking the program.

use crate::usercopy;
use bitflags::bitflags;
use kvm_bindings::{
    KVM_MSR_FILTER_DEFAULT_DENY, KVM_MSR_FILTER_MAX_BITMAP_SIZE, KVM_MSR_FILTER_MAX_RANGES,
    KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE, kvm_msr_filter,
};
use rustix::io::Errno;

bitflags! {
    /// What is done with a register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct MsrAccess: u32 {
        const READ = KVM_MSR_FILTER_READ;
        const WRITE = KVM_MSR_FILTER_WRITE;
    }
}

/// The registers of x2APIC are not filtered.
const X2APIC: std::ops::Range<u32> = 0x800..0x900;

/// Which accesses are allowed.
#[derive(Debug)]
pub(crate) struct MsrFilter {
    default_allow: bool,
    ranges: Vec<Range>,
}

/// Registers from `base` on, a bit each; one allows.
#[derive(Debug)]
struct Range {
    accesses: MsrAccess,
    base: u32,
    count: u32,
    bitmap: Vec<u8>,
}

impl Range {
    /// Whether the range allows an access that it covers.
    fn judge(&self, index: u32, access: MsrAccess) -> Option<bool> {
        let offset = index.checked_sub(self.base)?;
        if offset >= self.count || !self.accesses.contains(access) {
            return None;
        }
        let byte = self.bitmap.get(offset as usize / 8)?;
        Some(byte >> (offset % 8) & 1 != 0)
    }
}

impl MsrFilter {
    /// The filter that a program describes.
    ///
    /// # Errors
    /// `EINVAL` for unknown flags, a range without an access or with too large a bitmap, and for
    /// denying by default without any range; `EFAULT` for a bitmap that cannot be read.
    pub(crate) fn read(filter: &kvm_msr_filter) -> Result<Self, Errno> {
        const _: () = assert!(KVM_MSR_FILTER_MAX_RANGES == 16, "the structure's array");
        if filter.flags & !KVM_MSR_FILTER_DEFAULT_DENY != 0 {
            return Err(Errno::INVAL);
        }
        let default_allow = filter.flags & KVM_MSR_FILTER_DEFAULT_DENY == 0;
        let wanted = || filter.ranges.iter().filter(|range| range.nmsrs != 0);
        if wanted().next().is_none() && !default_allow {
            return Err(Errno::INVAL);
        }
        let mut ranges = Vec::new();
        for range in wanted() {
            let accesses = MsrAccess::from_bits(range.flags)
                .filter(|accesses| !accesses.is_empty())
                .ok_or(Errno::INVAL)?;
            // The bitmap is read in words of 64 bits.
            let bytes = range.nmsrs.div_ceil(64) as usize * 8;
            if bytes > KVM_MSR_FILTER_MAX_BITMAP_SIZE as usize {
                return Err(Errno::INVAL);
            }
            ranges.push(Range {
                accesses,
                base: range.base,
                count: range.nmsrs,
                bitmap: usercopy::read_slice(range.bitmap as usize, bytes)?,
            });
        }
        Ok(Self {
            default_allow,
            ranges,
        })
    }

    /// Whether the guest may access a register.
    pub(crate) fn allows(&self, index: u32, access: MsrAccess) -> bool {
        X2APIC.contains(&index)
            || self
                .ranges
                .iter()
                .find_map(|range| range.judge(index, access))
                .unwrap_or(self.default_allow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_msr_filter_range;

    fn filter(flags: u32, ranges: &[kvm_msr_filter_range]) -> Result<MsrFilter, Errno> {
        let mut filter = kvm_msr_filter {
            flags,
            ..Default::default()
        };
        filter.ranges[..ranges.len()].copy_from_slice(ranges);
        MsrFilter::read(&filter)
    }

    fn range(flags: u32, base: u32, count: u32, bitmap: &mut [u64]) -> kvm_msr_filter_range {
        kvm_msr_filter_range {
            flags,
            nmsrs: count,
            base,
            bitmap: bitmap.as_mut_ptr().cast(),
        }
    }

    #[test]
    fn the_first_range_that_covers_an_access_decides() {
        let (mut only_second, mut all) = ([0b10], [u64::MAX]);
        let ranges = [
            range(KVM_MSR_FILTER_READ, 0x100, 4, &mut only_second),
            range(
                KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE,
                0x100,
                64,
                &mut all,
            ),
        ];
        let filter = filter(KVM_MSR_FILTER_DEFAULT_DENY, &ranges).unwrap();
        assert!(!filter.allows(0x100, MsrAccess::READ));
        assert!(filter.allows(0x101, MsrAccess::READ));
        assert!(filter.allows(0x100, MsrAccess::WRITE));
        assert!(filter.allows(0x104, MsrAccess::READ));
        assert!(!filter.allows(0x140, MsrAccess::READ));
        assert!(filter.allows(0x830, MsrAccess::WRITE));
    }

    #[test]
    fn what_kvm_refuses_is_refused() {
        let mut bits = vec![0; 512];
        assert!(filter(0, &[]).is_ok());
        assert_eq!(filter(1, &[]).unwrap_err(), Errno::INVAL);
        assert_eq!(filter(2, &[]).unwrap_err(), Errno::INVAL);
        assert_eq!(
            filter(0, &[range(0, 0, 1, &mut bits)]).unwrap_err(),
            Errno::INVAL
        );
        assert_eq!(
            filter(0, &[range(4, 0, 1, &mut bits)]).unwrap_err(),
            Errno::INVAL
        );
        let most = KVM_MSR_FILTER_MAX_BITMAP_SIZE * 8;
        assert!(filter(0, &[range(1, 0, most, &mut bits)]).is_ok());
        assert_eq!(
            filter(0, &[range(1, 0, most + 1, &mut bits)]).unwrap_err(),
            Errno::INVAL
        );
        let nowhere = kvm_msr_filter_range {
            bitmap: std::ptr::without_provenance_mut(8),
            ..range(1, 0, 1, &mut bits)
        };
        assert_eq!(filter(0, &[nowhere]).unwrap_err(), Errno::FAULT);
    }
}
