//! Which entries of a task vector are kept.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Says of the entries of one task vector's tensor, one after the other, which are kept.
#[derive(Debug, Clone)]
pub(super) enum Trim {
    /// All.
    Nothing,
    /// Those of the largest magnitudes.
    Smallest(Largest),
    /// Each with the same probability.
    Random(Box<Random>),
}

impl Trim {
    /// Whether the next entry is kept.
    pub(super) fn keeps(&mut self, entry: f32) -> bool {
        match self {
            Self::Nothing => true,
            Self::Smallest(largest) => largest.keeps(entry),
            Self::Random(random) => random.keeps(),
        }
    }
}

/// The entries above a threshold, and as many of those at it, first come, as there is room for.
#[derive(Debug, Clone)]
pub(super) struct Largest {
    threshold: u32,
    room: usize,
}

impl Largest {
    fn keeps(&mut self, entry: f32) -> bool {
        let key = key(entry);
        let at_threshold = key == self.threshold && self.room > 0;
        self.room -= usize::from(at_threshold);
        at_threshold || key > self.threshold
    }
}

/// Bits that order floats by magnitude.
fn key(entry: f32) -> u32 {
    entry.abs().to_bits()
}

const HALF: usize = 1 << 16;

/// Finds the threshold of a tensor's largest entries in two passes over it, in constant memory: the first counts the
/// upper halves of the keys, the second the lower halves among the keys that start as the threshold does.
#[derive(Debug, Clone)]
pub(super) struct Select {
    /// How many entries to keep; after the first pass, how many of those that start with `upper`.
    keep: usize,
    upper: Option<u32>,
    counts: Vec<usize>,
}

impl Select {
    /// For the share `density` of `entries`, rounded down, but at least one entry.
    pub(super) fn new(entries: usize, density: f64) -> Self {
        let keep = ((density * entries as f64) as usize).max(1);
        Self { keep, upper: None, counts: vec![0; HALF] }
    }

    /// Counts the next entries of a pass.
    pub(super) fn count(&mut self, entries: impl Iterator<Item = f32>) {
        for key in entries.map(key) {
            match self.upper {
                None => self.counts[(key >> 16) as usize] += 1,
                Some(upper) if key >> 16 == upper => self.counts[key as usize % HALF] += 1,
                Some(_) => {}
            }
        }
    }

    /// Ends the first pass.
    pub(super) fn next_pass(&mut self) {
        self.upper = Some(self.descend());
        self.counts.fill(0);
    }

    /// Ends the second pass.
    pub(super) fn finish(mut self) -> Largest {
        let lower = self.descend();
        Largest { threshold: self.upper.unwrap_or(0) << 16 | lower, room: self.keep }
    }

    /// The half at which the entries to keep run out, and leaves in `keep` how many of them are there.
    fn descend(&mut self) -> u32 {
        for (half, &count) in self.counts.iter().enumerate().rev() {
            if self.keep <= count {
                return half as u32;
            }
            self.keep -= count;
        }
        0
    }
}

/// Each entry with a probability, by a generator of its own.
#[derive(Debug, Clone)]
pub(super) struct Random {
    generator: ChaCha8Rng,
    /// Of 2³² equally likely numbers, those below this mean that an entry is kept.
    below: u64,
}

impl Random {
    /// The choice for one tensor of one model, counted from 0. It depends on nothing else.
    pub(super) fn new(density: f64, seed: u64, tensor: &str, model: usize) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes()).update(&(model as u64).to_le_bytes()).update(tensor.as_bytes());
        let generator = ChaCha8Rng::from_seed(*hasher.finalize().as_bytes());
        Self { generator, below: (density * 2_f64.powi(32)).round() as u64 }
    }

    fn keeps(&mut self) -> bool {
        u64::from(self.generator.next_u32()) < self.below
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which entries are kept, by sorting all of them.
    fn sorted(entries: &[f32], density: f64) -> Vec<bool> {
        let mut order: Vec<usize> = (0..entries.len()).collect();
        order.sort_by(|&a, &b| entries[b].abs().total_cmp(&entries[a].abs()).then(a.cmp(&b)));
        let mut kept = vec![false; entries.len()];
        for &i in &order[..((density * entries.len() as f64) as usize).max(1)] {
            kept[i] = true;
        }
        kept
    }

    fn largest(entries: &[f32], density: f64) -> Trim {
        let mut select = Select::new(entries.len(), density);
        select.count(entries.iter().copied());
        select.next_pass();
        // a pass may come in parts
        entries.chunks(7).for_each(|part| select.count(part.iter().copied()));
        Trim::Smallest(select.finish())
    }

    #[test]
    fn the_largest_entries_are_those_of_a_sort() {
        let mut generator = ChaCha8Rng::seed_from_u64(1);
        for spread in [2, 20, 1 << 20] {
            // with many equal magnitudes where the spread is small, zeros among them
            let draw = |_| {
                let bits = generator.next_u32();
                let magnitude = (bits >> 1) % spread;
                magnitude as f32 * if bits % 2 == 0 { 1e-3 } else { -1e-3 }
            };
            let entries: Vec<f32> = (0..1000).map(draw).collect();
            for density in [1e-9, 0.1, 0.333, 0.5, 0.999, 1.0] {
                let mut trim = largest(&entries, density);
                let kept: Vec<bool> = entries.iter().map(|&entry| trim.keeps(entry)).collect();
                assert_eq!(kept, sorted(&entries, density), "{spread} {density}");
            }
        }
    }

    #[test]
    fn random_entries_are_kept_as_often_as_the_density_says() {
        const N: usize = 100_000;
        let kept = |seed, tensor: &str, model| -> Vec<bool> {
            let mut random = Random::new(0.3, seed, tensor, model);
            (0..N).map(|_| random.keeps()).collect()
        };
        let first = kept(0, "a", 0);
        let share = first.iter().filter(|&&kept| kept).count() as f64 / N as f64;
        // five standard deviations
        assert!((share - 0.3).abs() < 5.0 * (0.21 / N as f64).sqrt(), "{share}");
        assert_eq!(first, kept(0, "a", 0));
        for other in [kept(1, "a", 0), kept(0, "b", 0), kept(0, "a", 1)] {
            let both = first.iter().zip(&other).filter(|(a, b)| **a && **b).count() as f64 / N as f64;
            assert!((both - 0.09).abs() < 5.0 * (0.09 * 0.91 / N as f64).sqrt(), "{both}");
        }
        let mut all = Random::new(1.0, 0, "a", 0);
        assert!((0..N).all(|_| all.keeps()));
    }
}
