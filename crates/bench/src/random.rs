//! Addresses in an order that no prefetcher knows, the same in every run.

/// `xorshift64`.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// `count` numbers below `limit`.
pub(crate) fn below(limit: u64, count: usize) -> Vec<u64> {
    let mut random = Random::new();
    (0..count).map(|_| random.next() % limit).collect()
}

/// Every number below a power of two, once each, in an order without a pattern that a prefetcher
/// could follow.
pub(crate) struct Permutation {
    mask: u64,
    next: u64,
}

impl Permutation {
    /// The numbers below `limit`, which must be a power of two.
    pub(crate) const fn new(limit: u64) -> Self {
        assert!(limit.is_power_of_two());
        Self {
            mask: limit - 1,
            next: 0,
        }
    }
}

impl Iterator for Permutation {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.next > self.mask {
            return None;
        }
        let bits = self.mask.count_ones();
        let mut value = self.next;
        self.next += 1;
        // Each step is invertible modulo the power of two: an odd factor, and a shifted copy.
        for factor in [0x9e37_79b9_7f4a_7c15, 0xbf58_476d_1ce4_e5b9_u64] {
            value = value.wrapping_mul(factor) & self.mask;
            value ^= value >> bits.div_ceil(2);
        }
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permutation_yields_every_number_once() {
        for limit in [1, 2, 64, 4096, 1 << 15] {
            let mut seen: Vec<_> = Permutation::new(limit).collect();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..limit));
        }
    }
}
