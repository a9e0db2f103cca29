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
