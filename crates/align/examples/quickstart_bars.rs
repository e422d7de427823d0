//! Whether policies that are really trained in the quickstart world are where the theory says.
//!
//!     cargo run --release -p sacpo-align --example quickstart_bars -- 30 31 32 33 34
//!
//! For every seed three tables, with exact expectations, and a summary over seeds in the end; `docs/quickstart.md` has the
//! results. A seed takes some ten minutes on two cores.
//!
//! 1. Ĝ(λ), estimated from answers of π_r, against E\[g*\] of policies trained at β/λ, on training prompts.
//! 2. Safety first with the β/λ, then reward with the β, against the original order, on held-out prompts. The interval of a
//!    difference is Student's over topics, since prompts of a topic share their answers and the noise of their labels.
//! 3. P-SACPO, merges of π_r with the safest policy trained from it, against naive merging, merges of π_r with a policy aligned
//!    on safety alone, from the base model, at the same temperature; both with q = 0, 0.25, 0.5, 0.75, 1, on held-out
//!    prompts. What is compared is the hypervolume of (E\[r*\], E\[g*\]) above the worst reward and the worst safety of all ten.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use align::choose::{Bootstrap, Certificate, Samples};
use align::data::{Dataset, Prompt, TokenizedPair, tokenize_prompt};
use align::merge;
use align::objective::{self, Objective};
use align::step::Alignment;
use align::task::{Demonstration, Demonstrations};
use align::trainer::{Monitor, Policy, StepRecord, TrainOptions, train};
use align::world::{self, DEFAULT_BETA, Metric, World};
use engine::checkpoint::{Checkpoint, GenerationConfig};
use engine::optim::{OptimizerKind, Schedule};
use engine::tokenizer::Tokenizer;
use engine::{Error, Model, Precision, Result};

/// Demonstrations and pairs. Noise of the labels is in no interval, so there must be many; those of the reward are the same on both
/// sides of every comparison, and may be fewer.
const DEMONSTRATIONS: usize = 80_000;
const REWARD_PAIRS: usize = 121_600;
const SAFETY_PAIRS: usize = 243_200;

/// β/λ of the first table, the safest last.
const TEMPERATURES: [f64; 4] = [2.0, 1.0, 0.75, 0.5];

/// Which of them are trained in swapped order too; the last of them, without its reward step, is the naive safe policy.
const SWAPPED: [usize; 2] = [1, 3];

/// q of the merges.
const SHARES: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];

/// Answers per training prompt. The estimate's bias is in none of its intervals, so it has to be small.
const ANSWERS: usize = 1024;

/// One-sided, so that an interval has 95 %.
const LEVEL: f64 = 0.975;

struct Silent;

impl Monitor for Silent {
    fn step(&mut self, _total: u64, _record: &StepRecord) {}

    fn stop_requested(&self) -> bool {
        false
    }
}

/// What one seed trains with.
struct Seed {
    seed: u64,
    world: World,
    tokenizer: Tokenizer,
    helpfulness: Dataset,
    safety: Dataset,
    folder: tempfile::TempDir,
    trainings: Cell<usize>,
}

impl Seed {
    fn new(seed: u64) -> Result<Self> {
        let world = World::new(seed);
        let tokenizer = Tokenizer::from_json(&world.tokenizer_json(), Some("<s>"), Some("</s>"), None)?;
        let response = |text: &str| {
            let tokens = tokenizer.encode(text)?;
            Ok::<_, Error>(tokens.into_iter().chain([world::EOS]).collect::<Vec<_>>())
        };
        let pair = |(row, pair): (usize, world::Pair)| {
            let prompt = tokenize_prompt(&Prompt::Text(pair.prompt), &tokenizer)?;
            let (chosen, rejected) = (response(&pair.chosen)?, response(&pair.rejected)?);
            Ok(TokenizedPair {
                prompt: prompt.into(),
                chosen: chosen.into(),
                rejected: rejected.into(),
                is_unsafe: None,
                margin: None,
                row: row + 1,
            })
        };
        let dataset = |metric, count| {
            let pairs = world.preference_pairs(metric, count, seed).into_iter().enumerate().map(pair);
            Ok::<_, Error>(Dataset::Pairs(pairs.collect::<Result<_>>()?))
        };
        let (helpfulness, safety) = (dataset(Metric::Reward, REWARD_PAIRS)?, dataset(Metric::Safety, SAFETY_PAIRS)?);
        let folder = tempfile::tempdir().map_err(Error::io("create", &std::env::temp_dir()))?;
        Ok(Self { seed, world, tokenizer, helpfulness, safety, folder, trainings: Cell::new(0) })
    }

