//! Requests to one vCPU, against its entries and its polls: none is lost.

use loom::thread;

use super::*;

/// What the vCPU took in one stay with some polls; and at the end it must still be told of the rest.
fn stay(vcpu: &Vcpu, polls: usize) -> Requests {
    let mut taken = vcpu.enter();
    for _ in 0..polls {
        taken |= vcpu.poll();
    }
    vcpu.leave();
    taken
}

/// All of `wanted` was taken, or the polled word says that something is there, and it is.
fn nothing_is_lost(vcpu: &Vcpu, taken: Requests, wanted: Requests) {
    if !taken.contains(wanted) {
        assert!(vcpu.bell.0.is_rung(), "translated code would run for ever");
    }
    assert_eq!(taken | vcpu.enter(), wanted, "a request is lost");
    vcpu.leave();
}

fn with_kicker(kick: fn(&Vcpu, &Domain), wanted: Requests) {
    let domain = Domain::new();
    let vcpu = Vcpu::new(&domain);
    let kicker = {
        let (domain, vcpu) = (Arc::clone(&domain), Arc::clone(&vcpu));
        thread::spawn(move || kick(&vcpu, &domain))
    };
    let taken = stay(&vcpu, 2);
    kicker.join().unwrap();
    nothing_is_lost(&vcpu, taken, wanted);
}

#[test]
fn a_kick_meets_an_entry_or_a_poll() {
    explore(4, || {
        with_kicker(
            |vcpu, _| vcpu.bell.0.request(Requests::EXIT),
            Requests::EXIT,
        );
    });
}

#[test]
fn a_request_of_the_domain_meets_an_entry_or_a_poll() {
    explore(4, || {
        with_kicker(|_, domain| domain.request(Requests::EVENT), Requests::EVENT);
    });
}

#[test]
fn two_kickers_at_once() {
    explore(3, || {
        let domain = Domain::new();
        let vcpu = Vcpu::new(&domain);
        let wanted = [Requests::EXIT, Requests::EVENT];
        let kickers = wanted.map(|requests| {
            let vcpu = Arc::clone(&vcpu);
            thread::spawn(move || vcpu.bell.0.request(requests))
        });
        let taken = stay(&vcpu, 1);
        for kicker in kickers {
            kicker.join().unwrap();
        }
        nothing_is_lost(&vcpu, taken, wanted[0] | wanted[1]);
    });
}

/// What was said before the kick is known behind it: an interrupt is there when the vCPU looks.
#[test]
fn who_is_kicked_sees_what_for() {
    explore(4, || {
        let domain = Domain::new();
        let vcpu = Vcpu::new(&domain);
        let interrupt = Arc::new(Place::new());
        let kicker = {
            let (vcpu, interrupt) = (Arc::clone(&vcpu), Arc::clone(&interrupt));
            thread::spawn(move || {
                interrupt.write(1);
                vcpu.bell.0.request(Requests::EVENT);
            })
        };
        if !stay(&vcpu, 1).is_empty() {
            assert_eq!(interrupt.read(), 1);
        }
        kicker.join().unwrap();
    });
}

/// A rule broken on purpose: the bell is silenced behind the look.
#[test]
#[should_panic(expected = "translated code would run for ever")]
fn a_bell_silenced_too_late_is_found() {
    explore(4, || {
        let domain = Domain::new();
        let vcpu = Vcpu::new(&domain);
        let kicker = {
            let domain = Arc::clone(&domain);
            thread::spawn(move || domain.request(Requests::EXIT))
        };
        let taken = vcpu.participant.enter();
        vcpu.bell.0.silence();
        vcpu.leave();
        kicker.join().unwrap();
        nothing_is_lost(&vcpu, taken, Requests::EXIT);
    });
}
