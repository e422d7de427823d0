//! KTO's z₀ and BCO's δ.

use std::collections::BTreeSet;

use super::adapters::adapted;
use super::*;

/// The shift of the whole batch, from sequences scored one at a time.
#[test]
fn shifts_are_those_of_the_whole_batch_however_it_is_cut() {
    let examples = examples(&fixture());
    let (start, policy) = (moved("untied_gqa"), tiny("untied_gqa"));
    let reference = example_scores(&start, &examples);
    let batch: Vec<usize> = (0..examples.len()).collect();
    let others = mismatched(&examples, &batch, longest(&examples));
    for (own, other) in examples.iter().zip(&others) {
        assert_eq!(*own.prompt, *other.prompt);
        assert_ne!(*own.response, *other.responses[0], "a response of another prompt");
    }
    let alone = |model: &Model, items: &[Sequences<'_>]| -> Vec<f64> {
        items.iter().map(|item| scores(model, std::slice::from_ref(item))[0]).collect()
    };
    let mismatched_reference = [alone(&start, &others)];
    let policy_scores = alone(&policy, &others);
    let rho = policy_scores.iter().zip(&mismatched_reference[0]).map(|(p, r)| p - r);
    let kl = (rho.sum::<f64>() / others.len() as f64).max(0.0);
    assert!(kl > 0.01, "{kl} tells nothing");
    let delta = example_scores(&policy, &examples).iter().zip(&reference).map(|(p, r)| 0.5 * (p - r)).sum::<f64>()
        / examples.len() as f64;
    for (objective, name, expected) in [(KTO, "kl", kl), (BCO, "delta", delta)] {
        let task = LabelledResponses::new(&examples, &reference, &objective, &mismatched_reference);
        let policy = Policy::Whole(policy.clone());
        let run = |micro_batch_tokens| gradient(&policy, &task, &batch, cut(micro_batch_tokens, false));
        let whole = run(10_000);
        assert!((whole.means.metrics[name] - expected).abs() < 1e-5, "{name}: {:?} {expected}", whole.means);
        assert_eq!(whole.running.count, if objective == BCO { batch.len() as u64 } else { 0 }, "the batch counts once");
        for micro_batch_tokens in [60, 1] {
            let cut = run(micro_batch_tokens);
            assert!(cut.broken.is_empty());
            assert_eq!((cut.means, cut.running), (whole.means.clone(), whole.running));
            assert_close(&cut.gradient, &whole.gradient);
        }
    }
}

/// Mismatched responses are packed behind the batch, whose prompts they share, unless it has to be cut or the batch's own
/// responses are scored with dropout.
#[test]
fn mismatched_responses_cost_no_prompts_where_the_batch_is_one_pass() {
    let plain = examples(&fixture());
    let system = [1, 3, 4, 6, 5, 8, 2, 9, 7, 3];
    let behind_system = plain.iter().map(|example| {
        let prompt = [&system[..], &example.prompt].concat().into();
        TokenizedExample { prompt, ..example.clone() }
    });
    check_mismatched_cost(&behind_system.collect::<Vec<_>>(), system.len());
    check_mismatched_cost(&plain, 0);
}

