//! Memory of a TD that is finalised.

use super::*;

#[test]
fn prefault_waits_for_finalize_and_takes_addresses_without_the_shared_bit() {
    let td = Td::new();
    assert_eq!(td.prefault(DATA, PAGE).0, Err(Errno::OPNOTSUPP));
    assert_eq!(td.finalize(), Ok(0));
    assert_eq!(td.prefault(DATA | SHARED_BIT, PAGE).0, Err(Errno::INVAL));
    assert_eq!(td.prefault(0x40_0000, PAGE).0, Err(Errno::NOENT));
    let (result, gpa, size) = td.prefault(DATA, PAGES * PAGE);
    assert_eq!((result, gpa, size), (Ok(0), DATA + PAGES * PAGE, 0));
}

#[test]
fn private_memory_can_be_neither_mapped_nor_read_nor_written_through_its_descriptor() {
    let td = Td::new();
    assert_eq!(td.add_page(DATA, &page_of(0x5e)), Ok(0));
    let file = td.data_file.0;
    for flags in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
        let refused = abi::mmap_check(file, libc::PROT_READ, flags, 0, PAGE as usize);
        assert_eq!(refused, Some(Errno::NODEV));
    }
    assert_eq!(abi::before_read(file), Some(Errno::INVAL));
    assert_eq!(abi::before_write(file), Some(Errno::INVAL));
    assert_eq!(abi::before_truncate(file), Some(Errno::INVAL));
    // Whatever calls the kernel answers by itself find a placeholder.
    let mut found = [0xff; 64];
    let read = rustix::io::pread(td.data_file.borrow(), &mut found, 0);
    assert_eq!(read, Ok(64));
    assert_eq!(found, [0; 64]);
}

#[test]
fn slots_of_a_td_are_writable_and_below_the_shared_bit() {
    let td = Td::new();
    let memory = Memory::new(PAGE as usize);
    let mut above = region(2, SHARED_BIT, PAGE, memory.address());
    assert_eq!(
        td.vm.set(KVM_SET_USER_MEMORY_REGION, above),
        Err(Errno::INVAL)
    );
    above.guest_phys_addr = 0x40_0000;
    above.flags = KVM_MEM_READONLY;
    assert_eq!(
        td.vm.set(KVM_SET_USER_MEMORY_REGION, above),
        Err(Errno::INVAL)
    );
    above.flags = 0;
    assert_eq!(td.vm.set(KVM_SET_USER_MEMORY_REGION, above), Ok(0));
}