    /// A folder that no other call returns.
    fn new_folder(&self) -> PathBuf {
        self.trainings.set(self.trainings.get() + 1);
        self.folder.path().join(self.trainings.get().to_string())
    }

    fn options(&self, learning_rate: f64, warmup_ratio: f64, epochs: usize) -> TrainOptions {
        TrainOptions {
            lora: None,
            optimizer: OptimizerKind::AdamW,
            learning_rate,
            schedule: Schedule::Cosine,
            warmup_ratio,
            epochs,
            batch_size: 64,
            dtype: Precision::F32,
            micro_batch_tokens: None,
            memory_bytes: None,
            max_grad_norm: 1.0,
            weight_decay: 0.0,
            seed: self.seed,
            save_every: 0,
            validate_every: 0,
            patience: None,
            ema_decay: None,
        }
    }

    /// The base model, made as the quickstart makes it.
    fn base(&self) -> Result<Model> {
        let demonstrations = self.world.sft_samples(DEMONSTRATIONS, self.seed).into_iter().map(|sample| {
            let mut response = self.tokenizer.encode(&sample.completion)?;
            response.push(world::EOS);
            Ok(Demonstration { prompt: tokenize_prompt(&Prompt::Text(sample.prompt), &self.tokenizer)?, response })
        });
        let demonstrations = demonstrations.collect::<Result<Vec<_>>>()?;
        let mut policy = Policy::Whole(Model::random(self.world.model_config(), 0.05, self.seed));
        let options = self.options(3e-3, 0.05, 2);
        train(&mut policy, &Demonstrations(&demonstrations), None, &options, &self.new_folder(), &mut Silent)?;
        Ok(policy.into_model().0)
    }

    /// The policy that a step makes of `start`.
    fn aligned(&self, start: &Model, metric: Metric, temperature: f64) -> Result<Model> {
        let (data, none) =
            (if metric == Metric::Reward { &self.helpfulness } else { &self.safety }, Dataset::Pairs(vec![]));
        let objective: Objective = objective::Options::default().build("dpo", temperature)?;
        let (options, folder, cache) =
            (self.options(1e-4, 0.1, 1), self.new_folder(), self.folder.path().join("cache"));
        let step = Alignment {
            start: start.clone(),
            data,
            validation: &none,
            objective: &objective,
            options: &options,
            folder: &folder,
            cache: &cache,
        };
        Ok(step.run(&mut Silent)?.policy)
    }

    fn saved(&self, model: Model) -> Result<PathBuf> {
        let folder = self.new_folder();
        let tokenizer = self.tokenizer.clone();
        Checkpoint { model, tokenizer, generation: GenerationConfig::default() }.save(&folder)?;
        Ok(folder)
    }

    /// E\[r*\] and E\[g*\] of the linear merges of two policies.
    fn frontier(&self, ends: [&Path; 2]) -> Result<Vec<[f64; 2]>> {
        let point = |&q: &f64| {
            let out = self.new_folder();
            let options = merge::Options {
                method: merge::Method::Linear,
                weights: vec![1.0 - q, q],
                normalise: true,
                density: 1.0,
                seed: 0,
                extrapolate: false,
            };
            merge::merge(&ends.map(Path::to_path_buf), None, &options, &out, &mut |_, _| Ok(()))?;
            let merged = Checkpoint::load(&out)?.model;
            Ok(self.worth(&self.world.heldout_prompts, &merged).map(|values| mean(&values)))
        };
        SHARES.iter().map(point).collect()
    }

