//! ioctls on a VM.

use super::number::*;
use super::{Reply, unknown};
use crate::capability;
use crate::descriptor;
use crate::object::Object;
use crate::stats_file::StatsFile;
use crate::usercopy::{Plain, read, read_slice, write, write_slice};
use crate::vm::Vm;
use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, kvm_clear_dirty_log,
    kvm_create_guest_memfd, kvm_dirty_log, kvm_irq_level, kvm_irq_routing_entry, kvm_irqchip,
    kvm_msr_filter, kvm_msr_filter_range, kvm_pit_config, kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
};
use rustix::io::Errno;
use std::mem::size_of;
use std::sync::Arc;
use twofold_abi::spp::kvm_subpage;

/// Flags that `KVM_SET_USER_MEMORY_REGION` takes.
const REGION_V1_FLAGS: u32 = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY;

pub(super) fn ioctl(vm: &Arc<Vm>, request: u64, argument: usize) -> Reply {
    if !vm.is_ours() || vm.is_bugged() {
        return Err(Errno::IO);
    }
    match request {
        KVM_CREATE_VCPU => create_vcpu(vm, argument),
        KVM_SET_USER_MEMORY_REGION => set_user_memory_region(vm, argument),
        KVM_SET_USER_MEMORY_REGION2 => done(vm.set_user_memory_region(&read(argument)?)),
        KVM_SET_MEMORY_ATTRIBUTES => done(vm.set_memory_attributes(&read(argument)?)),
        KVM_CREATE_GUEST_MEMFD => create_guest_memfd(vm, argument),
        KVM_MEMORY_ENCRYPT_OP => done(vm.memory_encrypt_op(argument)),
        KVM_GET_DIRTY_LOG => get_dirty_log(vm, argument),
        KVM_CLEAR_DIRTY_LOG => clear_dirty_log(vm, argument),
        KVM_RESET_DIRTY_RINGS => Ok(vm.reset_dirty_rings()? as i32),
        KVM_CHECK_EXTENSION => {
            Ok(capability::check_vm(vm.vm_type(), vm.second_stage(), argument as u64) as i32)
        }
        KVM_ENABLE_CAP => done(vm.enable_cap(&read(argument)?)),
        KVM_SET_NR_MMU_PAGES => done(vm.set_nr_mmu_pages(argument as u64)),
        KVM_GET_NR_MMU_PAGES => Ok(vm.get_nr_mmu_pages() as i32),
        KVM_SET_TSS_ADDR => done(vm.set_tss_addr(argument as u64)),
        KVM_SET_IDENTITY_MAP_ADDR => {
            vm.set_identity_map_addr()?;
            read::<u64>(argument).map(|_| 0)
        }
        KVM_SET_BOOT_CPU_ID => done(vm.set_boot_cpu_id(argument as u64)),
        KVM_CREATE_IRQCHIP => done(vm.create_irqchip()),
        KVM_GET_IRQCHIP => {
            // Only the first word says which; the whole structure comes in, as with KVM.
            let chip: kvm_irqchip = read(argument)?;
            reply(argument, vm.get_irqchip(chip.chip_id))
        }
        KVM_SET_IRQCHIP => done(vm.set_irqchip(&read(argument)?)),
        KVM_CREATE_PIT => done(vm.create_pit(&kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })),
        KVM_CREATE_PIT2 => {
            let config: kvm_pit_config = read(argument)?;
            done(vm.create_pit(&config))
        }
        KVM_GET_PIT2 => reply(argument, vm.get_pit()),
        KVM_SET_PIT2 => done(vm.set_pit(&read(argument)?)),
        KVM_IRQ_LINE | KVM_IRQ_LINE_STATUS => {
            let mut line: kvm_irq_level = read(argument)?;
            // UNSAFETY: reads a union.
            #[expect(unsafe_code)]
            // SAFETY: both members are the same integer.
            let irq = unsafe { line.__bindgen_anon_1.irq };
            let status = vm.irq_line(irq, line.level != 0)?;
            if request == KVM_IRQ_LINE_STATUS {
                line.__bindgen_anon_1.status = status;
                write(argument, &line)?;
            }
            Ok(0)
        }
        KVM_SET_GSI_ROUTING => set_gsi_routing(vm, argument),
        KVM_SIGNAL_MSI => vm.signal_msi(&read(argument)?),
        KVM_IRQFD => done(vm.irqfd(&read(argument)?)),
        KVM_IOEVENTFD => done(vm.ioeventfd(&read(argument)?)),
        KVM_REGISTER_COALESCED_MMIO => done(vm.register_coalesced_mmio(&read(argument)?)),
        KVM_UNREGISTER_COALESCED_MMIO => done(vm.unregister_coalesced_mmio(&read(argument)?)),
        KVM_GET_TSC_KHZ => Ok(vm.get_tsc_khz() as i32),
        KVM_SET_TSC_KHZ => done(vm.set_tsc_khz(argument as u32)),
        KVM_GET_CLOCK => reply(argument, Ok(vm.get_clock())),
        KVM_SET_CLOCK => done(vm.set_clock(&read(argument)?)),
        KVM_X86_SET_MSR_FILTER => done(vm.set_msr_filter(&read_msr_filter(argument)?)),
        KVM_SUBPAGES_GET_ACCESS => get_sub_page_access(vm, argument),
        KVM_SUBPAGES_SET_ACCESS => set_sub_page_access(vm, argument),
        KVM_GET_STATS_FD => {
            let (stats, file) = StatsFile::of_vm(vm)?;
            Ok(descriptor::install(file, Object::Stats(Arc::new(stats))))
        }
        _ => Err(unknown("VM", request)),
    }
}

