use crate::matrix::{MATRIX, MOVES, SCRATCH_PAGES, run};
use crate::testing::Ram;

#[test]
fn every_call_in_every_state_answers_as_the_matrix_says() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let before = hyp.audit().unwrap();
    let mut rows = 0;
    let score = run(&hyp, Ram::page(128), |_, _| rows += 1).unwrap_or_else(|failure| {
        panic!("{failure}");
    });
    assert_eq!(rows, MATRIX.len());
    assert_eq!(
        (score.granted + score.refused) as usize,
        MATRIX.len() * MOVES.len()
    );
    assert_eq!(hyp.audit().unwrap(), before);
    for number in 128..128 + SCRATCH_PAGES {
        assert!(!hyp.platform().is_mapped(Ram::page(number)));
    }
}
