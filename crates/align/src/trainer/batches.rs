//! Which examples each optimizer step sees.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// The batches of a whole training, fixed by the number of examples, the batch size and the seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchPlan {
    /// The examples of every optimizer step.
    pub batches: Vec<Vec<usize>>,
    /// Optimizer steps in one pass over the examples.
    pub steps_per_epoch: usize,
}

impl BatchPlan {
    /// Batches of `batch_size` of `examples` examples, shuffled anew in each epoch. The last batch of an epoch is
    /// smaller when the numbers do not divide; one with fewer than `least` examples joins the one before it.
    pub fn new(examples: usize, batch_size: usize, least: usize, epochs: usize, seed: u64) -> Self {
        let (whole, rest) = (examples / batch_size, examples % batch_size);
        let steps_per_epoch = if rest == 0 || (whole > 0 && rest < least) { whole } else { whole + 1 };
        let batches = (0..epochs).flat_map(|epoch| {
            let order = epoch_order(examples, seed, epoch as u64);
            (0..steps_per_epoch).map(move |step| {
                let start = step * batch_size;
                let end = if step + 1 == steps_per_epoch { examples } else { start + batch_size };
                order[start..end].to_vec()
            })
        });
        Self { batches: batches.collect(), steps_per_epoch }
    }
}

/// The order in which an epoch visits the examples; depends on seed and epoch alone.
pub(crate) fn epoch_order(examples: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(epoch);
    let mut order: Vec<usize> = (0..examples).collect();
    order.shuffle(&mut rng);
    order
}

/// For each member of a batch another member, so that each is taken once and none takes itself. Members of one group
/// take members of other groups, as long as no group holds more than half of the batch.
///
/// `groups[i]` names the group of member i. At least two members.
pub(crate) fn derangement<G: Ord>(groups: &[G]) -> Vec<usize> {
    let mut sorted: Vec<usize> = (0..groups.len()).collect();
    sorted.sort_by_key(|&member| &groups[member]);
    // a shift by the size of the largest group leads out of every group
    let largest = sorted.chunk_by(|&a, &b| groups[a] == groups[b]).map(<[usize]>::len).max().unwrap_or(0);
    let shift = if largest < groups.len() { largest } else { 1 };
    let mut partners = vec![0; groups.len()];
    for (place, &member) in sorted.iter().enumerate() {
        partners[member] = sorted[(place + shift) % sorted.len()];
    }
    partners
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_epoch_visits_every_example_once_in_an_order_of_its_own() {
        let plan = BatchPlan::new(10, 4, 1, 2, 7);
        assert_eq!((plan.steps_per_epoch, plan.batches.len()), (3, 6));
        let mut epochs: Vec<Vec<usize>> = plan.batches.chunks(3).map(<[_]>::concat).collect();
        assert_ne!(epochs[0], epochs[1]);
        epochs.iter_mut().for_each(|epoch| epoch.sort_unstable());
        assert!(epochs.iter().all(|epoch| epoch.iter().copied().eq(0..10)));
    }

    #[test]
    fn a_rest_that_is_too_small_joins_the_batch_before_it() {
        let sizes =
            |examples| -> Vec<usize> { BatchPlan::new(examples, 4, 2, 1, 0).batches.iter().map(Vec::len).collect() };
        assert_eq!((sizes(9), sizes(10), sizes(1)), (vec![4, 5], vec![4, 4, 2], vec![1]));
    }

    proptest! {
        #[test]
        fn nobody_is_their_own_partner(groups in prop::collection::vec(0u8..6, 2..40)) {
            let partners = derangement(&groups);
            let mut sorted = partners.clone();
            sorted.sort_unstable();
            prop_assert!(sorted.into_iter().eq(0..groups.len()), "each is taken once");
            let largest = (0u8..6).map(|g| groups.iter().filter(|&&x| x == g).count()).max().unwrap();
            for (member, &partner) in partners.iter().enumerate() {
                prop_assert_ne!(member, partner);
                if 2 * largest <= groups.len() {
                    prop_assert_ne!(groups[member], groups[partner]);
                }
            }
        }
    }
}
