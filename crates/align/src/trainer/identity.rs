//! What tells one training from another.

use super::{Policy, TrainOptions};
use crate::task::{Scored, Task};

/// A hash of all that decides the course of a training of `policy`, on the first task, validated on the others; the arithmetic
/// decides its last bits.
pub(super) fn identity(policy: &Policy, tasks: &[&dyn Task], options: &TrainOptions) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{} {} {}", engine::arithmetic(), policy.hash(), options.course()).as_bytes());
    for task in tasks {
        hasher.update(task.parameters().as_bytes());
        for example in 0..task.len() {
            let sequences = task.sequences(example);
            sequences.hash_into(&mut hasher);
            // the loss at some log-probabilities stands for the reference and the labels
            let scored = vec![Scored { logp: -1.0, kl: 0.0 }; sequences.responses.len()];
            let loss = task.evaluate(example, &scored, 0.0).loss;
            hasher.update(&loss.to_le_bytes());
        }
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use engine::Model;
    use engine::checkpoint::load_model;

    use super::super::tests::options;
    use super::*;
    use crate::data::TokenizedPair;
    use crate::objective::Pairwise;
    use crate::task::Preferences;

    /// The identity of a training on one pair.
    fn of(start: &Model, pair: &TokenizedPair, reference: [f64; 2], objective: Pairwise) -> String {
        let (pairs, reference) = ([pair.clone()], [reference]);
        let task = Preferences::new(&pairs, &reference, start, &objective);
        identity(&Policy::Whole(start.clone()), &[&task], &options())
    }

    #[test]
    fn every_parameter_of_a_loss_and_the_reference_tell_trainings_apart() {
        let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/fixtures/tiny/tied");
        let start = load_model(tiny.as_ref()).unwrap();
        let pair = TokenizedPair {
            prompt: [1, 5].into(),
            chosen: [7, 2].into(),
            rejected: [8, 2].into(),
            is_unsafe: None,
            margin: None,
            row: 1,
        };
        // at these, the loss shows neither β of `hinge` nor α of `tdpo`
        let reference = [-300.0, -1.0];
        let same_loss = [
            [Pairwise::Hinge { beta: 0.5 }, Pairwise::Hinge { beta: 0.6 }],
            [Pairwise::Tdpo { beta: 0.5, alpha: 0.5 }, Pairwise::Tdpo { beta: 0.5, alpha: 0.6 }],
        ];
        for [objective, other] in same_loss {
            let own = of(&start, &pair, reference, objective);
            assert_eq!(own, of(&start, &pair, reference, objective));
            assert_ne!(own, of(&start, &pair, reference, other));
        }
        let dpo = Pairwise::Dpo { beta: 0.1, label_smoothing: 0.0 };
        let own = of(&start, &pair, reference, dpo);
        assert_ne!(own, of(&start, &pair, [-300.0, -1.5], dpo));
        let other = TokenizedPair { chosen: [9, 2].into(), ..pair };
        assert_ne!(own, of(&start, &other, reference, dpo));
    }
}