/// The header of a request about access maps, copied in once, and where its maps are.
fn sub_page_header(argument: usize) -> Result<(kvm_subpage, usize), Errno> {
    let header: kvm_subpage = read(argument)?;
    let maps = argument
        .checked_add(size_of::<kvm_subpage>())
        .ok_or(Errno::FAULT)?;
    Ok((header, maps))
}

fn get_sub_page_access(vm: &Vm, argument: usize) -> Reply {
    let (header, place) = sub_page_header(argument)?;
    let maps = vm.get_sub_page_access(&header)?;
    write_slice(place, &maps)?;
    Ok(maps.len() as i32)
}

fn set_sub_page_access(vm: &Vm, argument: usize) -> Reply {
    let (header, place) = sub_page_header(argument)?;
    vm.set_sub_page_access(&header, |count| read_slice(place, count))?;
    Ok(header.npages as i32)
}

fn done(result: Result<(), Errno>) -> Reply {
    result.map(|()| 0)
}

fn reply<T: Plain>(address: usize, value: Result<T, Errno>) -> Reply {
    write(address, &value?)?;
    Ok(0)
}

fn create_vcpu(vm: &Arc<Vm>, id: usize) -> Reply {
    let (vcpu, file) = vm.create_vcpu(id as u64)?;
    Ok(descriptor::install(file, Object::Vcpu(vcpu)))
}

fn create_guest_memfd(vm: &Arc<Vm>, argument: usize) -> Reply {
    let request: kvm_create_guest_memfd = read(argument)?;
    let (memory, file) = vm.create_guest_memfd(request.size, request.flags)?;
    Ok(descriptor::install(
        file,
        Object::GuestMemory(Arc::new(memory)),
    ))
}

fn set_user_memory_region(vm: &Vm, argument: usize) -> Reply {
    let region: kvm_userspace_memory_region = read(argument)?;
    if region.flags & !REGION_V1_FLAGS != 0 {
        return Err(Errno::INVAL);
    }
    done(vm.set_user_memory_region(&kvm_userspace_memory_region2 {
        slot: region.slot,
        flags: region.flags,
        guest_phys_addr: region.guest_phys_addr,
        memory_size: region.memory_size,
        userspace_addr: region.userspace_addr,
        ..Default::default()
    }))
}

fn get_dirty_log(vm: &Vm, argument: usize) -> Reply {
    let log: kvm_dirty_log = read(argument)?;
    let bitmap = vm.get_dirty_log(log.slot)?;
    // UNSAFETY: reads a union.
    #[expect(unsafe_code)]
    // SAFETY: both members are 64-bit integers or pointers.
    let address = unsafe { log.__bindgen_anon_1.padding2 };
    write_slice(address as usize, &bitmap)?;
    Ok(0)
}

fn clear_dirty_log(vm: &Vm, argument: usize) -> Reply {
    let log: kvm_clear_dirty_log = read(argument)?;
    // UNSAFETY: reads a union.
    #[expect(unsafe_code)]
    // SAFETY: both members are 64-bit integers or pointers.
    let address = unsafe { log.__bindgen_anon_1.padding2 };
    done(
        vm.clear_dirty_log(log.slot, log.first_page, log.num_pages, |words| {
            read_slice(address as usize, words)
        }),
    )
}

/// `struct kvm_msr_filter`, which has pointers and padding: flags, then 16 times flags and count,
/// base, and the address of the bitmap.
fn read_msr_filter(argument: usize) -> Result<kvm_msr_filter, Errno> {
    const WORDS: usize = size_of::<kvm_msr_filter>() / size_of::<u64>();
    let words: Vec<u64> = read_slice(argument, WORDS)?;
    let (flags, ranges) = words.split_first().ok_or(Errno::FAULT)?;
    let mut filter = kvm_msr_filter {
        flags: *flags as u32,
        ..Default::default()
    };
    for (range, words) in filter.ranges.iter_mut().zip(ranges.chunks_exact(3)) {
        *range = kvm_msr_filter_range {
            flags: words[0] as u32,
            nmsrs: (words[0] >> 32) as u32,
            base: words[1] as u32,
            bitmap: std::ptr::with_exposed_provenance_mut(words[2] as usize),
        };
    }
    Ok(filter)
}

fn set_gsi_routing(vm: &Vm, argument: usize) -> Reply {
    let [routes, flags]: [u32; 2] = read(argument)?;
    vm.check_gsi_routing(routes, flags)?;
    let entries = argument.checked_add(8).ok_or(Errno::FAULT)?;
    let entries: Vec<kvm_irq_routing_entry> = read_slice(entries, routes as usize)?;
    done(vm.set_gsi_routing(&entries))
}
