//! How VMs and vCPUs come to be, run, and end.

// UNSAFETY: VMs and vCPUs are reached through the table and the loaded set; each use says why the
// object is alive.
#![expect(unsafe_code)]

use crate::error::Error;
use crate::guest::Guest;
use crate::hypervisor::{Hypervisor, Loaded};
use crate::interrupts::Interface;
use crate::lock::Lock;
use crate::page::Pages;
use crate::place::Placed;
use crate::platform::{MAX_PROCESSORS, Platform, read, write};
use crate::request::Stopped;
use crate::shared::{HostVcpu, HostVm};
use crate::stack::{HostStack, Stack};
use crate::vm::{Handle, MAX_VCPUS, Registers, Slot, Vcpu, VcpuInner, Vm};
use core::sync::atomic::{AtomicBool, Ordering};
use twofold_arch::stage2::{Geometry, Granule, Layout};
use twofold_arch::{Hfn, Hpa, PAGE_SIZE};

/// The IPA size of a VM whose host asks for none.
const DEFAULT_IPA_BITS: u32 = 40;

impl<P: Platform> Hypervisor<'_, P> {
    /// Reserves a handle for the host VM whose record is at `host_vm`.
    ///
    /// # Errors
    /// [`Error::Exists`] if it has one; [`Error::NoMemory`] if all are taken.
    pub fn reserve_vm(&self, host_vm: Hpa) -> Result<Handle, Error> {
        self.vms.lock().reserve(host_vm)
    }

    /// Gives up a handle that no VM was built for.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is anything but reserved.
    pub fn unreserve_vm(&self, handle: Handle) -> Result<(), Error> {
        self.vms.lock().unreserve(handle)
    }

    /// Builds a VM. `host_vm` is the address of the host's record ([`HostVm`]), in a page that is
    /// shared with the hypervisor; `area` a page for the hypervisor's own record and `root` the
    /// pages for the guest's root table, which are donated.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a number in the record makes no sense or the handle is not reserved
    /// for this host VM; [`Error::Exists`] if it has a VM; [`Error::NotPermitted`] if the record is
    /// not shared or the pages are not the host's alone; [`Error::NoMemory`]. Nothing is left
    /// behind.
    pub fn init_vm(&self, host_vm: Hpa, area: Hfn, root: Hfn) -> Result<Handle, Error> {
        let record = HostVm::at(host_vm)?;
        self.pin(record.page())?;
        let result = self.init_pinned_vm(host_vm, record, area, root);
        if result.is_err() {
            self.unpin(record.page())?;
        }
        result
    }

    fn init_pinned_vm(
        &self,
        host_vm: Hpa,
        record: HostVm,
        area: Hfn,
        root: Hfn,
    ) -> Result<Handle, Error> {
        // Everything that the host says is read here, once.
        let handle = Handle::new(record.handle(self.platform())).ok_or(Error::Invalid)?;
        let vcpus = record.created_vcpus(self.platform());
        let (protected, ipa_bits) = record.kind(self.platform())?;
        if vcpus == 0 || vcpus > MAX_VCPUS as u64 {
            return Err(Error::Invalid);
        }
        let geometry = self.guest_geometry(ipa_bits)?;
        let size = u64::from(geometry.root_pages).next_power_of_two();
        if !root.is_aligned(size) {
            return Err(Error::Invalid);
        }
        let root_pages = Pages {
            start: root,
            count: u64::from(geometry.root_pages),
        };
        self.vms.lock().claim(handle, host_vm)?;
        let built = self.receive(Pages::one(area)).and_then(|()| {
            self.receive(root_pages).inspect_err(|_| {
                self.give_back(Pages::one(area));
            })
        });
        if let Err(error) = built {
            self.vms.lock().unclaim(handle);
            return Err(error);
        }
        let guest = Guest::new(root, geometry, handle.vmid());
        let vm = Vm::new(handle, protected, vcpus as usize, host_vm, area, guest);
        let vm = Placed::new(self.platform(), area, vm);
        // From here on it can be found, and it is complete.
        self.vms.lock().publish(handle, vm);
        Ok(handle)
    }

    /// The geometry of a guest with `ipa_bits` bits of address, or the default for 0.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the processors cannot translate that many.
    pub fn guest_geometry(&self, ipa_bits: u32) -> Result<Geometry, Error> {
        let bits = match ipa_bits {
            0 => DEFAULT_IPA_BITS.min(self.caps.pa_bits),
            bits => bits,
        };
        if bits > self.caps.pa_bits {
            return Err(Error::Invalid);
        }
        Geometry::new(Layout::new(Granule::K4, false), bits).map_err(|_| Error::Invalid)
    }

    /// Takes pages from the host and zeroes them.
    fn receive(&self, pages: Pages) -> Result<(), Error> {
        self.host_donate_hyp(pages)?;
        for page in pages.iter() {
            self.platform().wipe(page);
        }
        Ok(())
    }

    /// Gives pages to the host that it gave before; they are wiped.
    ///
    /// # Panics
    /// If the host's pool is out of tables, which giving a page back never needs: the table that
    /// holds its annotation exists.
    fn give_back(&self, pages: Pages) {
        let result = self.hyp_donate_host(pages);
        assert!(
            result.is_ok(),
            "a page of the hypervisor's could not be given back"
        );
    }

    /// Builds a vCPU of a VM. `host_vcpu` is the address of the host's record ([`HostVcpu`]), in a
    /// page that is shared with the hypervisor; `area` a page that is donated.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such VM; [`Error::NotPermitted`] if the record is not
    /// shared or the page is not the host's alone; [`Error::Exists`] if the host's vCPU has one
    /// already; [`Error::Invalid`] if the index is taken or too large, or the VM is dying. Nothing
    /// is left behind.
    pub fn init_vcpu(&self, handle: Handle, host_vcpu: Hpa, area: Hfn) -> Result<(), Error> {
        let record = HostVcpu::at(host_vcpu)?;
        self.pin(record.page())?;
        let result = self.receive(Pages::one(area)).and_then(|()| {
            self.register_vcpu(handle, host_vcpu, record, area)
                .inspect_err(|_| self.give_back(Pages::one(area)))
        });
        if result.is_err() {
            self.unpin(record.page())?;
        }
        result
    }

    fn register_vcpu(
        &self,
        handle: Handle,
        host_vcpu: Hpa,
        record: HostVcpu,
        area: Hfn,
    ) -> Result<(), Error> {
        let index = record.index(self.platform());
        let (pc, argument) = record.entry(self.platform());
        let vms = self.vms.lock();
        let vm = vms.find(handle).ok_or(Error::NotFound)?;
        if vms.is_dying(handle) {
            return Err(Error::Invalid);
        }
        let mut vcpus = vms.vms().flat_map(Vm::vcpus);
        if vcpus.any(|vcpu| vcpu.host_vcpu == host_vcpu) {
            return Err(Error::Exists);
        }
        let index = usize::try_from(index).map_err(|_| Error::Invalid)?;
        let vcpu = Vcpu {
            host_vcpu,
            area,
            loaded: AtomicBool::new(false),
            inner: Lock::new(VcpuInner {
                registers: Registers::entry(pc, argument),
                tables: Stack::new(),
                fault: None,
                stopped: Stopped::Nothing,
                interface: Interface::default(),
                awaits_answer: false,
            }),
        };
        let vcpu = Placed::new(self.platform(), area, vcpu);
        vm.publish(index, vcpu).inspect_err(|_| {
            // SAFETY: nobody has seen it.
            unsafe { vcpu.remove() };
        })
    }

    /// Loads a vCPU on this processor.
    ///
    /// # Errors
    /// [`Error::Busy`] if this processor has one loaded or another has this one;
    /// [`Error::NotFound`] if there is no such VM or vCPU; [`Error::Invalid`] if the VM is dying.
    pub fn vcpu_load(&self, handle: Handle, index: u64) -> Result<(), Error> {
        let mut mine = self.mine()?.lock();
        if mine.is_some() {
            return Err(Error::Busy);
        }
        let mut vms = self.vms.lock();
        let Slot::Ready { vm, users, dying } = vms.slot(handle) else {
            return Err(Error::NotFound);
        };
        if *dying {
            return Err(Error::Invalid);
        }
        // SAFETY: the table is locked, so the VM stays.
        let found = unsafe { vm.get() };
        let index = usize::try_from(index).map_err(|_| Error::NotFound)?;
        let vcpu = found.placed_vcpu(index).ok_or(Error::NotFound)?;
        // SAFETY: a vCPU lives as long as its VM.
        if unsafe { vcpu.get() }.loaded.swap(true, Ordering::AcqRel) {
            return Err(Error::Busy);
        }
        *users += 1;
        *mine = Some(Loaded { vm: *vm, vcpu });
        drop(vms);
        if let Some(gic) = self.platform().virtual_gic() {
            // SAFETY: it is loaded, so it cannot end.
            let vcpu = unsafe { vcpu.get() };
            gic.load(&vcpu.inner.lock().interface);
        }
        Ok(())
    }

    /// Puts the vCPU that this processor has loaded.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it has none.
    pub fn vcpu_put(&self) -> Result<(), Error> {
        let mut mine = self.mine()?.lock();
        let loaded = mine.take().ok_or(Error::Invalid)?;
        // SAFETY: the vCPU is loaded, so its VM cannot end.
        let (vm, vcpu) = unsafe { (loaded.vm.get(), loaded.vcpu.get()) };
        if let Some(gic) = self.platform().virtual_gic() {
            vcpu.inner.lock().interface = gic.save();
        }
        let mut vms = self.vms.lock();
        vcpu.loaded.store(false, Ordering::Release);
        if let Slot::Ready { users, .. } = vms.slot(vm.handle) {
            *users -= 1;
        }
        Ok(())
    }

    fn mine(&self) -> Result<&Lock<Option<Loaded>>, Error> {
        let number = self.platform().processor();
        debug_assert!(number < MAX_PROCESSORS);
        self.loaded.get(number).ok_or(Error::Invalid)
    }

    /// Calls `body` with the vCPU that this processor has loaded.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it has none; the body's.
    pub(crate) fn with_loaded<T>(
        &self,
        body: impl FnOnce(&Vm, &Vcpu) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mine = self.mine()?.lock();
        let loaded = mine.ok_or(Error::Invalid)?;
        // SAFETY: a loaded vCPU and its VM cannot end, and only this processor puts it, which it
        // does not do meanwhile.
        let (vm, vcpu) = unsafe { (loaded.vm.get(), loaded.vcpu.get()) };
        body(vm, vcpu)
    }

    /// The same with the vCPU's record, if its address is `host_vcpu`: the host names the vCPU that
    /// it means, and the name is only compared.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is another's.
    pub(crate) fn with_named<T>(
        &self,
        host_vcpu: Hpa,
        body: impl FnOnce(&Vm, &Vcpu, HostVcpu) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.with_loaded(|vm, vcpu| {
            if vcpu.host_vcpu != host_vcpu {
                return Err(Error::Invalid);
            }
            body(vm, vcpu, HostVcpu::at(host_vcpu)?)
        })
    }

    /// Fills the loaded vCPU's stock of tables from the host's stack, so that it has what the
    /// deepest path needs. Each page is donated before a word of it is believed.
    pub(crate) fn refill(&self, vm: &Vm, vcpu: &Vcpu, tables: &mut Stack) -> Result<(), Error> {
        let needed = u64::from(vm.guest.lock().geometry().tables_per_page());
        if tables.count() >= needed {
            return Ok(());
        }
        let stack = HostVcpu::at(vcpu.host_vcpu)?.tables()?;
        let (mut head, mut count) = stack.read(self.platform());
        let mut result = Ok(());
        while tables.count() < needed && count > 0 {
            let address = Hpa::new(head);
            if !address.is_aligned(PAGE_SIZE) {
                result = Err(Error::Invalid);
                break;
            }
            let page = address.frame();
            if let Err(error) = self.host_donate_hyp(Pages::one(page)) {
                result = Err(error);
                break;
            }
            head = read(self.platform(), page, 0);
            count -= 1;
            self.platform().wipe(page);
            tables.push(self.platform(), page);
        }
        stack.write(self.platform(), head, count);
        result
    }

    /// The first half of the end: no vCPU can be loaded from now on, and pages can be reclaimed.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such VM, a vCPU is loaded, or it is dying already.
    pub fn start_teardown_vm(&self, handle: Handle) -> Result<(), Error> {
        match self.vms.lock().slot(handle) {
            Slot::Ready {
                users: 0, dying, ..
            } if !*dying => {
                *dying = true;
                Ok(())
            }
            _ => Err(Error::Invalid),
        }
    }

    /// The second half: the VM is no more. Its table pages, wiped, go to the host's stack for
    /// them, its own pages and its vCPUs' to the other (see [`HostVm`]), and the host's records are
    /// no longer pinned.
    ///
    /// # Errors
    /// [`Error::Invalid`] unless the VM is dying; [`Error::Busy`] while the guest still has or
    /// borrows a page.
    pub fn finalize_teardown_vm(&self, handle: Handle) -> Result<(), Error> {
        let mut vms = self.vms.lock();
        let Slot::Ready {
            vm,
            users: 0,
            dying: true,
        } = *vms.slot(handle)
        else {
            return Err(Error::Invalid);
        };
        // SAFETY: the table is locked; the VM stays until the slot is emptied below.
        let found = unsafe { vm.get() };
        if found.guest.lock().mapped() != 0 {
            return Err(Error::Busy);
        }
        let record = HostVm::at(found.host_vm)?;
        let (own, tables) = (record.teardown()?, record.table_teardown()?);
        let area = found.area;
        let host_vm = found.host_vm;
        *vms.slot(handle) = Slot::Claimed { host_vm };
        drop(vms);
        // Nobody finds it any more, and nobody has it loaded: it is ours alone. The slot stays
        // claimed, since a new VM in it would have the same VMID before the TLBs have forgotten it.
        let placeholder = Guest::new(area, found.guest.lock().geometry(), handle.vmid());
        let guest = core::mem::replace(&mut *found.guest.lock(), placeholder);
        guest.dissolve(&self.storage, |page| self.hand_over(tables, page));
        for index in 0..found.created_vcpus {
            let Some(placed) = found.placed_vcpu(index) else {
                continue;
            };
            // SAFETY: the vCPU lives as long as its VM.
            let vcpu = unsafe { placed.get() };
            let (area, host_vcpu) = (vcpu.area, vcpu.host_vcpu);
            let mut stock = core::mem::take(&mut vcpu.inner.lock().tables);
            while let Some(page) = stock.pop(self.platform()) {
                self.hand_over(tables, page);
            }
            // SAFETY: no processor has it loaded, and its VM cannot be found.
            unsafe { placed.remove() };
            self.hand_over(own, area);
            self.unpin(host_vcpu.frame())?;
        }
        // SAFETY: nobody can find it, and every vCPU is gone.
        unsafe { vm.remove() };
        self.hand_over(own, area);
        let result = self.unpin(record.page());
        *self.vms.lock().slot(handle) = Slot::Free;
        result
    }

    /// Gives a page of the hypervisor's to the host, in one of the host's stacks. The record that
    /// holds the stack is pinned. The page is wiped, but for the link.
    fn hand_over(&self, stack: HostStack, page: Hfn) {
        let (head, count) = stack.read(self.platform());
        self.platform().wipe(page);
        write(self.platform(), page, 0, head);
        let result = self.donate_back(Pages::one(page), false);
        assert!(
            result.is_ok(),
            "a page of the hypervisor's could not be given back"
        );
        stack.write(self.platform(), page.address().get(), count.wrapping_add(1));
    }
}
