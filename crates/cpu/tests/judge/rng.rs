//! Random numbers with a taste for edges.

/// SplitMix64: one word of state, every seed is good.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// True in `percent` of 100 calls.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An integer of 64 bits that is often at the edge of some width.
    pub fn integer(&mut self) -> u64 {
        const EDGES: [u64; 22] = [
            0,
            1,
            2,
            3,
            7,
            8,
            0xf,
            0x10,
            0x7f,
            0x80,
            0xff,
            0x100,
            0x7fff,
            0x8000,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x1_0000_0000,
            i64::MAX as u64,
            i64::MIN as u64,
            u64::MAX,
        ];
        match self.below(10) {
            0..=2 => self.pick(&EDGES),
            3 => self
                .pick(&EDGES)
                .wrapping_add(self.below(5))
                .wrapping_sub(2),
            4 => 1 << self.below(64),
            5 => self.next() >> self.below(64),
            6 => (self.next() as i64 >> self.below(64)) as u64,
            _ => self.next(),
        }
    }

    fn single(&mut self) -> u32 {
        const EDGES: [u32; 20] = [
            0x0000_0000,
            0x8000_0000,
            0x3f80_0000,
            0xbf80_0000,
            0x0000_0001,
            0x8000_0001,
            0x007f_ffff,
            0x0080_0000,
            0x7f7f_ffff,
            0xff7f_ffff,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0xffc0_1234,
            0x7f80_0001,
            0xffa0_0000,
            0x4f00_0000,
            0xcf00_0000,
            0x3f00_0000,
            0x5f00_0000,
        ];
        match self.below(4) {
            0 => self.pick(&EDGES),
            // Around one, so that sums and conversions are of like size.
            1 | 2 => (self.next() as u32 & 0x80ff_ffff) + ((0x70 + self.below(0x1f) as u32) << 23),
            _ => self.next() as u32,
        }
    }

    fn double(&mut self) -> u64 {
        const EDGES: [u64; 20] = [
            0,
            1 << 63,
            0x3ff0_0000_0000_0000,
            0xbff0_0000_0000_0000,
            1,
            1 << 63 | 1,
            0x000f_ffff_ffff_ffff,
            0x0010_0000_0000_0000,
            0x7fef_ffff_ffff_ffff,
            0xffef_ffff_ffff_ffff,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0xfff8_0000_0000_1234,
            0x7ff0_0000_0000_0001,
            0xfff4_0000_0000_0000,
            0x43e0_0000_0000_0000,
            0xc3e0_0000_0000_0000,
            0x41e0_0000_0000_0000,
            0x3fe0_0000_0000_0000,
        ];
        match self.below(4) {
            0 => self.pick(&EDGES),
            1 | 2 => (self.next() & 0x800f_ffff_ffff_ffff) | (0x3e0 + self.below(0x60)) << 52,
            _ => self.next(),
        }
    }

    /// A number of the x87 unit in ten bytes: of every class that it tells apart, those included
    /// that no instruction produces any more.
    pub fn extended(&mut self) -> u128 {
        const INTEGER_BIT: u64 = 1 << 63;
        let significand = match self.below(6) {
            0 => INTEGER_BIT,
            1 => u64::MAX >> self.below(64),
            2 => INTEGER_BIT | 1 << self.below(63),
            3 => INTEGER_BIT | self.integer(),
            // Few bits, as in numbers of narrower types.
            4 => INTEGER_BIT | self.next() << (11 + self.below(50)),
            _ => INTEGER_BIT | self.next(),
        };
        const BIAS: u64 = 0x3fff;
        let (exponent, significand) = match self.below(20) {
            0 => (0, 0),
            // Denormal and pseudo-denormal.
            1 => (0, significand & !INTEGER_BIT),
            2 => (0, significand),
            // Infinity, quiet, signalling, pseudo-infinity and pseudo-NaN.
            3 => (0x7fff, INTEGER_BIT),
            4 => (0x7fff, significand | 3 << 62),
            5 => (0x7fff, (significand | INTEGER_BIT) & !(1 << 62)),
            6 => (0x7fff, significand & !INTEGER_BIT),
            // Unnormal.
            7 => (1 + self.below(0x7ffe), significand & !INTEGER_BIT),
            // Near the ends of the range, and of the narrower types' ranges.
            8 => (1 + self.below(0x50), significand),
            9 => (0x7ffe - self.below(0x50), significand),
            10 => (BIAS - 0x400 - self.below(0x40), significand),
            11 => (BIAS + 0x3f0 + self.below(0x20), significand),
            12 => (BIAS - 0x70 - self.below(0x30), significand),
            13 => (BIAS + 0x70 + self.below(0x20), significand),
            14 => (self.below(0x7fff), significand),
            15 => (BIAS + self.below(70), significand),
            _ => (BIAS - 4 + self.below(8), significand),
        };
        let sign = self.next() & 0x8000;
        u128::from(sign | exponent) << 64 | u128::from(significand)
    }

    /// 18 decimal digits and a sign in ten bytes, now and then with digits that are none.
    pub fn decimal(&mut self) -> u128 {
        let digits = self.below(19);
        let mut value = (0..digits).fold(0, |all, _| all << 4 | u128::from(self.below(10)));
        value |= u128::from(self.next() & 0x80) << 72;
        if self.chance(10) {
            value ^= u128::from(self.next()) << self.below(16);
        }
        value
    }

    /// 16 bytes as integers of some width.
    pub fn integers(&mut self) -> u128 {
        match self.below(4) {
            0 => u128::from(self.integer()) | u128::from(self.integer()) << 64,
            1 => (0..8).fold(0, |all, i| {
                all | u128::from(self.integer() as u16) << (16 * i)
            }),
            2 => (0..16).fold(0, |all, i| {
                all | u128::from(self.integer() as u8) << (8 * i)
            }),
            _ => (0..4).fold(0, |all, i| {
                all | u128::from(self.integer() as u32) << (32 * i)
            }),
        }
    }

    /// 16 bytes as floating-point numbers.
    pub fn floats(&mut self) -> u128 {
        if self.chance(50) {
            (0..4).fold(0, |all, i| all | u128::from(self.single()) << (32 * i))
        } else {
            u128::from(self.double()) | u128::from(self.double()) << 64
        }
    }
}
