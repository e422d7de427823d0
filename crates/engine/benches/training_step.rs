//! A full training step (forward, backward, AdamW) of a 42M-parameter Llama-type model in f32,
//! batch 8 × 256, cross-entropy at every position, against PyTorch in turns.
//!
//! ```text
//! cargo bench -p sacpo-engine --bench training_step
//! cargo bench -p sacpo-engine --bench training_step -- --peer "python benches/peer_training_step.py"
//! ```
//!
//! With `--peer`, both programs take turns, two steps each, so that a drifting machine slows both alike;
//! give `--peer` several times to compare several variants. `--rounds N` and `--threads N` default to 6 and 2.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use engine::optim::{Optimizer, OptimizerKind, OptimizerOptions};
use engine::{Decoder, Keep, Model, ModelConfig, OutputHead, PackedBatch, RopeScaling};

const SEQUENCES: usize = 8;
const LENGTH: usize = 256;
const STEPS_A_TURN: usize = 2;

/// Our side: a model, its optimizer, and one batch.
struct Ours {
    model: Model,
    decoder: Decoder,
    optimizer: Optimizer,
    gradient: Vec<f32>,
    batch: PackedBatch,
}

impl Ours {
    fn new() -> Self {
        let config = ModelConfig {
            vocab_size: 32_000,
            hidden_size: 512,
            intermediate_size: 1408,
            num_hidden_layers: 8,
            num_attention_heads: 8,
            num_key_value_heads: 8,
            head_dim: 64,
            max_position_embeddings: LENGTH,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::Default,
            tie_word_embeddings: true,
            model_type: "llama".into(),
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            head: OutputHead::Vocabulary,
        };
        let vocab = config.vocab_size as u32;
        let model = Model::random(config, 0.02, 0);
        let mut batch = PackedBatch::default();
        let mut state = 12_345u32;
        for _ in 0..SEQUENCES {
            let ids: Vec<u32> = (0..=LENGTH)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) % vocab
                })
                .collect();
            batch.push(&ids[..1], &[&ids[1..]]);
        }
        let kind = OptimizerKind::AdamW;
        let options = OptimizerOptions { weight_decay: 0.01, ..kind.defaults() };
        Self {
            decoder: Decoder::new(&model, LENGTH),
            optimizer: Optimizer::new(kind, options, &model.layout.specs),
            gradient: vec![0.0; model.layout.len],
            model,
            batch,
        }
    }

    /// One step; returns its seconds and its loss.
    fn step(&mut self) -> (f64, f64) {
        let start = Instant::now();
        let d_logps = vec![-1.0 / self.batch.targets.len() as f64; self.batch.responses.len()];
        let logps =
            self.decoder.forward_backward(&self.model.weights, &self.batch, &d_logps, Keep::All, &mut self.gradient);
        self.optimizer.step(&mut self.model.weights, &mut self.gradient, 3e-4, 1.0);
        let loss = logps.iter().zip(&d_logps).map(|(l, d)| l * d).sum();
        (start.elapsed().as_secs_f64(), loss)
    }
}

/// PyTorch's side: a program that does `step N` on request and answers with a line of JSON.
struct Peer {
    command: String,
    child: Child,
    answers: BufReader<std::process::ChildStdout>,
    seconds: Vec<f64>,
}

impl Peer {
    fn start(command: &str) -> Self {
        let mut child = Command::new("sh")
            .args(["-c", &format!("exec {command}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("could not start `{command}`: {e}"));
        let answers = BufReader::new(child.stdout.take().unwrap_or_else(|| unreachable!("stdout is piped")));
        Self { command: command.to_owned(), child, answers, seconds: Vec::new() }
    }

    fn steps(&mut self, n: usize) -> Vec<f64> {
        let input = self.child.stdin.as_mut().unwrap_or_else(|| unreachable!("stdin is piped"));
        writeln!(input, "step {n}").unwrap_or_else(|e| panic!("`{}` has stopped: {e}", self.command));
        loop {
            let mut line = String::new();
            let read = self.answers.read_line(&mut line).unwrap_or(0);
            assert!(read > 0, "`{}` has stopped", self.command);
            // the peer also prints a line about itself when it is ready
            let answer: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
            if let Some(seconds) = answer["seconds"].as_array() {
                return seconds.iter().filter_map(serde_json::Value::as_f64).collect();
            }
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn main() {
    let (mut peers, mut rounds, mut threads) = (Vec::new(), 6usize, 2usize);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{name} needs a value"));
        match name.as_str() {
            "--peer" => peers.push(Peer::start(&value())),
            "--rounds" => rounds = value().parse().unwrap_or_else(|e| panic!("--rounds: {e}")),
            "--threads" => threads = value().parse().unwrap_or_else(|e| panic!("--threads: {e}")),
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .unwrap_or_else(|e| panic!("could not start threads: {e}"));
    let mut ours = Ours::new();
    println!("{} parameters, {} tokens a step", ours.model.layout.len, ours.batch.rows());
    // the first turn of each warms up and is not counted
    let (_, first) = ours.step();
    let (_, second) = ours.step();
    println!("loss {first:.5}, then {second:.5}");
    for peer in &mut peers {
        peer.steps(STEPS_A_TURN);
    }
    let mut seconds = Vec::new();
    for round in 0..rounds {
        seconds.extend((0..STEPS_A_TURN).map(|_| ours.step().0));
        for peer in &mut peers {
            let turn = peer.steps(STEPS_A_TURN);
            peer.seconds.extend(turn);
        }
        eprint!("\rround {}/{rounds}", round + 1);
    }
    eprintln!();
    let tokens = ours.batch.rows() as f64;
    let report = |name: &str, seconds: &[f64]| {
        let best = seconds.iter().copied().fold(f64::INFINITY, f64::min);
        println!("{:7.1} tokens/s median, {:7.1} best   {name}", tokens / median(seconds), tokens / best);
    };
    report("sacpo", &seconds);
    for peer in &mut peers {
        report(&peer.command, &peer.seconds);
        println!("        ratio of medians {:.2}", median(&peer.seconds) / median(&seconds));
        let _ = peer.child.kill();
    }
}
