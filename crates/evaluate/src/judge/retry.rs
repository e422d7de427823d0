//! When a request is made again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

/// The upper end of the first wait.
const FIRST: Duration = Duration::from_secs(1);

/// The upper end of the longest wait, unless the endpoint asks for a longer one.
const LONGEST: Duration = Duration::from_secs(60);

/// A wait looks this often whether it shall end.
const SLICE: Duration = Duration::from_millis(100);

/// Time, which tests make pass faster.
pub trait Clock: Send + Sync {
    /// The time of the day.
    fn now(&self) -> SystemTime;
    /// Waits.
    fn sleep(&self, wait: Duration);
}

/// The system's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn sleep(&self, wait: Duration) {
        std::thread::sleep(wait);
    }
}

/// Waits unless or until `stop` is set.
pub(super) fn wait(clock: &dyn Clock, mut wait: Duration, stop: &AtomicBool) {
    while !wait.is_zero() && !stop.load(Ordering::SeqCst) {
        let slice = wait.min(SLICE);
        clock.sleep(slice);
        wait -= slice;
    }
}

/// How long to wait after so many failures in a row, at least one, where `uniform` is drawn from 0 to 1.
///
/// Exponential backoff with full jitter (M. Brooker, "Exponential Backoff And Jitter", 2015): uniform from 0 to an end
/// that doubles with every failure. What the endpoint asked for is waited for in full and jitter added, so that many
/// waiting threads do not return at once.
pub(super) fn backoff(failures: u32, retry_after: Option<Duration>, uniform: f64) -> Duration {
    let end = FIRST.saturating_mul(1 << (failures - 1).min(16)).min(LONGEST);
    match retry_after {
        Some(asked) => asked + FIRST.mul_f64(uniform),
        None => end.mul_f64(uniform),
    }
}

/// The wait that a `Retry-After` header asks for: whole seconds, or the date until when (RFC 9110, section 10.2.3).
/// Nothing if it is neither.
pub(super) fn retry_after(header: &str, now: SystemTime) -> Option<Duration> {
    let header = header.trim();
    if let Ok(seconds) = header.parse::<u32>() {
        return Some(Duration::from_secs(seconds.into()));
    }
    let until: SystemTime = jiff::fmt::rfc2822::parse(header).ok()?.timestamp().into();
    Some(until.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn waits_double_up_to_an_end_and_are_jittered_in_full() {
        let ends: Vec<u64> = (1..=9).map(|failures| backoff(failures, None, 1.0).as_secs()).collect();
        assert_eq!(ends, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(backoff(u32::MAX, None, 0.5), Duration::from_secs(30));
        assert_eq!(backoff(3, None, 0.0), Duration::ZERO);
        assert_eq!(backoff(3, None, 0.25), Duration::from_secs(1));
        // what is asked for is never cut short
        let asked = Duration::from_secs(90);
        assert_eq!(backoff(1, Some(asked), 0.0), asked);
        assert_eq!(backoff(9, Some(asked), 0.5), asked + Duration::from_millis(500));
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_445_412_480); // 2015-10-21 07:28:00 UTC
        for (header, wait) in [
            ("0", Some(0)),
            ("120", Some(120)),
            (" 7 ", Some(7)),
            ("Wed, 21 Oct 2015 07:28:00 GMT", Some(0)),
            ("Wed, 21 Oct 2015 07:29:30 GMT", Some(90)),
            ("Wed, 21 Oct 2015 07:00:00 GMT", Some(0)),
            ("-5", None),
            ("1.5", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(retry_after(header, now), wait.map(Duration::from_secs), "{header}");
        }
    }

    #[test]
    fn a_wait_ends_when_the_work_does() {
        struct Stopping<'a>(Mutex<Vec<Duration>>, &'a AtomicBool);
        impl Clock for Stopping<'_> {
            fn now(&self) -> SystemTime {
                SystemTime::UNIX_EPOCH
            }
            fn sleep(&self, wait: Duration) {
                let mut slept = self.0.lock().unwrap();
                slept.push(wait);
                self.1.store(slept.len() == 4, Ordering::SeqCst);
            }
        }
        let stop = AtomicBool::new(false);
        let clock = Stopping(Mutex::default(), &stop);
        wait(&clock, Duration::from_millis(250), &stop);
        assert_eq!(clock.0.lock().unwrap().iter().sum::<Duration>(), Duration::from_millis(250));
        wait(&clock, Duration::from_secs(3600), &stop);
        assert_eq!(clock.0.lock().unwrap().len(), 4);
    }
}
