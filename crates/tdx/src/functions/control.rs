//! The life of a TD and of its virtual processors.

// UNSAFETY: makes a claimed page the root of a Secure EPT.
#![expect(unsafe_code)]

use crate::legality::{Function, OpState};
use crate::module::{Failure, Module};
use crate::pamt::PageType;
use crate::platform::{Platform, Point};
use crate::sept::{Sept, SeptEntry};
use crate::status::{Operand, Status};
use crate::td::{Lifecycle, Running, TD_PARAMS_BYTES, Td, TdParams};
use crate::vcpu::{TDVPX_PAGES, Vcpu};
use crate::{Entered, TDCX_PAGES, TDCX_SEPT_ROOT};
use alloc::sync::Arc;
use twofold_arch::Hpa;
use twofold_table::sync::atomic::Ordering;

impl<P: Platform> Module<P> {
    /// TDH.MNG.CREATE: makes the free page `tdr` the root page of a new TD with the key `hkid`.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn mng_create(&self, tdr: Hpa, hkid: u16) -> Result<(), Failure> {
        if !self.private_keys.contains(&hkid) {
            return Err(Status::OPERAND_INVALID.with(Operand::Rdx).into());
        }
        let mut keys = self.keys.lock();
        if keys.contains(&hkid) {
            return Err(Status::HKID_NOT_FREE.with(Operand::Rdx).into());
        }
        self.claim(tdr, 0, PageType::Tdr, tdr, Operand::Rcx)?;
        keys.insert(hkid);
        self.tds
            .write()
            .insert(tdr.get(), Arc::new(Td::new(tdr, hkid)));
        Ok(())
    }

    /// TDH.MNG.KEY.CONFIG: sets the TD's key up.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn mng_key_config(&self, tdr: Hpa) -> Result<(), Failure> {
        let td = self.td(tdr, Operand::Rcx)?;
        let _td = td.lock(self.platform(), true)?;
        td.requires(Lifecycle::HkidAssigned)?;
        td.set_lifecycle(Lifecycle::KeysConfigured);
        Ok(())
    }

    /// TDH.MNG.ADDCX: gives the TD the free page `page` as one of its
    /// [`TDCX_PAGES`] control pages.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn mng_add_cx(&self, page: Hpa, tdr: Hpa) -> Result<(), Failure> {
        let td = self.td(tdr, Operand::Rdx)?;
        let _td = td.lock(self.platform(), true)?;
        td.requires(Lifecycle::KeysConfigured)?;
        let mut control = td.control.lock();
        if control.len() == TDCX_PAGES {
            return Err(Status::TDCX_NUM_INCORRECT.into());
        }
        self.claim(page, 0, PageType::Tdcx, tdr, Operand::Rcx)?;
        td.add_children(1);
        control.push(page);
        Ok(())
    }

    /// TDH.MNG.INIT: sets the TD's parameters from the structure at `params`, in ordinary memory.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn mng_init(&self, tdr: Hpa, params: Hpa) -> Result<(), Failure> {
        let td = self.td(tdr, Operand::Rcx)?;
        let _td = td.lock(self.platform(), true)?;
        td.requires(Lifecycle::KeysConfigured)?;
        crate::legality::op_state_allows(Function::MngInit, td.op_state())?;
        let control = td.control.lock();
        let &[_, .., root] = control.as_slice() else {
            return Err(Status::TDCX_NUM_INCORRECT.into());
        };
        if control.len() != TDCX_PAGES {
            return Err(Status::TDCX_NUM_INCORRECT.into());
        }
        debug_assert_eq!(control[TDCX_SEPT_ROOT], root);
        let mut bytes = [0; TD_PARAMS_BYTES];
        if !params.is_aligned(TD_PARAMS_BYTES as u64) || !self.platform().read(params, &mut bytes) {
            return Err(Status::OPERAND_INVALID.with(Operand::Rdx).into());
        }
        let params = TdParams::parse(&bytes)?;
        // SAFETY: the page was claimed for this TD and stays until the TD is torn down; nobody has
        // used it.
        let sept = unsafe {
            self.pages.fill(root, |_| SeptEntry::FREE);
            Sept::new(root, params.levels)
        };
        td.running.call_once(|| Running { params, sept });
        td.set_op_state(OpState::Initialized);
        Ok(())
    }

    /// Where the root of the TD's Secure EPT is, for the processor that walks it, and its levels.
    pub fn sept_root(&self, tdr: Hpa) -> Option<(Hpa, u8)> {
        let td = self.td(tdr, Operand::Rcx).ok()?;
        let running = td.running.get()?;
        Some((running.sept.page(), running.params.levels))
    }

    /// The TD's parameters, once it is initialised.
    pub fn params(&self, tdr: Hpa) -> Option<TdParams> {
        let td = self.td(tdr, Operand::Rcx).ok()?;
        td.running.get().map(|running| running.params)
    }

    /// TDH.VP.CREATE: makes the free page `tdvpr` the root page of a new virtual processor.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn vp_create(&self, tdvpr: Hpa, tdr: Hpa) -> Result<(), Failure> {
        let td = self.td(tdr, Operand::Rdx)?;
        let _td = td.lock(self.platform(), false)?;
        let running = td.allows(Function::VpCreate)?;
        let index = td.vcpus.fetch_add(1, Ordering::SeqCst);
        let claimed = if index < u64::from(running.params.max_vcpus) {
            self.claim(tdvpr, 0, PageType::Tdvpr, tdr, Operand::Rcx)
        } else {
            Err(Status::OPERAND_INVALID.with(Operand::Rdx))
        };
        if let Err(status) = claimed {
            td.vcpus.fetch_sub(1, Ordering::SeqCst);
            return Err(status.into());
        }
        td.add_children(1);
        let vcpu = Vcpu::new(tdvpr, Arc::clone(&td), index as u32);
        self.vcpus.write().insert(tdvpr.get(), Arc::new(vcpu));
        Ok(())
    }

    /// TDH.VP.ADDCX: gives the virtual processor the free page `page` as one of its
    /// [`TDVPX_PAGES`](crate::TDVPX_PAGES) control pages.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn vp_add_cx(&self, page: Hpa, tdvpr: Hpa) -> Result<(), Failure> {
        let vcpu = self.vcpu(tdvpr)?;
        let _td = vcpu.td.lock(self.platform(), false)?;
        vcpu.td.allows(Function::VpAddCx)?;
        let mut control = vcpu.control.lock();
        if *control == TDVPX_PAGES {
            return Err(Status::VCPU_STATE_INCORRECT.into());
        }
        self.claim(page, 0, PageType::Tdvpx, vcpu.td.tdr, Operand::Rcx)?;
        vcpu.td.add_children(1);
        *control += 1;
        Ok(())
    }

    /// TDH.VP.INIT: initialises a virtual processor; the guest will find `initial` in RCX and R8.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn vp_init(&self, tdvpr: Hpa, initial: u64) -> Result<(), Failure> {
        let vcpu = self.vcpu(tdvpr)?;
        let _td = vcpu.td.lock(self.platform(), false)?;
        vcpu.td.allows(Function::VpInit)?;
        if *vcpu.control.lock() != TDVPX_PAGES || vcpu.is_initialized() {
            return Err(Status::VCPU_STATE_INCORRECT.into());
        }
        vcpu.initial.store(initial, Ordering::SeqCst);
        vcpu.set_initialized();
        vcpu.associate();
        Ok(())
    }

    /// TDH.VP.ENTER: the virtual processor is inside until the result is dropped.
    ///
    /// # Errors
    /// See [`Failure`]; `OPERAND_BUSY` of the epoch while someone begins a new one.
    pub fn vp_enter(&self, tdvpr: Hpa) -> Result<Entered<'_, P>, Failure> {
        let vcpu = self.vcpu(tdvpr)?;
        vcpu.td.allows(Function::VpEnter)?;
        if !vcpu.is_initialized() {
            return Err(Status::VCPU_STATE_INCORRECT.into());
        }
        if !vcpu.try_enter() {
            return Err(Status::OPERAND_BUSY.with(Operand::Tdvps).into());
        }
        let epoch = if self.platform().injects_busy(Point::TdEpoch) {
            Err(Status::OPERAND_BUSY.with(Operand::TdEpoch))
        } else {
            vcpu.td.epochs.enter()
        };
        match epoch {
            Ok(epoch) => {
                vcpu.associate();
                let entered = Entered::new(self, vcpu, epoch);
                // A flush that found nobody associated may have come in between.
                entered.still_allowed()?;
                Ok(entered)
            }
            Err(status) => {
                vcpu.leave();
                Err(status.into())
            }
        }
    }

    /// TDH.VP.FLUSH: takes the virtual processor from its logical processor.
    ///
    /// # Errors
    /// See [`Failure`]; `OPERAND_BUSY` while it is inside.
    pub fn vp_flush(&self, tdvpr: Hpa) -> Result<(), Failure> {
        let vcpu = self.vcpu(tdvpr)?;
        if vcpu.is_inside() {
            return Err(Status::OPERAND_BUSY.with(Operand::Tdvps).into());
        }
        vcpu.disassociate();
        Ok(())
    }

    /// TDH.MNG.VPFLUSHDONE: every virtual processor was flushed; none may enter again.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn mng_vp_flush_done(&self, tdr: Hpa) -> Result<(), Failure> {
        let td = self.td(tdr, Operand::Rcx)?;
        let _td = td.lock(self.platform(), true)?;
        if td.lifecycle() != Lifecycle::HkidAssigned {
            td.requires(Lifecycle::KeysConfigured)?;
        }
        // In this order: who enters later finds the life cycle, who entered before is counted.
        let before = td.lifecycle();
        td.set_lifecycle(Lifecycle::Blocked);
        if td.associated.load(Ordering::SeqCst) != 0 {
            td.set_lifecycle(before);
            return Err(Status::FLUSHVP_NOT_DONE.into());
        }
        Ok(())
    }

    /// TDH.MNG.KEY.FREEID: the TD's key goes; its pages can be reclaimed.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn mng_key_free_id(&self, tdr: Hpa) -> Result<(), Failure> {
        let td = self.td(tdr, Operand::Rcx)?;
        let _td = td.lock(self.platform(), true)?;
        td.requires(Lifecycle::Blocked)?;
        td.set_lifecycle(Lifecycle::Teardown);
        self.keys.lock().remove(&td.hkid);
        Ok(())
    }
}