    /// E\[r*\] and E\[g*\] of a policy on every prompt, texts outside the grammar included.
    fn worth(&self, prompts: &[world::Prompt], model: &Model) -> [Vec<f64>; 2] {
        let logps = self.world.answer_logps(prompts, model);
        let expectation = |metric: Metric, (prompt, logps): (&world::Prompt, &Vec<f64>)| {
            let gains = self.world.answers(prompt).iter().map(|answer| answer.value(metric) - metric.outside());
            metric.outside() + gains.zip(logps).map(|(gain, logp)| logp.exp() * gain).sum::<f64>()
        };
        let of_metric = |metric| prompts.iter().zip(&logps).map(|row| expectation(metric, row)).collect();
        [Metric::Reward, Metric::Safety].map(of_metric)
    }

    /// The mean of `ours` less `theirs`, both by held-out prompt, with Student's interval over the topics.
    fn by_topic(&self, ours: &[f64], theirs: &[f64]) -> Result<Certificate> {
        let mut topics: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for (prompt, (ours, theirs)) in self.world.heldout_prompts.iter().zip(ours.iter().zip(theirs)) {
            topics.entry(prompt.topic).or_default().push(ours - theirs);
        }
        Certificate::new(&topics.values().map(|values| mean(values)).collect::<Vec<_>>(), 0.0, LEVEL)
    }
}

/// For each policy, E\[g*\] less Ĝ, and whether it is inside the interval.
fn first_table(run: &Seed, helpful: &Model, safe: &[Model]) -> Result<Vec<(f64, bool)>> {
    let training = &run.world.train_prompts;
    let scores =
        run.world.sampled_values(&run.world.answer_logps(training, helpful), Metric::Safety, ANSWERS, run.seed)?;
    let (samples, bootstrap) = (Samples::new(vec![scores], DEFAULT_BETA)?, Bootstrap::new(0.95, run.seed)?);
    head(&["β/λ", "λ", "Ĝ(λ), 95 % interval", "bias", "N", "E[g*], trained", "inside"]);
    let mut results = Vec::new();
    for (temperature, policy) in TEMPERATURES.iter().zip(safe) {
        let estimate = samples.estimate(&[DEFAULT_BETA / temperature], &bootstrap)?;
        let [low, high] = estimate.safety[0].interval;
        let safety = mean(&run.worth(training, policy)[1]);
        let holds = (low..=high).contains(&safety);
        results.push((safety - estimate.safety[0].value, holds));
        println!(
            "| {temperature} | {:.2} | {:.3} ({low:.3} to {high:.3}) | {:.3} | {:.0} | {safety:.3} | {} |",
            estimate.lambda[0],
            estimate.safety[0].value,
            estimate.bias[0],
            estimate.effective_sample_size.average,
            if holds { "yes" } else { "no" }
        );
    }
    Ok(results)
}

/// By β/λ, swapped less original order in reward and safety; and the naive safe policy.
fn second_table(run: &Seed, base: &Model, safe: &[Model]) -> Result<(Vec<[f64; 2]>, Model)> {
    let held_out = &run.world.heldout_prompts;
    head(&["β/λ", "E[r*], original, swapped", "difference", "E[g*], original, swapped", "difference"]);
    let (mut differences, mut naive) = (Vec::new(), base.clone());
    for index in SWAPPED {
        naive = run.aligned(base, Metric::Safety, TEMPERATURES[index])?;
        let swapped = run.worth(held_out, &run.aligned(&naive, Metric::Reward, DEFAULT_BETA)?);
        let original = run.worth(held_out, &safe[index]);
        let reward = run.by_topic(&swapped[0], &original[0])?;
        let safety = run.by_topic(&swapped[1], &original[1])?;
        let ([r, g], [r_swapped, g_swapped]) = (original.map(|v| mean(&v)), swapped.map(|v| mean(&v)));
        println!(
            "| {} | {r:.3}, {r_swapped:.3} | {} | {g:.3}, {g_swapped:.3} | {} |",
            TEMPERATURES[index],
            interval(&reward),
            interval(&safety)
        );
        differences.push([reward.safety, safety.safety]);
    }
    Ok((differences, naive))
}

