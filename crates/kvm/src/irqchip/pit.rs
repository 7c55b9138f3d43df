//! The 8254 interval timer: channel 0 drives GSI 0, channel 2 the speaker (Intel 8254 datasheet).
//!
//! A pure state machine: time comes in as nanoseconds of the monotonic clock, and
//! [`Pit::alarm`] is when [`Pit::fire`] must be called. Channel 0 alone has a host timer; the other
//! channels' counters and outputs are computed from the time when they were loaded.
//!
//! *Reinjection* (on by default, `KVM_REINJECT_CONTROL`): ticks that the guest was too late for are
//! kept and delivered one EOI at a time, so that guests which count ticks keep the time.

use kvm_bindings::{
    KVM_PIT_FLAGS_HPET_LEGACY, KVM_PIT_FLAGS_SPEAKER_DATA_ON, kvm_pit_channel_state, kvm_pit_state,
    kvm_pit_state2,
};

/// Ticks a second of every channel.
const HZ: u64 = 1_193_181;
const NS: u64 = 1_000_000_000;
/// The shortest period: a guest can't make the host busy.
const MIN_PERIOD_NS: u64 = 200_000;

const HIGH: u8 = 2;
const WORD_LOW: u8 = 3;
const WORD_HIGH: u8 = 4;

/// Whether missed ticks are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reinject {
    /// Kept, and delivered one EOI at a time.
    On,
    /// Lost.
    Off,
}

/// Whether GSI 0 is to be pulsed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Tick {
    /// Raise and lower it.
    Pulse,
    /// Not now.
    Nothing,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeats {
    Never,
    Forever,
}

/// The state machine.
#[derive(Clone, Debug)]
pub struct Pit {
    channels: [kvm_pit_channel_state; 3],
    flags: u32,
    /// Channel 0's timer on the host.
    running: bool,
    periodic: bool,
    period: u64,
    expires: u64,
    reinject: Reinject,
    /// Ticks that wait for an EOI.
    pending: u32,
    /// The last tick has had its EOI.
    acknowledged: bool,
}

impl Pit {
    /// A PIT after reset.
    pub fn new(now: u64) -> Pit {
        let channel = |gate| kvm_pit_channel_state {
            mode: 0xff,
            gate,
            count: 0x10000,
            ..kvm_pit_channel_state::default()
        };
        let mut pit = Pit {
            channels: [channel(1), channel(1), channel(0)],
            flags: 0,
            running: false,
            periodic: false,
            period: 0,
            expires: 0,
            reinject: Reinject::On,
            pending: 0,
            acknowledged: true,
        };
        for channel in 0..3 {
            pit.load(channel, 0, now);
        }
        pit
    }

    /// When [`Self::fire`] wants to be called.
    pub fn alarm(&self) -> Option<u64> {
        self.running.then_some(self.expires)
    }

    /// Whether missed ticks are kept.
    pub fn reinject(&self) -> Reinject {
        self.reinject
    }

    /// `KVM_REINJECT_CONTROL`.
    pub fn set_reinject(&mut self, reinject: Reinject) {
        if self.reinject != reinject && reinject == Reinject::On {
            self.forget_ticks();
        }
        self.reinject = reinject;
    }

    /// Nothing waits (the guest has unmasked the pin: what it missed, it missed knowingly).
    pub fn forget_ticks(&mut self) {
        self.pending = 0;
        self.acknowledged = true;
    }

    /// The alarm went off.
    pub fn fire(&mut self, now: u64) -> Tick {
        if !self.running || now < self.expires {
            return Tick::Nothing;
        }
        let ticks = if self.periodic {
            let ticks = 1 + (now - self.expires) / self.period.max(1);
            self.expires += ticks * self.period;
            ticks
        } else {
            self.running = false;
            1
        };
        if self.reinject == Reinject::On {
            self.pending = self
                .pending
                .saturating_add(ticks.try_into().unwrap_or(u32::MAX));
        }
        self.tick()
    }

    fn tick(&mut self) -> Tick {
        if self.reinject == Reinject::On && !std::mem::take(&mut self.acknowledged) {
            return Tick::Nothing;
        }
        Tick::Pulse
    }

