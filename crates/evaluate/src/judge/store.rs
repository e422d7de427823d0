//! Requests and replies on disk, so that none is paid twice.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use engine::{Error, Result};
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params};

use super::budget::{Budget, Usage};

/// Marks a SQLite file as a store of verdicts.
const APPLICATION_ID: i32 = 0x5ac_90b1;

/// The version of the tables below.
const VERSION: i32 = 1;

/// How much longer than its timeout a call may be under way until it counts as lost, for a machine that is slow.
const GRACE: Duration = Duration::from_secs(60);

/// How long to wait for another process that writes.
const BUSY: Duration = Duration::from_secs(60);

/// `key` is a hash of everything that a reply depends on. A call without a reply is under way until `ends` (seconds since 1970) at
/// the latest; then its reply is lost, and it is counted with the most tokens that it can have had.
const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS request (
        key TEXT PRIMARY KEY,
        endpoint TEXT NOT NULL,
        body TEXT NOT NULL,
        repeat INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE IF NOT EXISTS call (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        key TEXT NOT NULL REFERENCES request,
        started INTEGER NOT NULL,
        ends INTEGER NOT NULL,
        most_input_tokens INTEGER NOT NULL,
        most_output_tokens INTEGER NOT NULL,
        reply TEXT,
        input_tokens INTEGER,
        output_tokens INTEGER
    ) STRICT;
    CREATE INDEX IF NOT EXISTS call_of_request ON call (key);
";

/// The calls of one job, which its budget is about.
const JOB: &str = "CREATE TEMP TABLE IF NOT EXISTS job (key TEXT PRIMARY KEY) STRICT";

/// A file of requests and the replies to them, in SQLite. Several processes may use it at once.
///
/// What was written is on the disk when a function returns (write-ahead log, synchronous), so a process may be killed at any
/// moment.
pub struct Store {
    path: PathBuf,
    inner: Mutex<Inner>,
    /// Held shared by everybody who makes calls, so that who can have it alone knows that no call is under way.
    _lock: Option<File>,
}

struct Inner {
    connection: Connection,
    /// SQLite's count of changes by others, as of when the usage was summed.
    version: i64,
    /// Of the job's calls that have ended.
    ended: Usage,
    /// The most that the job's calls under way may take.
    under_way: Usage,
}

/// A request as the store knows it.
pub(super) struct Entry<'a> {
    pub(super) key: &'a str,
    pub(super) endpoint: &'a str,
    pub(super) body: &'a str,
    pub(super) repeat: u32,
    /// The most that one call may take.
    pub(super) most: Usage,
}

/// Whether a call may be made.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// It may, and is under way under this number.
    Call(i64),
    /// There are replies already that suffice.
    Settled,
    /// Another process makes it, or the budget waits for calls under way.
    Wait,
    /// The budget has no room for it.
    OverBudget,
}

impl Store {
    /// Opens a store to write, and creates it if need be. Calls of processes that were killed are lost from then on.
    ///
    /// # Errors
    /// If the file cannot be opened or is something else.
    pub fn open(path: &Path) -> Result<Self> {
        // the system says better than SQLite why a file cannot be made; SQLite takes an empty one for a new database
        OpenOptions::new().create(true).append(true).open(path).map_err(Error::io("open", path))?;
        let failed = |error| failed(path, error);
        let mut connection = Connection::open(path).map_err(failed)?;
        connection.busy_timeout(BUSY).map_err(failed)?;
        check(path, &connection)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
        connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
        let tables = begin(&mut connection).map_err(failed)?;
        tables.execute_batch(TABLES).map_err(failed)?;
        tables.pragma_update(None, "application_id", APPLICATION_ID).map_err(failed)?;
        tables.pragma_update(None, "user_version", VERSION).map_err(failed)?;
        tables.commit().map_err(failed)?;

        let mut beside = path.as_os_str().to_owned();
        beside.push("-lock");
        let beside = Path::new(&beside);
        let lock = OpenOptions::new().create(true).append(true).open(beside).map_err(Error::io("open", beside))?;
        if lock.try_lock().is_ok() {
            connection.execute("UPDATE call SET ends = 0 WHERE reply IS NULL", []).map_err(failed)?;
            lock.unlock().map_err(Error::io("unlock", beside))?;
        }
        lock.lock_shared().map_err(Error::io("lock", beside))?;
        Self::new(path, connection, Some(lock))
    }