/// The hypervolumes of P-SACPO and of naive merging.
fn third_table(run: &Seed, helpful: Model, safe: Model, naive: Model) -> Result<[f64; 2]> {
    let [helpful, safe, naive] = [run.saved(helpful)?, run.saved(safe)?, run.saved(naive)?];
    let frontiers = [run.frontier([&helpful, &safe])?, run.frontier([&helpful, &naive])?];
    let worst = [0, 1].map(|i| frontiers.iter().flatten().map(|point| point[i]).fold(f64::INFINITY, f64::min));
    head(&["q", "P-SACPO: E[r*], E[g*]", "naive: E[r*], E[g*]"]);
    for (q, (ours, theirs)) in SHARES.iter().zip(frontiers[0].iter().zip(&frontiers[1])) {
        println!("| {q} | {:.3}, {:.3} | {:.3}, {:.3} |", ours[0], ours[1], theirs[0], theirs[1]);
    }
    let volumes = frontiers.map(|points| hypervolume(points, worst));
    println!("\nHypervolume: P-SACPO {:.4}, naive {:.4}.", volumes[0], volumes[1]);
    Ok(volumes)
}

/// The area of what is better than `worst` in both coordinates and not better than some point in both.
fn hypervolume(mut points: Vec<[f64; 2]>, worst: [f64; 2]) -> f64 {
    points.sort_by(|a, b| b[0].total_cmp(&a[0]));
    let (mut area, mut top) = (0.0, worst[1]);
    for [x, y] in points {
        area += (x - worst[0]) * (y - top).max(0.0);
        top = top.max(y);
    }
    area
}

fn head(columns: &[&str]) {
    println!("\n| {} |\n|{}", columns.join(" | "), " --- |".repeat(columns.len()));
}

fn interval(mean: &Certificate) -> String {
    format!("{:+.3} ({:+.3} to {:+.3})", mean.safety, mean.lower_bound, mean.upper_bound)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn main() -> Result<()> {
    let seeds = std::env::args().skip(1).map(|text| {
        text.parse().map_err(|_| Error::input(format!("\"{text}\" is not a seed. Give whole numbers from 0 on.")))
    });
    let seeds: Vec<u64> = seeds.collect::<Result<_>>()?;
    // work that starts within the pool does not wait for its threads to wake up
    rayon::scope(|_| tables(&seeds))
}

fn tables(seeds: &[u64]) -> Result<()> {
    let (mut estimated, mut swapped, mut gains) = (Vec::new(), Vec::new(), Vec::new());
    for &seed in seeds {
        println!("\n## Seed {seed}");
        let run = Seed::new(seed)?;
        let base = run.base()?;
        let helpful = run.aligned(&base, Metric::Reward, DEFAULT_BETA)?;
        let safe = TEMPERATURES.map(|temperature| run.aligned(&helpful, Metric::Safety, temperature));
        let mut safe = safe.into_iter().collect::<Result<Vec<_>>>()?;
        estimated.push(first_table(&run, &helpful, &safe)?);
        let (differences, naive) = second_table(&run, &base, &safe)?;
        swapped.push(differences);
        let [ours, theirs] = third_table(&run, helpful, safe.remove(TEMPERATURES.len() - 1), naive)?;
        gains.push(ours - theirs);
    }
    println!("\n## All seeds\n");
    let over_seeds = |values: Vec<f64>| Ok::<_, Error>(interval(&Certificate::new(&values, 0.0, LEVEL)?));
    for (i, temperature) in TEMPERATURES.into_iter().enumerate() {
        let difference = over_seeds(estimated.iter().map(|policies| policies[i].0).collect())?;
        let inside = estimated.iter().filter(|policies| policies[i].1).count();
        println!("- β/λ = {temperature}, trained less Ĝ: {difference}, {inside} of {} inside.", seeds.len());
    }
    for (i, index) in SWAPPED.into_iter().enumerate() {
        for (metric, name) in ["E[r*]", "E[g*]"].into_iter().enumerate() {
            let difference = over_seeds(swapped.iter().map(|policies| policies[i][metric]).collect())?;
            println!("- β/λ = {}, swapped less original order, {name}: {difference}.", TEMPERATURES[index]);
        }
    }
    println!("- Hypervolume, P-SACPO less naive: {}.", over_seeds(gains)?);
    Ok(())
}