    /// GSI 0 has had its EOI.
    pub fn acknowledge(&mut self) -> Tick {
        self.acknowledged = true;
        self.pending = self.pending.saturating_sub(1);
        if self.pending > 0 {
            self.tick()
        } else {
            Tick::Nothing
        }
    }

    fn elapsed(&self, channel: usize, now: u64) -> u64 {
        if channel != 0 {
            return (now as i64).wrapping_sub(self.channels[channel].count_load_time) as u64;
        }
        if self.period == 0 {
            return 0;
        }
        self.period.wrapping_sub(self.expires.wrapping_sub(now))
    }

    fn ticks(&self, channel: usize, now: u64) -> i64 {
        (u128::from(self.elapsed(channel, now)) * u128::from(HZ) / u128::from(NS)) as i64
    }

    fn counter(&self, channel: usize, now: u64) -> i64 {
        let ticks = self.ticks(channel, now);
        let state = &self.channels[channel];
        let count = i64::from(state.count).max(1);
        match state.mode {
            0 | 1 | 4 | 5 => count.wrapping_sub(ticks) & 0xffff,
            3 => count - ticks.wrapping_mul(2).rem_euclid(count),
            _ => count - ticks.rem_euclid(count),
        }
    }

    fn output(&self, channel: usize, now: u64) -> bool {
        let ticks = self.ticks(channel, now);
        let state = &self.channels[channel];
        let count = i64::from(state.count).max(1);
        match state.mode {
            1 => ticks < count,
            2 => ticks != 0 && ticks.rem_euclid(count) == 0,
            3 => ticks.rem_euclid(count) < (count + 1) >> 1,
            4 | 5 => ticks == count,
            _ => ticks >= count,
        }
    }

    fn latch_count(&mut self, channel: usize, now: u64) {
        if self.channels[channel].count_latched == 0 {
            let count = self.counter(channel, now) as u16;
            let state = &mut self.channels[channel];
            state.latched_count = count;
            state.count_latched = state.rw_mode;
        }
    }

    fn latch_status(&mut self, channel: usize, now: u64) {
        if self.channels[channel].status_latched == 0 {
            let output = u8::from(self.output(channel, now));
            let state = &mut self.channels[channel];
            state.status = (output << 7) | (state.rw_mode << 4) | (state.mode << 1) | state.bcd;
            state.status_latched = 1;
        }
    }

    /// Loads a channel's counter; 0 is the largest count.
    fn load(&mut self, channel: usize, count: u32, now: u64) {
        let count = if count == 0 { 0x10000 } else { count };
        self.channels[channel].count = count;
        if channel != 0 {
            self.channels[channel].count_load_time = now as i64;
            return;
        }
        match self.channels[0].mode {
            0 | 1 | 4 => self.start(count, now, Repeats::Never),
            2 | 3 => self.start(count, now, Repeats::Forever),
            _ => self.running = false,
        }
    }

    fn start(&mut self, count: u32, now: u64, repeats: Repeats) {
        if self.flags & KVM_PIT_FLAGS_HPET_LEGACY != 0 {
            return;
        }
        let interval = (u128::from(count) * u128::from(NS) / u128::from(HZ)) as u64;
        self.periodic = repeats == Repeats::Forever;
        self.period = if self.periodic {
            interval.max(MIN_PERIOD_NS)
        } else {
            interval
        };
        self.forget_ticks();
        self.expires = now + interval;
        self.running = true;
    }

    /// Writes port 0x40 to 0x43.
    pub fn write(&mut self, port: u16, value: u8, now: u64) {
        match usize::from(port & 3) {
            3 => self.write_control(value, now),
            channel => self.write_count(channel, value, now),
        }
    }

    fn write_control(&mut self, value: u8, now: u64) {
        let channel = usize::from(value >> 6);
        if channel == 3 {
            for channel in (0..3).filter(|channel| value & (2 << channel) != 0) {
                if value & 0x20 == 0 {
                    self.latch_count(channel, now);
                }
                if value & 0x10 == 0 {
                    self.latch_status(channel, now);
                }
            }
            return;
        }
        let access = (value >> 4) & 3;
        if access == 0 {
            self.latch_count(channel, now);
            return;
        }
        let mode = (value >> 1) & 7;
        let state = &mut self.channels[channel];
        state.rw_mode = access;
        state.read_state = access;
        state.write_state = access;
        state.mode = if mode > 5 { mode - 4 } else { mode };
        state.bcd = value & 1;
    }

