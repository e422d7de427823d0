//! The ids of words that were seen before.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Words that are remembered at once, a few megabytes for each thread that encodes.
const MOST: usize = 1 << 16;

/// Longer words, in bytes, hardly ever come again.
const LONGEST: usize = 64;

/// The ids of words, for as many threads as encode at once. The ids of a word do not depend on what is beside it.
#[derive(Debug, Default)]
pub(super) struct Words(Mutex<Vec<Known>>);

/// The ids of words that one thread looks up and adds to.
#[derive(Debug, Default)]
pub(super) struct Known(HashMap<Box<str>, Box<[u32]>>);

impl Words {
    /// Lends what is known, by one lock for a text instead of one for a word, to be given [back](Self::give_back).
    pub(super) fn take(&self) -> Known {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    pub(super) fn give_back(&self, known: Known) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(known);
    }
}

impl Known {
    pub(super) fn get(&self, word: &str) -> Option<&[u32]> {
        self.0.get(word).map(|ids| &**ids)
    }

    /// Remembers a word; when there are too many, all others are forgotten.
    pub(super) fn insert(&mut self, word: &str, ids: &[u32]) {
        if word.len() > LONGEST {
            return;
        }
        if self.0.len() == MOST {
            self.0.clear();
        }
        self.0.insert(word.into(), ids.into());
    }
}
