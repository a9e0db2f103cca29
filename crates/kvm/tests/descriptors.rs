//! The life of descriptors: any order of closing, duplicates, forked children.

mod common;

use common::*;
use twofold_kvm::abi;

#[test]
fn descriptors_can_be_closed_in_any_order() {
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1]] {
        let kvm = Fd::open();
        let vm = kvm.descriptor(KVM_CREATE_VM, 0);
        let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
        let stats = vcpu.descriptor(KVM_GET_STATS_FD, 0);
        let mut fds = [Some(kvm), Some(vm), Some(vcpu), Some(stats)];
        for index in order {
            fds[index] = None;
            if let Some(vcpu) = &fds[2] {
                let _: kvm_bindings::kvm_regs = vcpu.get(KVM_GET_REGS);
            }
            if let Some(stats) = &fds[3] {
                assert_eq!(stats.read_at(24, 0).len(), 24);
            }
        }
    }
}

#[test]
fn a_duplicate_outlives_the_original() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let copy = vm.duplicate();
    drop(vm);
    drop(kvm);
    let vcpu = copy.descriptor(KVM_CREATE_VCPU, 0);
    let _: kvm_bindings::kvm_sregs = vcpu.get(KVM_GET_SREGS);
}

#[test]
fn only_vcpus_can_be_mapped_and_only_statistics_can_be_read() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
    let stats = vm.descriptor(KVM_GET_STATS_FD, 0);
    let map = |fd: &Fd| abi::mmap_check(fd.0, 3, libc::MAP_SHARED, 0, 4096);
    assert_eq!(map(&kvm), Some(Errno::NODEV));
    assert_eq!(map(&vm), Some(Errno::NODEV));
    assert_eq!(map(&stats), Some(Errno::NODEV));
    assert_eq!(map(&vcpu), None);
    assert_eq!(abi::before_read(vm.0), Some(Errno::INVAL));
    assert_eq!(abi::before_read(stats.0), None);
    assert_eq!(abi::before_write(stats.0), Some(Errno::BADF));
    assert_eq!(rustix::io::write(stats.borrow(), &[0]), Err(Errno::BADF));
}

#[test]
fn other_descriptors_are_left_alone() {
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&eventfd);
    assert!(!abi::is_ours(fd));
    assert!(abi::ioctl(fd, KVM_RUN, 0).is_none());
    assert!(abi::ioctl(-1, KVM_RUN, 0).is_none());
    assert!(abi::ioctl(i32::MAX, KVM_RUN, 0).is_none());
    let kvm = Fd::open();
    assert!(
        abi::ioctl(kvm.0, 0x5451, 0).is_none(),
        "FIOCLEX is the kernel's"
    );
}

#[test]
fn a_forked_child_gets_eio_and_may_start_anew() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
    // UNSAFETY: forks a process that has threads.
    #[expect(unsafe_code)]
    // SAFETY: the child uses nothing but what is tested here, and leaves without unwinding.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let mut code = 0;
        if vm.call(KVM_CREATE_VCPU, 1) != Err(Errno::IO) {
            code = 1;
        } else if vcpu.call(KVM_RUN, 0) != Err(Errno::IO) {
            code = 2;
        } else {
            let vm = kvm.descriptor(KVM_CREATE_VM, 0);
            let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
            let _: kvm_bindings::kvm_regs = vcpu.get(KVM_GET_REGS);
        }
        drop((vcpu, vm, kvm));
        // UNSAFETY: as above.
        #[expect(unsafe_code)]
        // SAFETY: leaves at once.
        unsafe {
            libc::_exit(code)
        }
    }
    let mut status = 0;
    // UNSAFETY: waits for the child.
    #[expect(unsafe_code)]
    // SAFETY: the status is a local.
    let waited = unsafe { libc::waitpid(pid, &mut status, 0) };
    assert_eq!(waited, pid);
    assert_eq!(status, 0);
    let _: kvm_bindings::kvm_regs = vcpu.get(KVM_GET_REGS);
}

#[test]
fn a_thousand_vcpus_fit_one_vm() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let vcpus: Vec<_> = (0..1024)
        .map_while(|id| vm.call(KVM_CREATE_VCPU, id).map(Fd).ok())
        .collect();
    if vcpus.len() == 1024 {
        assert_eq!(vm.call(KVM_CREATE_VCPU, 2000), Err(Errno::INVAL));
    } else {
        // As many as the process may have descriptors.
        assert_eq!(vm.call(KVM_CREATE_VCPU, 2000), Err(Errno::MFILE));
    }
}

#[test]
fn statistics_have_kvms_layout() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 3);
    for (object, id) in [(&vm, ""), (&vcpu, "/vcpu-3")] {
        let stats = object.descriptor(KVM_GET_STATS_FD, 0);
        let header = stats.read_at(24, 0);
        let word = |index: usize| {
            u32::from_le_bytes(header[4 * index..4 * index + 4].try_into().unwrap()) as usize
        };
        let [flags, name_size, count, id_offset, descriptors, data] =
            [word(0), word(1), word(2), word(3), word(4), word(5)];
        assert_eq!((flags, name_size, id_offset), (0, 48, 24));
        let text = stats.read_at(name_size, id_offset);
        let text = String::from_utf8(text).unwrap();
        let text = text.trim_end_matches('\0');
        assert_eq!(text, format!("kvm-{}{id}", std::process::id()));
        let size = 16 + name_size;
        assert!(descriptors >= 24 + name_size && descriptors + count * size <= data);
        let mut names = Vec::new();
        for index in 0..count {
            let descriptor = stats.read_at(size, descriptors + index * size);
            assert_eq!(
                u16::from_le_bytes([descriptor[6], descriptor[7]]),
                1,
                "one value each"
            );
            let offset = u32::from_le_bytes(descriptor[8..12].try_into().unwrap()) as usize;
            assert_eq!(stats.read_at(8, data + offset).len(), 8);
            let name = String::from_utf8(descriptor[16..].to_vec()).unwrap();
            names.push(name.trim_end_matches('\0').to_owned());
        }
        assert!(
            names
                .iter()
                .all(|name| !name.is_empty() && name.len() < name_size)
        );
        let expected = if id.is_empty() { "pages_4k" } else { "exits" };
        assert!(names.iter().any(|name| name == expected));
        assert_eq!(stats.call(KVM_GET_STATS_FD, 0), Err(Errno::NOTTY));
    }
}