    fn write_count(&mut self, channel: usize, value: u8, now: u64) {
        let state = &mut self.channels[channel];
        let value = u32::from(value);
        match state.write_state {
            HIGH => self.load(channel, value << 8, now),
            WORD_LOW => {
                state.write_latch = value as u8;
                state.write_state = WORD_HIGH;
            }
            WORD_HIGH => {
                state.write_state = WORD_LOW;
                let low = u32::from(state.write_latch);
                self.load(channel, low | (value << 8), now);
            }
            _ => self.load(channel, value, now),
        }
    }

    /// Reads port 0x40 to 0x43.
    pub fn read(&mut self, port: u16, now: u64) -> u8 {
        let channel = usize::from(port & 3);
        if channel == 3 {
            return 0;
        }
        let count = self.counter(channel, now);
        let state = &mut self.channels[channel];
        if state.status_latched != 0 {
            state.status_latched = 0;
            return state.status;
        }
        if state.count_latched != 0 {
            return read_latch(state);
        }
        match state.read_state {
            HIGH => (count >> 8) as u8,
            WORD_LOW => {
                state.read_state = WORD_HIGH;
                count as u8
            }
            WORD_HIGH => {
                state.read_state = WORD_LOW;
                (count >> 8) as u8
            }
            _ => count as u8,
        }
    }

    /// Reads port 0x61: speaker data, gate, refresh clock and output of channel 2.
    pub fn read_speaker(&self, now: u64) -> u8 {
        let data = self.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0;
        // The refresh clock toggles about every 15 us.
        let refresh = ((now >> 14) & 1) as u8;
        u8::from(data) << 1
            | self.channels[2].gate
            | u8::from(self.output(2, now)) << 5
            | refresh << 4
    }

    /// Writes port 0x61.
    pub fn write_speaker(&mut self, value: u8, now: u64) {
        if value & 2 != 0 {
            self.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON;
        } else {
            self.flags &= !KVM_PIT_FLAGS_SPEAKER_DATA_ON;
        }
        let state = &mut self.channels[2];
        let rises = state.gate < value & 1;
        if rises && matches!(state.mode, 1 | 2 | 3 | 5) {
            state.count_load_time = now as i64;
        }
        state.gate = value & 1;
    }

    /// `KVM_GET_PIT`.
    pub fn state(&self) -> kvm_pit_state {
        kvm_pit_state {
            channels: self.channels,
        }
    }

    /// `KVM_SET_PIT`.
    pub fn set_state(&mut self, state: &kvm_pit_state, now: u64) {
        self.channels = state.channels;
        for channel in 0..3 {
            self.load(channel, state.channels[channel].count, now);
        }
    }

    /// `KVM_GET_PIT2`.
    pub fn state2(&self) -> kvm_pit_state2 {
        kvm_pit_state2 {
            channels: self.channels,
            flags: self.flags,
            ..Default::default()
        }
    }

    /// `KVM_SET_PIT2`. Where the flags give channel 0 to the HPET, its timer stops.
    pub fn set_state2(&mut self, state: &kvm_pit_state2, now: u64) {
        let hpet = |flags| flags & KVM_PIT_FLAGS_HPET_LEGACY != 0;
        let hpet_starts = !hpet(self.flags) && hpet(state.flags);
        self.channels = state.channels;
        self.flags = state.flags;
        for channel in 0..3 {
            self.load(channel, state.channels[channel].count, now);
        }
        if hpet_starts {
            self.running = false;
        }
    }
}

