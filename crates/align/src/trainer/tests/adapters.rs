//! Adapters, dropout, and divergences along responses.

use super::*;

/// An adapter that is no longer 0, on a model that is the reference.
pub(super) fn adapted(start: &Model, dropout: f64) -> Policy {
    let mut adapter = Adapter::new(start, lora(dropout), 1).unwrap();
    adapter.weights.iter_mut().enumerate().for_each(|(i, weight)| *weight += 0.02 * ((i % 7) as f32 - 3.0));
    Policy::Adapted(start.clone(), adapter)
}

#[test]
fn an_adapter_starts_at_margin_zero_and_leaves_the_model_as_it_is() {
    let pairs = pairs(&fixture());
    let start = tiny("untied_gqa");
    let reference = reference(&start, &pairs);
    let task = Preferences::new(&pairs, &reference, &start, &DPO);
    for options in [
        TrainOptions { lora: Some(lora(0.2)), ..options() },
        TrainOptions { lora: Some(LoraOptions { dora: true, ..lora(0.0) }), ..options() },
    ] {
        let adapter = Adapter::new(&start, options.lora.clone().unwrap(), 1).unwrap();
        let mut policy = Policy::Adapted(start.clone(), adapter.clone());
        let folder = tempfile::tempdir().unwrap();
        let records = train(&mut policy, &task, None, &options, folder.path(), &mut never()).unwrap();
        assert_eq!(records[0].metrics["rewards/margins"], 0.0);
        assert!(records[9].loss < records[0].loss);
        assert_ne!(policy.weights(), &adapter.weights);
        // the adapter in the decoder is the adapter in the weights
        let Policy::Adapted(_, adapter) = policy else { unreachable!() };
        let mut folded = start.clone();
        adapter.fold_into(&mut folded);
        let mut decoder = Decoder::new(&start, 32);
        let packed = PACKING.pack(&[pairs[0].sequences(), pairs[1].sequences()], &[0, 1]);
        let parameters = Parameters { base: &start.weights, adapter: Some(&adapter), dropout_seed: None };
        let (apart, together) = (decoder.logps(parameters, &packed), decoder.logps(&folded.weights, &packed));
        assert!(apart.iter().zip(&together).all(|(a, b)| (a / b - 1.0).abs() < 1e-5), "{apart:?} {together:?}");
    }
}

/// What is dropped of an example depends on seed, step and example alone; the divergence on policy and reference alone.
#[test]
fn dropout_and_divergence_do_not_depend_on_the_cut() {
    dropout_and_divergence_of(&pairs(&fixture()));
    dropout_and_divergence_of(&with_two_prompts(pairs(&fixture())));
}

fn dropout_and_divergence_of(pairs: &[TokenizedPair]) {
    let start = tiny("untied_gqa");
    let reference = reference(&start, pairs);
    let all: Vec<usize> = (0..pairs.len()).collect();
    let tdpo = Pairwise::Tdpo { beta: 0.5, alpha: 0.5 };
    for (objective, dropout) in [(&DPO, 0.4), (&tdpo, 0.0), (&tdpo, 0.4)] {
        let task = Preferences::new(pairs, &reference, &start, objective);
        let policy = adapted(&start, dropout);
        let run = |cut| gradient(&policy, &task, &all, cut);
        let whole = run(whole());
        for (micro_batch_tokens, recompute) in [(1, false), (40, true)] {
            let other = run(cut(micro_batch_tokens, recompute));
            assert_eq!(other.means, whole.means);
            assert_close(&other.gradient, &whole.gradient);
        }
        let (plain, _) = cut(1000, false).passes(&policy).means(
            policy.parameters(None),
            &Batch { task: &task, step: 0, examples: &all },
            RunningMean::default(),
        );
        assert_eq!(plain.loss == whole.means.loss, dropout == 0.0, "only training drops");
        assert_eq!(plain.metrics.get("kl/chosen").is_some_and(|kl| *kl > 1e-4), objective == &tdpo);
    }
}

/// The derivative through the divergences of rejected responses counts; that through chosen ones is held fixed.
#[test]
fn the_gradient_of_tdpo_equals_finite_differences() {
    let pairs = &pairs(&fixture())[..5];
    let (start, policy) = (tiny("untied_gqa"), moved("untied_gqa"));
    let reference = reference(&start, pairs);
    let objective = Pairwise::Tdpo { beta: 0.5, alpha: 0.9 };
    let task = Preferences::new(pairs, &reference, &start, &objective);
    let all: Vec<usize> = (0..pairs.len()).collect();
    let gradient = gradient(&Policy::Whole(policy.clone()), &task, &all, whole()).gradient;
    let mut decoder = Decoder::new(&start, 32);
    let sequences: Vec<Sequences<'_>> = pairs.iter().map(TokenizedPair::sequences).collect();
    let packed = PACKING.pack(&sequences, &all);
    let rows = decoder.head_rows(&start.weights, &packed);
    let head = engine::Head { rows: &rows, weights: &start.weights[start.layout.head.clone()] };
    let (_, kls) = decoder.forward_with_divergence(&policy.weights, head, &packed, Keep::Inputs);
    let mut loss = |by: f32| {
        let moved: Vec<f32> = policy.weights.iter().zip(&gradient).map(|(w, g)| w + by * g).collect();
        let (logps, moved_kls) = decoder.forward_with_divergence(&moved, head, &packed, Keep::Inputs);
        let losses = all.iter().map(|&example| {
            let at = 2 * example;
            let chosen = Scored { logp: logps[at], kl: kls[at] };
            let rejected = Scored { logp: logps[at + 1], kl: moved_kls[at + 1] };
            task.evaluate(example, &[chosen, rejected], 0.0).loss
        });
        losses.sum::<f64>() / 5.0
    };
    let squared = global_norm(&gradient).powi(2);
    let step = (2e-3 / squared.sqrt()) as f32;
    let slope = (loss(step) - loss(-step)) / (2.0 * f64::from(step));
    assert!((slope / squared - 1.0).abs() < 1e-2, "{slope} {squared}");
}
