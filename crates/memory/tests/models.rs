//! Random sequences against naive models.

mod draw;
mod exercise;

/// Each seed is a machine of its own; about 400 calls each.
#[test]
fn slots_behave_as_the_model() {
    let calls: usize = (0..1500)
        .map(|seed| exercise::machine::compare_with_model(&draw::bytes(seed, 4096)))
        .sum();
    assert!(calls > 200_000, "only {calls} calls");
}

#[test]
fn the_flat_view_shows_what_the_tree_says() {
    let transactions: usize = (0..300)
        .map(|seed| exercise::space::compare_with_model(&draw::bytes(seed, 1024)))
        .sum();
    assert!(transactions > 10_000, "only {transactions} transactions");
}

#[test]
fn no_bytes_no_calls() {
    assert_eq!(exercise::machine::compare_with_model(&[]), 0);
    assert_eq!(exercise::space::compare_with_model(&[]), 0);
}