    /// Opens a store to look at; a file that is not there is an empty store. Nothing may be written.
    ///
    /// # Errors
    /// If the file cannot be opened or is something else.
    pub fn look(path: &Path) -> Result<Self> {
        let failed = |error| failed(path, error);
        let connection = if std::fs::metadata(path).is_ok_and(|file| file.len() > 0) {
            let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(failed)?;
            connection.busy_timeout(BUSY).map_err(failed)?;
            check(path, &connection)?;
            connection
        } else {
            let connection = Connection::open_in_memory().map_err(failed)?;
            connection.execute_batch(TABLES).map_err(failed)?;
            connection
        };
        Self::new(path, connection, None)
    }

    fn new(path: &Path, connection: Connection, lock: Option<File>) -> Result<Self> {
        connection.execute(JOB, []).map_err(|error| failed(path, error))?;
        let inner = Inner { connection, version: 0, ended: Usage::default(), under_way: Usage::default() };
        Ok(Self { path: path.to_owned(), inner: Mutex::new(inner), _lock: lock })
    }

    /// Says which requests the following is about: usage and budget are those of their calls.
    pub(super) fn begin_job<'a>(&self, keys: impl Iterator<Item = &'a str>, now: SystemTime) -> Result<()> {
        self.with(|inner| {
            let job = inner.connection.transaction()?;
            job.execute("DELETE FROM job", [])?;
            let mut insert = job.prepare("INSERT OR IGNORE INTO job VALUES (?1)")?;
            for key in keys {
                insert.execute([key])?;
            }
            drop(insert);
            (inner.ended, inner.under_way) = usage(&job, now)?;
            inner.version = data_version(&job)?;
            job.commit()
        })
    }

    /// The bodies of the replies to a request, in their order.
    pub(super) fn replies(&self, key: &str) -> Result<Vec<String>> {
        self.with(|inner| replies(&inner.connection, key))
    }

    /// What the calls for the comparisons at hand took, in this run and those before; of those under way, the most that they may
    /// take.
    pub fn usage(&self) -> Usage {
        let inner = self.lock();
        inner.ended + inner.under_way
    }

    /// Puts a call under way, unless there are replies that suffice, somebody else makes it, or the budget forbids it.
    /// It is given up after `timeout`.
    pub(super) fn claim(
        &self,
        entry: &Entry<'_>,
        suffice: impl Fn(&[String]) -> bool,
        budget: &Budget,
        now: SystemTime,
        timeout: Duration,
    ) -> Result<Claim> {
        self.with(|inner| {
            let (started, ends) = (seconds(now), seconds(now + timeout + GRACE));
            let call = begin(&mut inner.connection)?;
            if suffice(&replies(&call, entry.key)?) {
                return Ok(Claim::Settled);
            }
            let elsewhere = "SELECT 1 FROM call WHERE key = ?1 AND reply IS NULL AND ends > ?2";
            if call.query_row(elsewhere, params![entry.key, started], |_| Ok(())).optional()?.is_some() {
                return Ok(Claim::Wait);
            }
            let fits = |ended: Usage, under_way: Usage| budget.allows(ended + under_way + entry.most);
            let version = data_version(&call)?;
            if version != inner.version || !fits(inner.ended, inner.under_way) {
                (inner.ended, inner.under_way) = usage(&call, now)?;
                inner.version = version;
            }
            if !fits(inner.ended, inner.under_way) {
                let alone = fits(inner.ended, Usage::default());
                return Ok(if alone { Claim::Wait } else { Claim::OverBudget });
            }
            call.execute(
                "INSERT OR IGNORE INTO request VALUES (?1, ?2, ?3, ?4)",
                params![entry.key, entry.endpoint, entry.body, entry.repeat],
            )?;
            call.execute(
                "INSERT INTO call (key, started, ends, most_input_tokens, most_output_tokens) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![entry.key, started, ends, number(entry.most.input_tokens), number(entry.most.output_tokens)],
            )?;
            let id = call.last_insert_rowid();
            call.commit()?;
            inner.under_way += entry.most;
            Ok(Claim::Call(id))
        })
    }

    /// Keeps the body of the reply to a call, and its tokens where they are known.
    pub(super) fn keep(&self, call: i64, most: Usage, reply: &str, tokens: Option<[u64; 2]>) -> Result<()> {
        self.end(most, tokens.map_or(most, |[input, output]| Usage::call(input, output)), |connection| {
            let [input, output] = [0, 1].map(|i| tokens.map(|tokens| number(tokens[i])));
            let sql = "UPDATE call SET reply = ?2, input_tokens = ?3, output_tokens = ?4 WHERE id = ?1";
            connection.execute(sql, params![call, reply, input, output])
        })
    }

    /// Forgets a call that was not served.
    pub(super) fn withdraw(&self, call: i64, most: Usage) -> Result<()> {
        self.end(most, Usage::default(), |connection| connection.execute("DELETE FROM call WHERE id = ?1", [call]))
    }

    /// Gives up a call whose reply did not come.
    pub(super) fn lose(&self, call: i64, most: Usage) -> Result<()> {
        self.end(most, most, |connection| connection.execute("UPDATE call SET ends = 0 WHERE id = ?1", [call]))
    }

    fn end(&self, most: Usage, took: Usage, write: impl FnOnce(&Connection) -> rusqlite::Result<usize>) -> Result<()> {
        self.with(|inner| {
            write(&inner.connection)?;
            inner.under_way -= most;
            inner.ended += took;
            Ok(())
        })
    }

    fn with<T>(&self, work: impl FnOnce(&mut Inner) -> rusqlite::Result<T>) -> Result<T> {
        work(&mut self.lock()).map_err(|error| failed(&self.path, error))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // what a thread that panicked left is on the disk or rolled back
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A transaction that may write: nobody else does until it ends, so what it reads stays true.
fn begin(connection: &mut Connection) -> rusqlite::Result<Transaction<'_>> {
    connection.transaction_with_behavior(TransactionBehavior::Immediate)
}

