//! One file from the Hub to the cache, whole or not at all.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use engine::{Error, Result};
use sha1::Sha1;
use sha2::Sha256;
use sha2::digest::DynDigest;
use ureq::Body;
use ureq::http::Response;

use super::cache::Cache;
use super::client::{Client, Failure, Patience, Subject, header};
use super::tree::{Entry, Identity};
use crate::interrupt;
use crate::ui::TransferBar;

/// Bytes that are read at once.
const CHUNK: usize = 256 << 10;

/// Fetches a content into the cache, where it has its name only when its size and hash are right. What a stopped process left
/// of it is gone on with.
///
/// # Errors
/// If it does not come whole after several attempts, or comes as something else; a disk that cannot be written to;
/// [`Error::Interrupted`].
pub(super) fn download(
    client: &Client,
    cache: &Cache,
    url: &str,
    entry: &Entry,
    subject: Subject<'_>,
    bar: &mut TransferBar,
) -> Result<()> {
    let hash = entry.identity().hash();
    let _lock = cache.lock(hash, &|message| bar.say(message))?;
    let blob = cache.blob(hash);
    if is_whole(&blob, entry.size) {
        return Ok(());
    }
    let mut part = Part::open(cache.incomplete(hash), entry)?;
    let (mut patience, mut furthest, mut mistaken) = (Patience::default(), part.len, false);
    loop {
        let failure = match part.receive(client, url, bar) {
            Ok(()) if part.is_right() => return part.finish(&blob),
            // bytes of another process or of a broken disk may be among them, so once more from the start
            Ok(()) if !mistaken => {
                mistaken = true;
                part.restart()?;
                Failure::Broken("its content is not what the Hub's list of files says".into())
            }
            Ok(()) => {
                part.restart()?;
                Failure::Final("its content is again not what the Hub's list of files says".into())
            }
            Err(Stop::Failed(failure)) => failure,
            Err(Stop::Error(error)) => return Err(error),
        };
        // a bad line that brings a little each time is no reason to give up
        if part.len > furthest {
            furthest = part.len;
            patience = Patience::default();
        }
        patience.wait(client, failure, subject, &|message| bar.say(message))?;
    }
}

/// Whether a file is there in full length.
pub(super) fn is_whole(path: &Path, size: u64) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() == size)
}

/// The beginning of a content.
struct Part<'a> {
    path: PathBuf,
    file: File,
    /// Bytes that are there, at most the content's size.
    len: u64,
    entry: &'a Entry,
    /// Of these bytes.
    hasher: Box<dyn DynDigest>,
}

/// Why receiving stopped.
enum Stop {
    /// Another attempt may go on.
    Failed(Failure),
    Error(Error),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl<'a> Part<'a> {
    /// What is there of a content, or nothing.
    fn open(path: PathBuf, entry: &'a Entry) -> Result<Self> {
        let file = File::options().create(true).append(true).read(true).open(&path);
        let file = file.map_err(Error::io("create", &path))?;
        let mut part = Self { path, file, len: 0, entry, hasher: hasher(entry) };
        let mut chunk = vec![0; CHUNK];
        loop {
            interrupt::check()?;
            let count = (&part.file).read(&mut chunk).map_err(Error::io("read", &part.path))?;
            if count == 0 {
                break;
            }
            part.hasher.update(&chunk[..count]);
            part.len += count as u64;
        }
        if part.len > entry.size {
            part.restart()?;
        }
        Ok(part)
    }

    /// Forgets all bytes.
    fn restart(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(Error::io("write", &self.path))?;
        self.hasher = hasher(self.entry);
        self.len = 0;
        Ok(())
    }

    /// Receives the bytes that are missing.
    fn receive(&mut self, client: &Client, url: &str, bar: &mut TransferBar) -> std::result::Result<(), Stop> {
        let size = self.entry.size;
        bar.received(self.len);
        if self.len == size {
            return Ok(());
        }
        let response = client.get(url, self.len)?;
        let (start, total) = extent(&response);
        // a server may send all of it although a part was asked for
        if start != self.len {
            self.restart()?;
        }
        if start != self.len {
            return Err(Failure::Final("the server sends another part than was asked for".into()).into());
        }
        if let Some(total) = total.filter(|total| *total != size) {
            let reason = format!("the server has {total} bytes of it, but the Hub's list of files says {size}");
            return Err(Failure::Final(reason).into());
        }
        let mut body = response.into_body().into_reader();
        let mut chunk = vec![0; CHUNK];
        while self.len < size {
            interrupt::check()?;
            let count = body.read(&mut chunk).map_err(|error| Failure::of(error.into()))?;
            if count == 0 {
                return Err(Failure::Broken(format!("it ended after {} of {size} bytes", self.len)).into());
            }
            let bytes = &chunk[..count];
            if self.len + count as u64 > size {
                self.restart()?;
                return Err(
                    Failure::Final(format!("it has more than the {size} bytes of the Hub's list of files")).into()
                );
            }
            self.file.write_all(bytes).map_err(|error| self.disk_error(error))?;
            self.hasher.update(bytes);
            self.len += count as u64;
            bar.received(self.len);
        }
        Ok(())
    }

    fn disk_error(&self, source: std::io::Error) -> Error {
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => Error::Failed(format!(
                "There is no room for {}, which is to have {} bytes: {source}. Free some space, or set HF_HOME to a folder on \
                 another disk, and run the same command again; what is there is gone on with.",
                self.path.display(),
                self.entry.size
            )),
            _ => Error::io("write", &self.path)(source),
        }
    }

    /// Whether the bytes are the content.
    fn is_right(&mut self) -> bool {
        let digest = self.hasher.finalize_reset();
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        digest == self.entry.identity().hash()
    }

    /// Gives the content its name.
    fn finish(self, blob: &Path) -> Result<()> {
        self.file.sync_all().map_err(|error| self.disk_error(error))?;
        fs::rename(&self.path, blob).map_err(Error::io("create", blob))
    }
}

fn hasher(entry: &Entry) -> Box<dyn DynDigest> {
    match entry.identity() {
        Identity::Sha256(_) => Box::new(Sha256::default()),
        Identity::Git(_) => {
            let mut hasher = Box::new(Sha1::default());
            DynDigest::update(&mut *hasher, format!("blob {}\0", entry.size).as_bytes());
            hasher
        }
    }
}

/// The byte that a response starts at, and the size of the whole where it says so.
fn extent(response: &Response<Body>) -> (u64, Option<u64>) {
    let length = response.body().content_length();
    if response.status() != 206 {
        return (0, length);
    }
    // bytes 5-9/10
    let range = header(response.headers(), "Content-Range").and_then(|range| range.trim().strip_prefix("bytes "));
    let parsed = range.and_then(|range| {
        let (bounds, total) = range.split_once('/')?;
        Some((bounds.split_once('-')?.0.parse().ok()?, total.parse().ok()))
    });
    parsed.unwrap_or((0, length))
}