fn read_latch(state: &mut kvm_pit_channel_state) -> u8 {
    let (low, high) = (state.latched_count as u8, (state.latched_count >> 8) as u8);
    match state.count_latched {
        HIGH => {
            state.count_latched = 0;
            high
        }
        WORD_LOW => {
            state.count_latched = HIGH;
            low
        }
        _ => {
            state.count_latched = 0;
            low
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(pit: &mut Pit, channel: u16, mode: u8, count: u16, now: u64) {
        pit.write(3, (channel as u8) << 6 | WORD_LOW << 4 | mode << 1, now);
        pit.write(channel, count as u8, now);
        pit.write(channel, (count >> 8) as u8, now);
    }

    fn read_word(pit: &mut Pit, channel: u16, now: u64) -> u16 {
        u16::from_le_bytes([pit.read(channel, now), pit.read(channel, now)])
    }

    fn ns(ticks: u64) -> u64 {
        (ticks * NS).div_ceil(HZ)
    }

    #[test]
    fn mode_2_is_periodic() {
        let mut pit = Pit::new(0);
        load(&mut pit, 0, 2, 11932, 0);
        let first = pit.alarm().unwrap();
        assert_eq!(first, 11932 * NS / HZ);
        assert_eq!(read_word(&mut pit, 0, ns(1000)), 11932 - 1000);
        assert_eq!(pit.fire(first - 1), Tick::Nothing);
        assert_eq!(pit.fire(first), Tick::Pulse);
        assert_eq!(pit.alarm(), Some(2 * first));
    }

    #[test]
    fn mode_0_fires_once_and_its_output_stays_high() {
        let mut pit = Pit::new(0);
        load(&mut pit, 0, 0, 5000, 0);
        let alarm = pit.alarm().unwrap();
        assert_eq!(pit.fire(alarm), Tick::Pulse);
        assert_eq!(pit.alarm(), None);
        pit.write(3, 0xe2, ns(5001));
        assert_eq!(
            pit.read(0, 0),
            0x80 | WORD_LOW << 4,
            "output, word access, mode 0"
        );
    }

    #[test]
    fn missed_ticks_come_one_eoi_at_a_time() {
        let mut pit = Pit::new(0);
        load(&mut pit, 0, 2, 11932, 0);
        let period = pit.alarm().unwrap();
        assert_eq!(pit.fire(3 * period), Tick::Pulse);
        assert_eq!(
            pit.fire(4 * period),
            Tick::Nothing,
            "the first has no EOI yet"
        );
        let again: Vec<_> = (0..4).map(|_| pit.acknowledge()).collect();
        assert_eq!(
            again,
            [Tick::Pulse, Tick::Pulse, Tick::Pulse, Tick::Nothing]
        );
        pit.set_reinject(Reinject::Off);
        assert_eq!(pit.fire(5 * period), Tick::Pulse);
        assert_eq!(pit.fire(6 * period), Tick::Pulse);
    }

    #[test]
    fn a_latched_count_stands_still() {
        let mut pit = Pit::new(0);
        load(&mut pit, 2, 3, 1000, 0);
        pit.write(3, 0x80, ns(100));
        assert_eq!(read_word(&mut pit, 2, ns(300)), 800, "mode 3 counts by two");
        assert_eq!(read_word(&mut pit, 2, ns(300)), 400);
    }

    #[test]
    fn speaker_port_gates_channel_2() {
        let mut pit = Pit::new(0);
        load(&mut pit, 2, 1, 1000, 0);
        pit.write_speaker(3, 1 << 14);
        let port = pit.read_speaker(1 << 14);
        assert_eq!(port, 0x33, "output, refresh, data and gate");
        assert_eq!(
            pit.read_speaker((1 << 14) + ns(1000)) & 0x20,
            0,
            "the pulse is over"
        );
    }

    #[test]
    fn a_count_of_0_is_the_largest() {
        let mut pit = Pit::new(0);
        load(&mut pit, 1, 2, 0, 0);
        assert_eq!(pit.state().channels[1].count, 0x10000);
    }

    #[test]
    fn the_hpet_takes_channel_0() {
        let mut pit = Pit::new(0);
        load(&mut pit, 0, 2, 11932, 0);
        let mut state = pit.state2();
        state.flags |= KVM_PIT_FLAGS_HPET_LEGACY;
        pit.set_state2(&state, 100);
        assert_eq!(pit.alarm(), None);
        assert_eq!(pit.state2().channels[0].mode, 2);
        load(&mut pit, 0, 2, 11932, 200);
        assert_eq!(pit.alarm(), None, "and keeps it");
    }
}
