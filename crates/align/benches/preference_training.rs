//! Training on preferences by the real trainer, on tokens that another program wrote; `benches/peers/compare.py` runs it in
//! turns with TRL.
//!
//! ```text
//! cargo bench -p sacpo-align --bench preference_training -- --model MODEL_DIR --tokens tokens.json \
//!     [--loss dpo|kto] [--dtype f32|bf16] [--lora RANK] [--batch-size 8] [--threads 2]
//! ```
//!
//! The file holds `{"pairs": [{"prompt": [ids], "chosen": [ids], "rejected": [ids]}, …]}`, two or more whole batches. Each pair
//! is trained on once, in the order of the file; for `kto` a batch of N pairs is N desirable and N undesirable responses. All else
//! is as `trl_train.py` has it: AdamW, learning rate 1e-6 falling to 0, β 0.1, gradient norms up to 1.
//!
//! The last line of standard output is one JSON object. The first step is in none of its rates: it also gets memory for the first
//! time.

use std::path::{Path, PathBuf};

use align::data::{Dataset, TokenizedExample, TokenizedPair};
use align::objective;
use align::reference;
use align::sequences::Packing;
use align::step::Alignment;
use align::task::{longest, mismatched};
use align::trainer::{Monitor, StepRecord, TrainOptions};
use engine::checkpoint::load_model;
use engine::optim::{OptimizerKind, Schedule};
use engine::{LoraOptions, Mixture, Precision, Projection, memory, roofline};
use serde::Deserialize;
use serde_json::json;

/// As in the program that is measured.
#[global_allocator]
static ALLOCATOR: engine::memory::LargePages = engine::memory::LargePages;

#[derive(Deserialize)]
struct Tokens {
    pairs: Vec<Pair>,
}

#[derive(Deserialize, Clone)]
struct Pair {
    prompt: Vec<u32>,
    chosen: Vec<u32>,
    rejected: Vec<u32>,
}

/// One line on standard error for each step.
struct Steps;

impl Monitor for Steps {
    fn step(&mut self, total: u64, record: &StepRecord) {
        eprintln!("step {} of {total}: {:.2} s, loss {:.6}", record.step, record.seconds, record.loss);
    }

    fn stop_requested(&self) -> bool {
        false
    }
}

/// The pairs as the objective takes them, batch by batch.
fn dataset(pairs: &[Pair], kto: bool, batch_size: usize) -> Dataset {
    if !kto {
        let pair = |(row, pair): (usize, &Pair)| TokenizedPair {
            prompt: pair.prompt.clone().into(),
            chosen: pair.chosen.clone().into(),
            rejected: pair.rejected.clone().into(),
            is_unsafe: None,
            margin: None,
            row,
        };
        return Dataset::Pairs(pairs.iter().enumerate().map(pair).collect());
    }
    let example = |pair: &Pair, desirable: bool| TokenizedExample {
        prompt: pair.prompt.clone().into(),
        response: if desirable { &pair.chosen } else { &pair.rejected }.clone().into(),
        desirable,
        row: 0,
    };
    let of_batch = |batch: &[Pair]| -> Vec<TokenizedExample> {
        [true, false].iter().flat_map(|&desirable| batch.iter().map(move |pair| example(pair, desirable))).collect()
    };
    Dataset::Examples(pairs.chunks(batch_size).flat_map(of_batch).collect())
}

/// The rows in such an order that the trainer's batches, which are drawn, are those of the file.
fn arranged<T: Clone>(rows: &[T], batches: &[Vec<usize>]) -> Vec<T> {
    let mut arranged = rows.to_vec();
    batches.iter().flatten().zip(rows).for_each(|(&place, row)| arranged[place] = row.clone());
    arranged
}

