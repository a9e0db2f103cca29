//! Data accesses at linear addresses.

use super::access::{self, Datum, Vanished};
use super::tlb::{Set, tag};
use super::{PAGE_MASK, Place, Target, rest_of_page};
use crate::core_state::Core;
use crate::trap::Trap;

/// An access of up to 16 bytes that lies in two pages.
struct Halves {
    first: Target,
    first_len: usize,
    second: Target,
}

impl Core {
    /// Reads at a linear address with the current privilege level's rights.
    #[inline(always)]
    pub(crate) fn load<T: Datum>(&mut self, linear: u64) -> Result<T, Trap> {
        let entry = self.mem.tlb.entry(self.mem.data_base, linear);
        if entry.read == tag(linear, T::SIZE as u64) {
            let place = linear.wrapping_add(entry.addend) as usize;
            return self.load_host(place);
        }
        self.load_slow(linear, self.data_set())
    }

    /// Writes at a linear address with the current privilege level's rights.
    #[inline(always)]
    pub(crate) fn store<T: Datum>(&mut self, linear: u64, value: T) -> Result<(), Trap> {
        let entry = self.mem.tlb.entry(self.mem.data_base, linear);
        if entry.write == tag(linear, T::SIZE as u64) {
            let place = linear.wrapping_add(entry.addend) as usize;
            return self.store_host(place, value);
        }
        self.store_slow(linear, value, self.data_set())
    }

    /// Reads with supervisor rights whatever the current privilege level: descriptor tables, task
    /// state. SMAP is never suspended for such an access.
    pub(crate) fn load_sys<T: Datum>(&mut self, linear: u64) -> Result<T, Trap> {
        let entry = self.mem.tlb.entry(Set::Supervisor.base(), linear);
        if entry.read == tag(linear, T::SIZE as u64) {
            let place = linear.wrapping_add(entry.addend) as usize;
            return self.load_host(place);
        }
        self.load_slow(linear, Set::Supervisor)
    }

    /// Writes with supervisor rights whatever the current privilege level.
    pub(crate) fn store_sys<T: Datum>(&mut self, linear: u64, value: T) -> Result<(), Trap> {
        let entry = self.mem.tlb.entry(Set::Supervisor.base(), linear);
        if entry.write == tag(linear, T::SIZE as u64) {
            let place = linear.wrapping_add(entry.addend) as usize;
            return self.store_host(place, value);
        }
        self.store_slow(linear, value, Set::Supervisor)
    }

    /// Replaces the value at a linear address by what `change` makes of it, and returns both. A
    /// locked change is atomic for every other processor of the machine. `change` may be called
    /// several times. Faults as a write does, even if the value is the same.
    #[inline(always)]
    pub(crate) fn rmw<T: Datum>(
        &mut self,
        linear: u64,
        locked: bool,
        change: impl Fn(T) -> T,
    ) -> Result<(T, T), Trap> {
        let entry = self.mem.tlb.entry(self.mem.data_base, linear);
        if entry.write == tag(linear, T::SIZE as u64) {
            let place = linear.wrapping_add(entry.addend) as usize;
            return self.rmw_host(place, locked, change);
        }
        self.rmw_slow(linear, locked, &change)
    }

    /// Makes sure that `length` bytes (at most a page) could be written, with the current
    /// privilege level's rights, without writing them. Emulated memory counts as writable.
    pub(crate) fn touch_write(&mut self, linear: u64, length: u64) -> Result<(), Trap> {
        if length == 0 {
            return Ok(());
        }
        let set = self.data_set();
        let first = length.min(rest_of_page(linear));
        self.probe(linear, first, set)?;
        if first < length {
            self.probe(linear.wrapping_add(first), length - first, set)?;
        }
        Ok(())
    }

    fn probe(&mut self, linear: u64, bytes: u64, set: Set) -> Result<(), Trap> {
        if self.mem.tlb.entry(set.base(), linear).write == tag(linear, 1) {
            return Ok(());
        }
        self.translate_data(linear, bytes, true, set).map(|_| ())
    }

    /// A store into a page that code was decoded from has been made: `bytes` at `place`.
    #[cold]
    pub(super) fn code_written(&mut self, place: usize, bytes: usize) {
        if self.machine.code().written(self.hpa_of(place), bytes) {
            self.stop = true;
        }
    }

    /// The same for an access of `bytes` that lies in two pages.
    fn halves_written(&mut self, halves: &Halves, bytes: usize) {
        let parts = [
            (&halves.first, halves.first_len),
            (&halves.second, bytes - halves.first_len),
        ];
        for (target, length) in parts {
            if let (true, Place::Host(place)) = (target.code, target.place) {
                self.code_written(place, length);
            }
        }
    }

    #[inline(always)]
    fn load_host<T: Datum>(&mut self, place: usize) -> Result<T, Trap> {
        let pointer = std::ptr::with_exposed_provenance::<u8>(place);
        #[expect(unsafe_code)]
        // UNSAFETY: guest memory is raw memory.
        // SAFETY: the address was translated since the last flush, and the vCPU is in guest mode.
        let value = unsafe { T::load(pointer) };
        value.map_err(|Vanished| self.vanished(place))
    }

