//! The open requests of a judging, on which several threads work.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use engine::{Error, Result};

use super::Progress;
use super::chat::{ChatJudge, Request};
use super::endpoint::Sent;
use super::reply::{Reply, Standing};
use super::retry::{backoff, wait};
use super::store::{Claim, Entry};
use crate::plot::shortened;

/// Between two looks at what other threads and processes do.
const POLL: Duration = Duration::from_millis(100);

/// Requests that are given up, without a reply to any other in between, before the endpoint counts as down.
const DOWN: u32 = 3;

/// A request, and how many verdicts hang on it.
type Item<'a> = (Request<'a>, usize);

pub(super) struct Work<'a> {
    judge: &'a ChatJudge<'a>,
    open: Mutex<VecDeque<Item<'a>>>,
    stop: AtomicBool,
    /// Requests that were given up since the last reply.
    given_up: AtomicU32,
}

/// What became of a request.
enum Made {
    /// There are replies that suffice, none with scores if `unreadable`.
    Settled { unreadable: bool },
    /// It is to be tried after the others.
    Later,
    /// It stays open.
    Left,
}

/// What threads say to the one that tells of progress.
enum Event {
    Settled { unreadable: bool, verdicts: usize },
    Trouble(String),
}

impl<'a> Work<'a> {
    pub(super) fn new(judge: &'a ChatJudge<'a>, open: VecDeque<Item<'a>>) -> Self {
        Self { judge, open: Mutex::new(open), stop: AtomicBool::new(false), given_up: AtomicU32::new(0) }
    }

    /// Does the work, and tells of it. When it is stopped, calls under way are waited for, since they are paid.
    ///
    /// # Errors
    /// What stopped it: an error of `progress`, a request that the endpoint rejects, an endpoint that is down, a budget that is
    /// used up, or a store that fails.
    pub(super) fn done(self, state: &mut Progress, progress: &mut dyn FnMut(&Progress) -> Result<()>) -> Result<()> {
        let threads = self.judge.options.concurrency.min(self.open().len());
        std::thread::scope(|scope| {
            let (events, inbox) = channel();
            let threads: Vec<_> = (0..threads)
                .map(|_| {
                    let events = events.clone();
                    scope.spawn(|| self.run(events))
                })
                .collect();
            drop(events);
            let mut result = self.watch(&inbox, state, progress);
            for thread in threads {
                let ended =
                    thread.join().unwrap_or_else(|_| Err(Error::Failed("A thread of the judge failed.".into())));
                result = result.and(ended);
            }
            result
        })
    }

    /// Tells of progress until all threads have ended.
    fn watch(
        &self,
        inbox: &Receiver<Event>,
        state: &mut Progress,
        progress: &mut dyn FnMut(&Progress) -> Result<()>,
    ) -> Result<()> {
        let mut result = Ok(());
        loop {
            state.usage = self.judge.store.usage();
            if result.is_ok() {
                result = progress(state);
                self.stop.fetch_or(result.is_err(), Ordering::SeqCst);
            }
            match inbox.recv_timeout(POLL) {
                Ok(Event::Settled { unreadable, verdicts }) => {
                    state.settle(unreadable, verdicts);
                    state.trouble = None;
                }
                Ok(Event::Trouble(why)) => state.trouble = Some(why),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return result,
            }
        }
    }

    /// Takes requests until none is left. An error stops the other threads too.
    fn run(&self, events: Sender<Event>) -> Result<()> {
        let tell = |event| {
            // who listens ends after all who speak
            let _ = events.send(event);
        };
        while !self.stopped() {
            let Some((request, verdicts)) = self.open().pop_front() else { break };
            match self.make(&request, &tell) {
                Ok(Made::Settled { unreadable }) => tell(Event::Settled { unreadable, verdicts }),
                Ok(Made::Later) => {
                    self.open().push_back((request, verdicts));
                    wait(self.judge.clock, POLL, &self.stop);
                }
                Ok(Made::Left) => {}
                Err(error) => {
                    self.stop.store(true, Ordering::SeqCst);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Makes a request until its replies suffice.
    fn make(&self, request: &Request<'_>, tell: &dyn Fn(Event)) -> Result<Made> {
        let judge = self.judge;
        let body = judge.body(&judge.text(request.comparison, request.swapped)).to_string();
        let most = judge.most(request);
        let Request { key, repeat, .. } = request;
        let entry = Entry { key, endpoint: &judge.base, body: &body, repeat: *repeat, most };
        let about = format!("the prompt “{}”", shortened(request.comparison.prompt, 80));
        let mut failures = 0;
        while !self.stopped() {
            let suffice = |replies: &[String]| judge.standing(replies) != Standing::Open;
            let claim =
                judge.store.claim(&entry, suffice, &judge.options.budget, judge.clock.now(), judge.options.timeout)?;
            let call = match claim {
                Claim::Call(id) => id,
                Claim::Settled => {
                    let standing = judge.standing(&judge.store.replies(key)?);
                    return Ok(Made::Settled { unreadable: matches!(standing, Standing::Unreadable(_)) });
                }
                Claim::Wait => return Ok(Made::Later),
                Claim::OverBudget => return Err(self.over_budget()),
            };
            let (why, retry_after) = match judge.endpoint.send(&body, &about, judge.clock) {
                Sent::Answered(body) => {
                    let reply = Reply::read(&body);
                    judge.store.keep(call, most, &body, reply.as_ref().and_then(|reply| reply.tokens))?;
                    if reply.is_some() {
                        self.given_up.store(0, Ordering::SeqCst);
                        failures = 0;
                        continue;
                    }
                    (format!("its answer is no chat completion, but “{}”", shortened(&body, 80)), None)
                }
                Sent::Refused { why, retry_after } => {
                    judge.store.withdraw(call, most)?;
                    (why, retry_after)
                }
                Sent::Lost(why) => {
                    judge.store.lose(call, most)?;
                    (why, None)
                }
                Sent::Rejected(error) => {
                    judge.store.withdraw(call, most)?;
                    return Err(error);
                }
            };
            failures += 1;
            if failures > judge.options.retries {
                let given_up = 1 + self.given_up.fetch_add(1, Ordering::SeqCst);
                return if given_up < DOWN {
                    tell(Event::Trouble(why));
                    Ok(Made::Left)
                } else {
                    Err(self.down(&why))
                };
            }
            tell(Event::Trouble(why));
            wait(judge.clock, backoff(failures, retry_after, rand::random()), &self.stop);
        }
        Ok(Made::Left)
    }

    fn down(&self, why: &str) -> Error {
        Error::Failed(format!(
            "The endpoint {} is down: {DOWN} requests in a row failed {} times each, the last because {why}. Look what is wrong \
             there, and run the same command again; no verdict is lost.",
            self.judge.base,
            self.judge.options.retries + 1
        ))
    }

    fn over_budget(&self) -> Error {
        let used = self.judge.store.usage();
        let cost = self.judge.options.budget.cost.map(|(_, prices)| format!(" for {:.4}", prices.cost(used)));
        Error::Failed(format!(
            "The budget has no room for another call: {} calls are made{}. Raise it, and run the same command again to go on; \
             no verdict is lost.",
            used.calls,
            cost.unwrap_or_default()
        ))
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn open(&self) -> MutexGuard<'_, VecDeque<Item<'a>>> {
        // a queue is whole between two calls of its functions
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
