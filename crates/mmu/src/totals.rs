//! Sums over all vCPUs that this process has had: for a report at its end, when they may be gone.

use std::sync::{Arc, Weak};

use memory::sync::Mutex;

use crate::mmu::lock;
use crate::stats::VcpuStats;

static TOTALS: Mutex<Totals> = Mutex::new(Totals {
    gone: Vec::new(),
    living: Vec::new(),
});

/// What was counted, and how often.
type Sum = (&'static str, u64);

struct Totals {
    /// Of those that are no more.
    gone: Vec<Sum>,
    living: Vec<Weak<VcpuStats>>,
}

/// What was counted, by kvm.ko's name where it has one, and how often, over all vCPUs of this process
/// so far. One that runs meanwhile is counted as far as it has come.
pub fn totals() -> Vec<(&'static str, u64)> {
    let (mut sums, living) = {
        let totals = lock(&TOTALS);
        let living: Vec<_> = totals.living.iter().filter_map(Weak::upgrade).collect();
        (totals.gone.clone(), living)
    };
    for vcpu in &living {
        add(&mut sums, vcpu);
    }
    sums
}

pub(crate) fn register(stats: &Arc<VcpuStats>) {
    let mut totals = lock(&TOTALS);
    totals.living.retain(|vcpu| vcpu.strong_count() > 0);
    totals.living.push(Arc::downgrade(stats));
}

impl Drop for VcpuStats {
    fn drop(&mut self) {
        add(&mut lock(&TOTALS).gone, self);
    }
}

/// Every vCPU names the same counters in the same order.
fn add(sums: &mut Vec<Sum>, vcpu: &VcpuStats) {
    let named = vcpu.named();
    sums.resize(named.len(), ("", 0));
    for (sum, (name, value)) in sums.iter_mut().zip(named) {
        *sum = (name, sum.1 + value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str) -> u64 {
        let found = totals().into_iter().find(|(n, _)| *n == name);
        found.expect("a counter of that name").1
    }

    #[test]
    fn vcpus_count_while_they_live_and_afterwards() {
        let stats = Arc::new(VcpuStats::default());
        register(&stats);
        let before = of("invlpg");
        stats.invlpg.increment();
        assert!(of("invlpg") > before);
        drop(stats);
        assert!(of("invlpg") > before);
    }
}
