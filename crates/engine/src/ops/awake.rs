//! Threads that do not sleep between one short parallel loop and the next.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rayon::Yield;

/// How long a thread looks for work before it may sleep: longer than what lies between the loops of a pass, and between passes.
const PATIENCE: Duration = Duration::from_micros(200);

/// Threads that look for work or are about to. As long as there are any, no others are asked: a thread would find the next
/// call among its work, and the next within that.
static LOOKING: AtomicUsize = AtomicUsize::new(0);

/// Keeps the other threads of the current pool awake until there has been nothing to do for a while: to wake one takes longer
/// than many a loop of a pass over few rows.
///
/// Does nothing outside a pool.
pub(crate) fn keep_awake() {
    let Some(caller) = rayon::current_thread_index() else { return };
    let threads = rayon::current_num_threads();
    if threads == 1 || LOOKING.compare_exchange(0, threads, Relaxed, Relaxed).is_err() {
        return;
    }
    rayon::spawn_broadcast(move |thread| {
        if thread.index() != caller {
            look_for_work();
        }
        LOOKING.fetch_sub(1, Relaxed);
    });
}

/// Does what work there is, and returns when there has been none for a while, whatever others do: a thread that waited for the
/// end of a pass could be waited for itself.
fn look_for_work() {
    let mut idle_since = Instant::now();
    while idle_since.elapsed() < PATIENCE {
        match rayon::yield_now() {
            Some(Yield::Executed) => idle_since = Instant::now(),
            _ => std::thread::yield_now(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn threads_that_were_kept_awake_work_and_end() {
        keep_awake();
        let (sender, ended) = mpsc::channel();
        let sender = std::sync::Mutex::new(sender);
        let end = move |index| sender.lock().unwrap().send(index).unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).exit_handler(end).build().unwrap();
        pool.install(|| {
            // more than the stack would hold, if one waited for the next
            for _ in 0..100_000 {
                keep_awake();
                // nested too, as a thread that waits may be given a pass of another
                assert_eq!(rayon::join(|| rayon::join(keep_awake, || 1).1, || 2), (1, 2));
            }
        });
        drop(pool);
        let mut threads: Vec<usize> = ended.iter().take(3).collect();
        threads.sort_unstable();
        assert_eq!(threads, [0, 1, 2]);
    }
}
