//! What a training keeps, and goes back to.

use super::*;

/// Every kind of state that a training may keep, stopped and continued.
#[test]
fn every_training_continues_bit_exactly() {
    let examples = Dataset::Examples(examples(&fixture()));
    let pairs = Dataset::Pairs(pairs(&fixture()));
    let start = tiny("tied");
    let base = TrainOptions { epochs: 2, weight_decay: 0.1, ..options() };
    let dpo = Objective::Pairwise(DPO);
    let cases = [
        (Objective::Unpaired(KTO), &examples, base.clone()),
        (Objective::Unpaired(BCO), &examples, TrainOptions { validate_every: 3, ..base.clone() }),
        (dpo, &pairs, TrainOptions { optimizer: OptimizerKind::AdamW8bit, ema_decay: Some(0.8), ..base.clone() }),
        (dpo, &pairs, TrainOptions { optimizer: OptimizerKind::Lion, learning_rate: 1e-3, ..base.clone() }),
        (dpo, &pairs, TrainOptions { optimizer: OptimizerKind::Muon, ..base.clone() }),
        (dpo, &pairs, TrainOptions { validate_every: 2, patience: Some(50), ema_decay: Some(0.5), ..base.clone() }),
        (dpo, &pairs, TrainOptions { lora: Some(lora(0.3)), optimizer: OptimizerKind::Muon, ..base.clone() }),
        (TDPO, &pairs, TrainOptions { lora: Some(lora(0.0)), validate_every: 5, ..base }),
    ];
    for (objective, data, options) in &cases {
        let cache = tempfile::tempdir().unwrap();
        let run = |folder: &Path, stop: u64| {
            let (start, cache) = (start.clone(), cache.path());
            let alignment = Alignment { start, data, validation: data, objective, options, folder, cache };
            alignment.run(&mut StopAfter(stop, 0))
        };
        let whole_folder = tempfile::tempdir().unwrap();
        let whole = run(whole_folder.path(), u64::MAX).unwrap().policy;
        assert_ne!(whole.weights, start.weights);
        let folder = tempfile::tempdir().unwrap();
        for stop in [3, 13] {
            assert!(matches!(run(folder.path(), stop), Err(Error::Interrupted(_))));
        }
        let policy = run(folder.path(), u64::MAX).unwrap().policy;
        assert!(policy.weights == whole.weights, "{objective:?} {options:?}");
        let read = |folder: &Path| crate::log::read_metric(&folder.join("metrics.jsonl"), "loss").unwrap();
        assert_eq!(read(folder.path()), read(whole_folder.path()));
        assert_eq!(read(folder.path())[0].1, read(whole_folder.path())[0].1);
    }
}

#[test]
fn a_training_without_progress_ends_early_with_the_best_weights() {
    let pairs = pairs(&fixture());
    let start = tiny("tied");
    let reference = reference(&start, &pairs);
    let task = Preferences::new(&pairs[..20], &reference[..20], &start, &DPO);
    // held-out pairs that prefer the opposite: every step in the right direction makes them worse
    let swap = |pair: &TokenizedPair| TokenizedPair {
        chosen: pair.rejected.clone(),
        rejected: pair.chosen.clone(),
        ..pair.clone()
    };
    let swapped: Vec<TokenizedPair> = pairs[..20].iter().map(swap).collect();
    let swapped_reference: Vec<[f64; 2]> = reference[..20].iter().map(|[c, r]| [*r, *c]).collect();
    let held_out = Preferences::new(&swapped, &swapped_reference, &start, &DPO);
    let options = TrainOptions { epochs: 8, validate_every: 2, patience: Some(3), ..options() };
    let folder = tempfile::tempdir().unwrap();
    let mut policy = start.clone();
    let records = train_whole(&mut policy, &task, Some(&held_out), &options, folder.path(), &mut never()).unwrap();
    let losses: Vec<f64> = records.iter().filter_map(|r| r.validation.get("eval_loss").copied()).collect();
    let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
    let place = losses.iter().position(|&loss| loss == best).unwrap();
    assert_eq!((records.len(), losses.len()), (2 * (place + 4), place + 4), "{losses:?}");
    assert_eq!(evaluate(&policy, &held_out, whole()).loss, best, "the best weights are those that stay");
    assert!(records[1].validation.contains_key("eval_rewards/accuracies"));
    assert!(records[0].validation.is_empty());
}

#[test]
fn an_average_of_weights_follows_the_steps() {
    let pairs = pairs(&fixture());
    let start = tiny("tied");
    let reference = reference(&start, &pairs);
    let task = Preferences::new(&pairs, &reference, &start, &DPO);
    let run = |epochs: usize, ema_decay| {
        let folder = tempfile::tempdir().unwrap();
        let mut policy = start.clone();
        let options = TrainOptions { ema_decay, epochs, schedule: Schedule::Constant, warmup_ratio: 0.0, ..options() };
        let options = TrainOptions { batch_size: 40, ..options };
        train_whole(&mut policy, &task, None, &options, folder.path(), &mut never()).unwrap();
        policy.weights
    };
    let average = run(2, Some(0.75));
    let (first, second) = (run(1, None), run(2, None));
    for (((average, start), first), second) in average.iter().zip(&start.weights).zip(&first).zip(&second) {
        let expected = 0.75 * (0.75 * start + 0.25 * first) + 0.25 * second;
        assert!((average - expected).abs() < 1e-6);
    }
}

#[test]
fn a_broken_loss_of_held_out_rows_names_them() {
    let pairs = pairs(&fixture());
    let start = tiny("tied");
    let mut reference = reference(&start, &pairs);
    let finite = reference.clone();
    let task = Preferences::new(&pairs, &finite, &start, &DPO);
    reference[4][1] = f64::INFINITY;
    let held_out = Preferences::new(&pairs, &reference, &start, &DPO);
    let options = TrainOptions { validate_every: 2, ..options() };
    let folder = tempfile::tempdir().unwrap();
    let error = train_whole(&mut start.clone(), &task, Some(&held_out), &options, folder.path(), &mut never());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("step 2") && error.contains("held-out rows is NaN") && error.contains("rows 5."), "{error}");
}

/// Passes of another size would sum in another order.
#[test]
fn a_training_goes_on_with_the_passes_that_it_began_with() {
    let data = Dataset::Pairs(pairs(&fixture()));
    let start = tiny("tied");
    let cut = |micro_batch_tokens| TrainOptions { micro_batch_tokens, batch_size: 8, ..options() };
    let cache = tempfile::tempdir().unwrap();
    let run = |options: &TrainOptions, folder: &Path, stop: u64| {
        let (start, objective, cache) = (start.clone(), &Objective::Pairwise(DPO), cache.path());
        let alignment = Alignment { start, data: &data, validation: &data, objective, options, folder, cache };
        alignment.run(&mut StopAfter(stop, 0)).map(|aligned| aligned.policy.weights)
    };
    let folders = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let [whole, small, changed] = folders.each_ref().map(|folder| folder.path());
    let expected = run(&cut(Some(20)), small, u64::MAX).unwrap();
    assert_ne!(run(&cut(None), whole, u64::MAX).unwrap(), expected, "the cut shows in the last bits");
    run(&cut(Some(20)), changed, 2).unwrap_err();
    assert_eq!(run(&cut(None), changed, u64::MAX).unwrap(), expected);
}
