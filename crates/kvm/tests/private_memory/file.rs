//! The life of a guest memory file.

use super::*;

#[test]
fn row_48_a_guest_memory_file_can_do_what_kvms_can_and_nothing_else() {
    let guest = Protected::new();
    for (size, flags) in [
        (0, 0),
        (1, 0),
        (PAGE + 1, 0),
        (1 << 63, 0),
        (PAGE, 1),
        (PAGE, 2),
        (PAGE, 1 << 63),
    ] {
        let request = kvm_create_guest_memfd {
            size,
            flags,
            ..Default::default()
        };
        assert_eq!(
            guest.vm.set(KVM_CREATE_GUEST_MEMFD, request),
            Err(Errno::INVAL)
        );
    }
    let file = guest.file.as_ref().unwrap();
    assert_eq!(abi::before_read(file.0), Some(Errno::INVAL));
    assert_eq!(abi::before_write(file.0), Some(Errno::INVAL));
    assert_eq!(abi::before_truncate(file.0), Some(Errno::INVAL));
    assert_eq!(file.call(KVM_RUN, 0), Err(Errno::NOTTY));
    let mmap = abi::mmap_check(file.0, 3, libc::MAP_SHARED, 0, 4096);
    assert_eq!(mmap, Some(Errno::NODEV));
    let stat = rustix::fs::fstat(file.borrow()).unwrap();
    assert_eq!((stat.st_size as u64, stat.st_blksize), (PAGES * PAGE, 4096));
    assert_eq!(stat.st_blocks, 0);
    // Even behind the library's back there is nothing to write to, and nothing to read.
    assert!(rustix::io::pwrite(file.borrow(), b"x", 0).is_err());
    guest.set_private(0, PAGES, true);
    guest.write(0, 0x5a5a);
    let mut byte = [1; 2];
    rustix::io::pread(file.borrow(), &mut byte, 0).unwrap();
    assert_eq!(byte, [0, 0]);

    let (page, size) = (PAGE as i64, (PAGES * PAGE) as i64);
    for (mode, offset, length, expected) in [
        (KEEP_SIZE, 0, size, Ok(())),
        (KEEP_SIZE, size, page, Err(Errno::INVAL)),
        (KEEP_SIZE, 1, page, Err(Errno::INVAL)),
        (KEEP_SIZE, 0, page - 1, Err(Errno::INVAL)),
        (KEEP_SIZE, 0, 0, Err(Errno::INVAL)),
        (KEEP_SIZE, -page, page, Err(Errno::INVAL)),
        (0, 0, page, Err(Errno::OPNOTSUPP)),
        (libc::FALLOC_FL_PUNCH_HOLE, 0, page, Err(Errno::OPNOTSUPP)),
        (
            KEEP_SIZE | libc::FALLOC_FL_ZERO_RANGE,
            0,
            page,
            Err(Errno::OPNOTSUPP),
        ),
        (PUNCH, size, page, Ok(())),
        (PUNCH, size + page, page, Ok(())),
        (PUNCH, 0, page + 1, Err(Errno::INVAL)),
        (PUNCH, i64::MAX - page + 1, page, Err(Errno::FBIG)),
    ] {
        assert_eq!(
            guest.fallocate(mode, offset, length),
            expected,
            "{mode:#x} {offset} {length}"
        );
    }
    assert_eq!(guest.read(0), 0x5a5a, "allocating keeps what is there");
}

#[test]
fn row_48_slots_are_bound_to_files_as_kvm_binds_them() {
    let guest = Protected::new();
    let hva = guest.shared.address();
    let file = guest.file.as_ref().unwrap();
    let set = |region| guest.vm.set(KVM_SET_USER_MEMORY_REGION2, region);
    let at = 1 << 30;
    let mut closed = slot(2, at, 1, hva, Some((file, 0)));
    closed.guest_memfd = 0x7fff_0000;
    assert_eq!(set(closed), Err(Errno::BADF));
    closed.guest_memfd = u32::MAX;
    assert_eq!(set(closed), Err(Errno::BADF));
    let other_vm = guest
        .kvm
        .descriptor(KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM as usize);
    let foreign = create_file(&other_vm, PAGE).unwrap();
    for (file, offset, pages, expected) in [
        (&guest.vm, 0, 1, Err(Errno::INVAL)),
        (&guest.kvm, 0, 1, Err(Errno::INVAL)),
        (&foreign, 0, 1, Err(Errno::INVAL)),
        (file, 1, 1, Err(Errno::INVAL)),
        (file, 0_u64.wrapping_sub(PAGE), 2, Err(Errno::INVAL)),
        (file, 2 * PAGE, PAGES, Err(Errno::INVAL)),
        (file, 2 * PAGE, 2, Err(Errno::EXIST)),
    ] {
        assert_eq!(set(slot(2, at, pages, hva, Some((file, offset)))), expected);
    }
    let plain = rustix::fs::memfd_create("plain", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut region = slot(2, at, 1, hva, Some((file, 0)));
    region.guest_memfd = std::os::fd::AsRawFd::as_raw_fd(&plain) as u32;
    assert_eq!(set(region), Err(Errno::INVAL));
    // The old call does not know of files.
    let mut old = region_v1(2, at, PAGE, hva);
    old.flags = KVM_MEM_GUEST_MEMFD;
    assert_eq!(
        guest.vm.set(KVM_SET_USER_MEMORY_REGION, old),
        Err(Errno::INVAL)
    );
    // A slot that is deleted gives its part back.
    assert_eq!(set(slot(1, DATA, 0, 0, None)), Ok(0));
    assert_eq!(set(slot(2, at, 2, hva, Some((file, 2 * PAGE)))), Ok(0));
}

fn region_v1(id: u32, gpa: u64, size: u64, hva: u64) -> kvm_userspace_memory_region {
    region(id, gpa, size, hva)
}

#[test]
fn row_48_when_the_last_descriptor_goes_the_slot_loses_its_private_half() {
    let mut guest = Protected::new();
    guest.set_private(0, 4, true);
    guest.write(1, 0x7777);
    let copy = guest.file.as_ref().unwrap().duplicate();
    guest.file = None;
    assert_eq!(guest.read(1), 0x7777, "a copy keeps the file");
    drop(copy);
    assert_eq!(guest.start(READ, 0, PAGE), Err(Errno::FAULT));
    let private = u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE);
    assert_eq!(guest.memory_fault(), (private, DATA + PAGE, PAGE));
    // The shared half is still there.
    guest.write(8, 3);
    guest.set_private(1, 1, false);
    assert_eq!(guest.read(1), 0);
}

#[test]
fn row_48_a_file_outlives_the_descriptors_of_its_vm() {
    let guest = Protected::new();
    guest.set_private(0, PAGES, true);
    guest.write(2, 1);
    let Protected {
        vcpu,
        run,
        file,
        vm,
        shared,
        ..
    } = guest;
    drop((vm, vcpu, run, shared));
    let file = file.unwrap();
    let size = (PAGES * PAGE) as i64;
    assert_eq!(abi::fallocate(file.0, PUNCH, 0, size), Some(Ok(())));
    assert_eq!(abi::fallocate(file.0, KEEP_SIZE, 0, size), Some(Ok(())));
}