/// As above, of examples whose prompts begin with so many tokens in common.
fn check_mismatched_cost(examples: &[TokenizedExample], common: usize) {
    let start = moved("untied_gqa");
    let reference = example_scores(&start, examples);
    let batch: Vec<usize> = (0..examples.len()).collect();
    let others = mismatched(examples, &batch, longest(examples));
    // so much less that z₀ is not cut at 0
    let mismatched_reference = [scores(&start, &others).iter().map(|logp| logp - 1.0).collect::<Vec<_>>()];
    let task = LabelledResponses::new(examples, &reference, &KTO, &mismatched_reference);
    let run = |dropout: f64, micro_batch_tokens: usize| {
        let policy = adapted(&start, dropout);
        gradient(&policy, &task, &batch, cut(micro_batch_tokens, false))
    };
    // the prompt of a pair is that of both examples, and what all prompts begin with is computed once a pass; not with dropout
    let distinct: BTreeSet<&[u32]> = examples.iter().map(|example| &*example.prompt).collect();
    let prompts = common + distinct.iter().map(|prompt| prompt.len() - common).sum::<usize>();
    let alone: Vec<Sequences<'_>> = batch.iter().map(|&example| task.sequences(example)).collect();
    let computed = |items: &[Sequences<'_>]| -> usize { items.iter().map(|item| item.computed(false)).sum() };
    let responses =
        |items: &[Sequences<'_>]| computed(items) - items.iter().map(|item| item.prompt.len()).sum::<usize>();
    let together = prompts + responses(&alone) + responses(&others);
    for (dropout, micro_batch_tokens, tokens) in [
        (0.0, together, together),
        (0.0, together - 1, prompts + together),
        (0.4, 10_000, computed(&alone) + prompts + responses(&others)),
    ] {
        let pass = run(dropout, micro_batch_tokens);
        assert_eq!(pass.tokens, tokens);
        let whole = run(0.0, 10_000);
        assert_eq!(pass.means.metrics["kl"], whole.means.metrics["kl"]);
        assert!(whole.means.metrics["kl"] > 0.1);
        assert_eq!(pass.means.loss == whole.means.loss, dropout == 0.0, "the batch's own responses are dropped from");
    }
    // where nothing is kept of them, a pass has room for mismatched responses besides
    let own = prompts + responses(&alone);
    let behind = responses(&others);
    for (dtype, recompute) in [(Precision::F32, true), (Precision::Bf16, false), (Precision::Bf16, true)] {
        let run = |micro_batch_tokens, behind| {
            let Cut { plan, .. } = cut(micro_batch_tokens, recompute);
            let cut = Cut { dtype, plan: MemoryPlan { behind, ..plan } };
            gradient(&Policy::Whole(start.clone()), &task, &batch, cut)
        };
        let [pass, apart, cut] = [(own, behind), (own, behind - 1), (own - 1, behind)].map(|(own, b)| run(own, b));
        assert_eq!([pass.tokens, apart.tokens], [together, prompts + together]);
        assert!(cut.tokens > apart.tokens);
        assert_eq!((&pass.means, &pass.gradient), (&apart.means, &apart.gradient), "{dtype:?}, {recompute}");
        assert_eq!(pass.means, cut.means);
    }
}

/// A gradient of a loss whose shift is a constant: the finite difference keeps it where it was.
#[test]
fn no_derivative_flows_through_a_shift() {
    let examples = examples(&fixture());
    let (start, policy) = (tiny("untied_gqa"), moved("untied_gqa"));
    let reference = example_scores(&start, &examples);
    let batch: Vec<usize> = (0..6).collect();
    let others = mismatched(&examples, &batch, longest(&examples));
    let mismatched_reference = [scores(&start, &others)];
    for objective in [KTO, BCO] {
        let task = LabelledResponses::new(&examples, &reference, &objective, &mismatched_reference);
        let Pass { means, gradient, .. } = gradient(&Policy::Whole(policy.clone()), &task, &batch, whole());
        let shift = means.metrics[if objective == KTO { "kl" } else { "delta" }];
        // along the gradient of the loss the loss must change by the squared norm
        let loss = |by: f32| {
            let moved: Vec<f32> = policy.weights.iter().zip(&gradient).map(|(w, g)| w + by * g).collect();
            let model = Model { weights: moved, ..policy.clone() };
            let scores = example_scores(&model, &examples[..6]);
            let losses = batch.iter().map(|&example| {
                let scored = [Scored { logp: scores[example], kl: 0.0 }];
                task.evaluate(example, &scored, shift).loss
            });
            losses.sum::<f64>() / 6.0
        };
        let squared = global_norm(&gradient).powi(2);
        let step = (2e-3 / squared.sqrt()) as f32;
        let slope = (loss(step) - loss(-step)) / (2.0 * f64::from(step));
        assert!((slope / squared - 1.0).abs() < 1e-2, "{slope} {squared}");
    }
}

#[test]
fn a_batch_of_one_has_no_mismatched_response() {
    let examples = examples(&fixture());
    let reference = vec![-1.0; examples.len()];
    let folder = tempfile::tempdir().unwrap();
    for (examples, batch_size) in [(&examples[..1], 4), (&examples[..], 1)] {
        let task = LabelledResponses::new(examples, &reference[..examples.len()], &KTO, &[]);
        let options = TrainOptions { batch_size, ..options() };
        let error = train_whole(&mut tiny("tied"), &task, None, &options, folder.path(), &mut never()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("at least 2"), "{error}");
    }
}