    #[inline(always)]
    fn store_host<T: Datum>(&mut self, place: usize, value: T) -> Result<(), Trap> {
        let pointer = std::ptr::with_exposed_provenance_mut::<u8>(place);
        #[expect(unsafe_code)]
        // UNSAFETY: guest memory is raw memory.
        // SAFETY: as for `load_host`, and both stages allow writing.
        let stored = unsafe { T::store(pointer, value) };
        stored.map_err(|Vanished| self.vanished(place))
    }

    #[inline(always)]
    fn rmw_host<T: Datum>(
        &mut self,
        place: usize,
        locked: bool,
        change: impl Fn(T) -> T,
    ) -> Result<(T, T), Trap> {
        if locked {
            return self.rmw_locked_host(place, change);
        }
        let old = self.load_host(place)?;
        let new = change(old);
        self.store_host(place, new)?;
        Ok((old, new))
    }

    fn rmw_locked_host<T: Datum>(
        &mut self,
        place: usize,
        change: impl Fn(T) -> T,
    ) -> Result<(T, T), Trap> {
        let pointer = std::ptr::with_exposed_provenance_mut::<u8>(place);
        if T::SIZE == 16 && !place.is_multiple_of(16) {
            // CMPXCHG16B, the only locked access of 16 bytes, raises #GP itself when misaligned.
            return Err(self.general_protection(0));
        }
        let mut old = self.load_host::<T>(place)?;
        loop {
            let new = change(old);
            #[expect(unsafe_code)]
            // UNSAFETY: guest memory is raw memory.
            // SAFETY: as for `store_host`; 16 bytes are aligned, as checked above.
            let found = unsafe { T::compare_exchange(pointer, old, new) };
            match found {
                Ok(found) if found == old => return Ok((old, new)),
                Ok(found) => old = found,
                Err(Vanished) => return Err(self.vanished(place)),
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn load_slow<T: Datum>(&mut self, linear: u64, set: Set) -> Result<T, Trap> {
        self.check_alignment(linear, T::SIZE as u64, set)?;
        self.note_access(linear, T::SIZE as u64, false);
        if (linear & !PAGE_MASK) + T::SIZE as u64 <= 1 << super::PAGE_SHIFT {
            let target = self.translate_data(linear, T::SIZE as u64, false, set)?;
            if let Place::Host(place) = target.place {
                return self.load_host(place);
            }
            let mut bytes = [0; 16];
            self.read_target(&target, &mut bytes[..T::SIZE])?;
            return Ok(T::from_bytes(bytes));
        }
        let halves = self.translate_halves::<T>(linear, false, set)?;
        self.load_halves(&halves)
    }

    #[cold]
    #[inline(never)]
    fn store_slow<T: Datum>(&mut self, linear: u64, value: T, set: Set) -> Result<(), Trap> {
        self.check_alignment(linear, T::SIZE as u64, set)?;
        self.note_access(linear, T::SIZE as u64, true);
        if (linear & !PAGE_MASK) + T::SIZE as u64 <= 1 << super::PAGE_SHIFT {
            if let Some(place) = self.mem.sub_pages.place(set, linear, T::SIZE as u64) {
                return self.store_host(place, value);
            }
            if let Some(place) = self.mem.tlb.beside_code(set, linear) {
                self.store_host(place, value)?;
                self.code_written(place, T::SIZE);
                return Ok(());
            }
            let target = self.translate_data(linear, T::SIZE as u64, true, set)?;
            return match target.place {
                Place::Host(place) => {
                    self.store_host(place, value)?;
                    if target.code {
                        self.code_written(place, T::SIZE);
                    }
                    Ok(())
                }
                Place::Emulated(_) => self.write_target(&target, &value.to_bytes()[..T::SIZE]),
            };
        }
        let halves = self.translate_halves::<T>(linear, true, set)?;
        self.store_halves(&halves, value)
    }

    #[cold]
    #[inline(never)]
    fn rmw_slow<T: Datum>(
        &mut self,
        linear: u64,
        locked: bool,
        change: &dyn Fn(T) -> T,
    ) -> Result<(T, T), Trap> {
        let set = self.data_set();
        self.check_alignment(linear, T::SIZE as u64, set)?;
        self.note_access(linear, T::SIZE as u64, true);
        if (linear & !PAGE_MASK) + T::SIZE as u64 <= 1 << super::PAGE_SHIFT {
            if let Some(place) = self.mem.sub_pages.place(set, linear, T::SIZE as u64) {
                return self.rmw_host(place, locked, change);
            }
            if let Some(place) = self.mem.tlb.beside_code(set, linear) {
                let result = self.rmw_host(place, locked, change)?;
                self.code_written(place, T::SIZE);
                return Ok(result);
            }
            let target = self.translate_data(linear, T::SIZE as u64, true, set)?;
            if locked && let Place::Host(place) = target.place {
                let result = self.rmw_locked_host(place, change)?;
                if target.code {
                    self.code_written(place, T::SIZE);
                }
                return Ok(result);
            }
            let mut bytes = [0; 16];
            self.read_target(&target, &mut bytes[..T::SIZE])?;
            let old = T::from_bytes(bytes);
            let new = change(old);
            self.write_target(&target, &new.to_bytes()[..T::SIZE])?;
            return Ok((old, new));
        }
        loop {
            let halves = self.translate_halves::<T>(linear, true, set)?;
            if !locked {
                let old = self.load_halves(&halves)?;
                let new = change(old);
                self.store_halves(&halves, new)?;
                return Ok((old, new));
            }
            if T::SIZE < 16
                && let Some(place) = halves.contiguous()
            {
                let result = self.rmw_locked_host(place, change)?;
                self.halves_written(&halves, T::SIZE);
                return Ok(result);
            }
            // Two pages that are not neighbours in this process: no host instruction changes both
            // at once, so everybody else stands still.
            let machine = std::sync::Arc::clone(&self.machine);
            let own = std::sync::Arc::clone(&self.line);
            let result = machine.try_exclusively(&own, || {
                let old = self.load_halves(&halves)?;
                let new = change(old);
                self.store_halves(&halves, new)?;
                Ok((old, new))
            });
            if let Some(result) = result {
                return result;
            }
            // Somebody else has that right and may be waiting for this vCPU. Translations may
            // have been invalidated by the time it goes on.
            self.line.leave();
            self.machine.wait_for_exclusive();
            self.line.enter();
            self.serve_requests();
        }
    }

    /// Translates both pages of an access before anything is read or written.
    fn translate_halves<T: Datum>(
        &mut self,
        linear: u64,
        write: bool,
        set: Set,
    ) -> Result<Halves, Trap> {
        let first_len = rest_of_page(linear);
        let first = self.translate_data(linear, first_len, write, set)?;
        let (middle, rest) = (linear.wrapping_add(first_len), T::SIZE as u64 - first_len);
        let second = self.translate_data(middle, rest, write, set)?;
        Ok(Halves {
            first,
            first_len: first_len as usize,
            second,
        })
    }

    fn load_halves<T: Datum>(&mut self, halves: &Halves) -> Result<T, Trap> {
        if let Some(place) = halves.contiguous() {
            return self.load_host(place);
        }
        let mut bytes = [0; 16];
        let (first, second) = bytes[..T::SIZE].split_at_mut(halves.first_len);
        self.read_target(&halves.first, first)?;
        self.read_target(&halves.second, second)?;
        Ok(T::from_bytes(bytes))
    }

    fn store_halves<T: Datum>(&mut self, halves: &Halves, value: T) -> Result<(), Trap> {
        if let Some(place) = halves.contiguous() {
            self.store_host(place, value)?;
            self.halves_written(halves, T::SIZE);
            return Ok(());
        }
        let bytes = value.to_bytes();
        let (first, second) = bytes[..T::SIZE].split_at(halves.first_len);
        self.write_target(&halves.first, first)?;
        self.write_target(&halves.second, second)
    }

    /// Reads bytes of one page.
    fn read_target(&mut self, target: &Target, buffer: &mut [u8]) -> Result<(), Trap> {
        match target.place {
            Place::Host(place) => {
                let pointer = std::ptr::with_exposed_provenance::<u8>(place);
                #[expect(unsafe_code)]
                // UNSAFETY: guest memory is raw memory.
                // SAFETY: the page was translated since the last flush, in guest mode.
                let copied = unsafe { access::copy_from(buffer, pointer) };
                copied.map_err(|Vanished| self.vanished(place))
            }
            Place::Emulated(gpa) => self
                .mem
                .mmio
                .read(gpa, buffer)
                .map_err(|stop| self.mmio_stop(stop)),
        }
    }

    /// Writes bytes of one page.
    fn write_target(&mut self, target: &Target, bytes: &[u8]) -> Result<(), Trap> {
        match target.place {
            Place::Host(place) => {
                let pointer = std::ptr::with_exposed_provenance_mut::<u8>(place);
                #[expect(unsafe_code)]
                // UNSAFETY: guest memory is raw memory.
                // SAFETY: the page was translated for writing since the last flush, in guest mode.
                let copied = unsafe { access::copy_to(pointer, bytes) };
                if copied.is_err() {
                    return Err(self.vanished(place));
                }
                if target.code {
                    self.code_written(place, bytes.len());
                }
                Ok(())
            }
            Place::Emulated(gpa) => self
                .mem
                .mmio
                .write(gpa, bytes)
                .map_err(|stop| self.mmio_stop(stop)),
        }
    }
}

impl Halves {
    /// The place of the first byte, if both pages are neighbours in this process.
    fn contiguous(&self) -> Option<usize> {
        match (self.first.place, self.second.place) {
            (Place::Host(first), Place::Host(second)) if first + self.first_len == second => {
                Some(first)
            }
            _ => None,
        }
    }
}