/// Fails unless a database is a store, or empty.
fn check(path: &Path, connection: &Connection) -> Result<()> {
    let number =
        |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i32>(0)).map_err(|error| failed(path, error));
    if number("SELECT count(*) FROM sqlite_schema")? == 0 {
        return Ok(());
    }
    if number("PRAGMA application_id")? != APPLICATION_ID {
        return Err(is_no_store(path));
    }
    match number("PRAGMA user_version")? {
        VERSION => Ok(()),
        version => Err(Error::input(format!(
            "{} is a store of verdicts of version {version}, and this program knows version {VERSION}. Use the program that made \
             it, or another store.",
            path.display()
        ))),
    }
}

fn is_no_store(path: &Path) -> Error {
    Error::input(format!("{} is no store of verdicts. Choose a file that does not exist yet.", path.display()))
}

fn replies(connection: &Connection, key: &str) -> rusqlite::Result<Vec<String>> {
    let mut rows =
        connection.prepare_cached("SELECT reply FROM call WHERE key = ?1 AND reply IS NOT NULL ORDER BY id")?;
    rows.query_map([key], |row| row.get(0))?.collect()
}

/// What the job's calls took that have ended, and what those under way may take.
fn usage(connection: &Connection, now: SystemTime) -> rusqlite::Result<(Usage, Usage)> {
    let sql = "SELECT reply IS NULL AND ends > ?1, count(*),
                      total(coalesce(input_tokens, most_input_tokens)), total(coalesce(output_tokens, most_output_tokens))
               FROM temp.job JOIN call USING (key) GROUP BY 1";
    let (mut ended, mut under_way) = (Usage::default(), Usage::default());
    let mut rows = connection.prepare_cached(sql)?;
    let mut rows = rows.query([seconds(now)])?;
    while let Some(row) = rows.next()? {
        let tokens = |column| row.get::<_, f64>(column).map(|total| total as u64);
        let usage = Usage { calls: row.get::<_, i64>(1)? as u64, input_tokens: tokens(2)?, output_tokens: tokens(3)? };
        *if row.get(0)? { &mut under_way } else { &mut ended } = usage;
    }
    Ok((ended, under_way))
}

fn data_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("PRAGMA data_version", [], |row| row.get(0))
}

fn seconds(time: SystemTime) -> i64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| number(since.as_secs()))
}

/// SQLite's integers have a sign.
fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// What SQLite refused, as a paragraph.
fn failed(path: &Path, error: rusqlite::Error) -> Error {
    let remedy = match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => return is_no_store(path),
        Some(ErrorCode::DiskFull) => "The disk is full: free some space",
        Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => {
            "Check the path and the permissions"
        }
        Some(ErrorCode::DatabaseBusy) => "Another process holds it: wait for that one to end",
        Some(ErrorCode::DatabaseCorrupt) => "The file is damaged: put back a copy, or move it away",
        _ => "Check the disk",
    };
    Error::Failed(format!(
        "The store of verdicts {} could not be read or written: {error}. {remedy}, and run the same command again.",
        path.display()
    ))
}