/// Useful floating-point operations of a step on the batch, all weights trained. KTO's mismatched responses are scored behind the
/// prompts that are there.
fn useful_flops(config: &engine::ModelConfig, data: &Dataset) -> f64 {
    let items = data.sequences();
    let mut batch = Packing { for_scores: false, dropout: false }.pack(&items, &[]);
    let trained = roofline::forward_flops(config, &batch);
    if let Dataset::Examples(examples) = data {
        let all: Vec<usize> = (0..examples.len()).collect();
        let others = mismatched(examples, &all, longest(examples));
        others.iter().enumerate().for_each(|(prompt, other)| batch.push_response(prompt, other.responses[0]));
    }
    2.0 * trained + roofline::forward_flops(config, &batch)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let (mut model, mut tokens, mut loss) = (PathBuf::new(), PathBuf::new(), "dpo".to_owned());
    let (mut dtype, mut lora, mut batch_size, mut threads) = (Precision::F32, None, 8usize, 2usize);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{name} needs a value"));
        let number = |text: String| text.parse::<usize>().unwrap_or_else(|e| panic!("{name}: {e}"));
        match name.as_str() {
            "--model" => model = value().into(),
            "--tokens" => tokens = value().into(),
            "--loss" => loss = value(),
            "--dtype" => {
                let name = value();
                let known = Precision::ALL.into_iter().find(|dtype| dtype.name() == name);
                dtype = known.unwrap_or_else(|| panic!("unknown dtype {name}"));
            }
            "--lora" => lora = Some(number(value())),
            "--batch-size" => batch_size = number(value()),
            "--threads" => threads = number(value()),
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .unwrap_or_else(|e| panic!("could not start threads: {e}"));
    // work belongs on a thread of the pool
    rayon::scope(|_| run(&model, &tokens, &loss, dtype, lora, batch_size));
}

fn run(model: &Path, tokens: &Path, loss: &str, dtype: Precision, lora: Option<usize>, batch_size: usize) {
    let text = std::fs::read_to_string(tokens).unwrap_or_else(|e| panic!("{}: {e}", tokens.display()));
    let Tokens { pairs } = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", tokens.display()));
    let whole = pairs.len() >= 2 * batch_size && pairs.len().is_multiple_of(batch_size);
    assert!(whole, "{} pairs are not two or more whole batches", pairs.len());
    let start = load_model(model).unwrap_or_else(|e| panic!("{e}"));
    let kto = loss == "kto";
    let objective = objective::Options::default().build(loss, 0.1).unwrap_or_else(|e| panic!("{e}"));
    let of_lora = |rank: usize| LoraOptions {
        rank,
        alpha: 2.0 * rank as f64,
        dropout: 0.0,
        targets: Projection::ALL.to_vec(),
        rank_stabilized: false,
        dora: false,
    };
    let options = TrainOptions {
        lora: lora.map(of_lora),
        dtype,
        optimizer: OptimizerKind::AdamW,
        learning_rate: 1e-6,
        schedule: Schedule::Linear,
        warmup_ratio: 0.0,
        epochs: 1,
        batch_size: if kto { 2 * batch_size } else { batch_size },
        micro_batch_tokens: None,
        memory_bytes: None,
        max_grad_norm: 1.0,
        weight_decay: 0.0,
        seed: 0,
        save_every: 0,
        validate_every: 0,
        patience: None,
        ema_decay: None,
    };
    let in_order = dataset(&pairs, kto, batch_size);
    let batches = options.plan(in_order.len(), 1).batches;
    let data = match &in_order {
        Dataset::Pairs(pairs) => Dataset::Pairs(arranged(pairs, &batches)),
        Dataset::Examples(examples) => Dataset::Examples(arranged(examples, &batches)),
    };
    let none = if kto { Dataset::Examples(Vec::new()) } else { Dataset::Pairs(Vec::new()) };
    let folder = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));

    let as_pairs = dataset(&pairs, false, batch_size);
    let logps = reference::logps(
        Mixture::from(&start).with_precision(dtype),
        &as_pairs.sequences(),
        options.micro_batch_tokens,
        None,
        &mut |_| Ok(()),
    )
    .unwrap_or_else(|e| panic!("{e}"));

    let config = start.config.clone();
    let alignment = Alignment {
        start,
        data: &data,
        validation: &none,
        objective: &objective,
        options: &options,
        folder: folder.path(),
        cache: &folder.path().join("reference"),
    };
    let records = alignment.run(&mut Steps).unwrap_or_else(|e| panic!("{e}")).records;
    let peak_memory = memory::peak();
    let seconds: Vec<f64> = records.iter().map(|record| record.seconds).collect();
    let utilisation = lora.is_none().then(|| {
        let batches = pairs.chunks(batch_size).map(|batch| dataset(batch, kto, batch_size));
        let rates = batches.zip(&seconds).map(|(batch, seconds)| useful_flops(&config, &batch) / seconds);
        median(rates.skip(1).collect()) / roofline::peak(dtype)
    });
    println!(
        "{}",
        json!({
            "program": "sacpo", "loss": loss, "dtype": dtype, "lora": lora, "threads": rayon::current_num_threads(),
            "pairs_per_second": batch_size as f64 / median(seconds[1..].to_vec()),
            "seconds": seconds, "utilisation": utilisation,
            "tokens": records.iter().map(|record| record.tokens).collect::<Vec<_>>(),
            "losses": records.iter().map(|record| record.loss).collect::<Vec<_>>(),
            "peak_memory_bytes": peak_memory, "logps": logps.as_chunks::<2>().0,
        })
    );
}
