//! Live migration: access maps are state of a VM. The program reads them on one and sets them on
//! the other, as it does with registers, before the guest runs there.

use super::*;

#[test]
fn a_guest_that_moved_is_as_protected_as_it_was() {
    let source = Guarded::with(|_| (), KVM_MEM_LOG_DIRTY_PAGES);
    let maps: Vec<u32> = (0..PAGES as u32)
        .map(|page| match page % 4 {
            0 => KVM_SUBPAGE_FULL_ACCESS,
            1 => 0,
            2 => 1 << page,
            _ => !(1 << page),
        })
        .collect();
    source.protect(0, &maps);
    for page in 0..PAGES {
        for sub_page in 0..32 {
            let address = DATA + page * PAGE + sub_page * 128;
            source.store_byte(address, sub_page as u8 + 1);
        }
    }
    // The memory goes first, while the guest runs, then what it wrote meanwhile.
    let target = Guarded::new();
    let mut sent = dirty::log(&source.vm);
    let copy = |pages: u64| {
        for page in (0..PAGES).filter(|page| pages >> page & 1 != 0) {
            for at in (page * PAGE..(page + 1) * PAGE).step_by(8) {
                let word = source.data.read::<u64>(at as usize);
                target.data.write(at as usize, word);
            }
        }
    };
    copy(sent);
    assert_eq!(source.store(DATA + 2 * PAGE + 2 * 128, 0x99), End::Halt);
    let late = dirty::log(&source.vm);
    assert_eq!(late, 1 << 2);
    copy(late);
    sent |= late;
    // Pages where nothing may be written were not written.
    for (page, map) in maps.iter().enumerate() {
        assert_eq!(sent >> page & 1 != 0, *map != 0, "page {page}");
    }
    // The vCPU stops in front of a write that is denied; its registers move, and the maps.
    source.prepare(&[0x48, 0x89, 0x07], |regs| {
        (regs.rdi, regs.rax) = (DATA + PAGE, 0x77);
    });
    assert_eq!(source.resume(), denied(DATA + PAGE, 3));
    let read = source.maps(0, PAGES as usize);
    assert_eq!(read, maps);
    target.protect(0, &read);
    target.prepare(&[0x48, 0x89, 0x07], |_| ());
    assert_eq!(target.vcpu.set(KVM_SET_REGS, source.regs()), Ok(0));
    assert_eq!(target.resume(), denied(DATA + PAGE, 3));
    for page in 0..PAGES {
        for sub_page in 0..32 {
            let address = DATA + page * PAGE + sub_page * 128;
            let before = target.data.read::<u8>((address - DATA) as usize);
            assert_eq!(before, source.data.read::<u8>((address - DATA) as usize));
            let end = target.store_byte(address, 0xee);
            let allowed = maps[page as usize] >> sub_page & 1 != 0;
            let expected = if allowed {
                End::Halt
            } else {
                denied(address, 2)
            };
            assert_eq!(end, expected, "{address:#x}");
        }
    }
}
