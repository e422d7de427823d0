//! TensorBoard's event files.
//!
//! A file is a sequence of records (TensorFlow's `tf_record`), each a length, its checksum, a message and its checksum. The
//! messages are protocol buffers, of TensorFlow's `event.proto` and `summary.proto`. Of these only a few fields are written
//! here, so a library would be more than what follows.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crc::{CRC_32_ISCSI, Crc};
use engine::{Error, Result};

const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// A file of scalars, of one training or a part of it.
pub(super) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Creates a file for steps from `first_step` on. Those that an earlier file has from there on, since the training was killed
    /// after it had saved its state, no longer count.
    pub(super) fn create(folder: &Path, first_step: u64) -> Result<Self> {
        let path = folder.join(format!("events.out.tfevents.{:010.0}.sacpo.{}", now(), std::process::id()));
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        let mut events = Self { path, file };
        let mut version = Message::default();
        version.bytes(3, b"brain.Event:2");
        events.append(0, &version)?;
        let mut session = Message::default();
        // SessionLog.START: readers forget what they know of this step and later ones
        session.integer(1, 1);
        let mut start = Message::default();
        start.bytes(7, &session.0);
        events.append(first_step, &start)?;
        Ok(events)
    }

    /// Appends the numbers of a step. Tags are those of Hugging Face's trainer: `eval/` for what is called `eval_`, `train/` for
    /// everything else.
    pub(super) fn write(&mut self, step: u64, numbers: &[(String, f64)]) -> Result<()> {
        let mut summary = Message::default();
        for (name, number) in numbers {
            let tag = name.strip_prefix("eval_").map_or_else(|| format!("train/{name}"), |name| format!("eval/{name}"));
            let mut value = Message::default();
            value.bytes(1, tag.as_bytes());
            value.float(2, *number as f32);
            summary.bytes(1, &value.0);
        }
        let mut event = Message::default();
        event.bytes(5, &summary.0);
        self.append(step, &event)
    }

    /// Appends an event with time and step before its other fields, in one write, so that a kill leaves whole records but for the last.
    fn append(&mut self, step: u64, fields: &Message) -> Result<()> {
        let mut event = Message::default();
        event.double(1, now());
        event.integer(2, step);
        event.0.extend(&fields.0);
        let length = (event.0.len() as u64).to_le_bytes();
        let record = [&length[..], &masked(&length), &event.0, &masked(&event.0)].concat();
        self.file.write_all(&record).map_err(Error::io("write", &self.path))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// TensorFlow's masked checksum.
fn masked(bytes: &[u8]) -> [u8; 4] {
    CRC.checksum(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// A protocol buffer in the making.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn integer(&mut self, field: u64, value: u64) {
        self.varint(field << 3);
        self.varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.varint(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_and_numbers_are_written_as_the_formats_say() {
        // RFC 3720, B.4: the checksum of 32 zeros is 8a9136aa
        assert_eq!(CRC.checksum(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked(&[0; 32]), (0x6d55_1522_u32.wrapping_add(0xa282_ead8)).to_le_bytes());
        let mut message = Message::default();
        // the examples of the description of the wire format
        message.integer(1, 150);
        message.bytes(2, b"testing");
        assert_eq!(message.0, [0x08, 0x96, 0x01, 0x12, 0x07, 0x74, 0x65, 0x73, 0x74, 0x69, 0x6e, 0x67]);
    }
}
