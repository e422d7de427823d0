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

mod common;

use std::time::Instant;

use common::{Peer, median};
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

/// Seconds of each step of a turn of PyTorch's side, a program that does `step N` on request.
fn steps(peer: &mut Peer) -> Vec<f64> {
    let answer = peer.ask(&format!("step {STEPS_A_TURN}"));
    serde_json::from_value(answer["seconds"].clone()).unwrap_or_else(|e| panic!("{e}: {answer}"))
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
        steps(peer);
    }
    let (mut seconds, mut of_peers) = (Vec::new(), vec![Vec::new(); peers.len()]);
    for round in 0..rounds {
        seconds.extend((0..STEPS_A_TURN).map(|_| ours.step().0));
        for (peer, seconds) in peers.iter_mut().zip(&mut of_peers) {
            seconds.extend(steps(peer));
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
    for (peer, of_peer) in peers.iter().zip(&of_peers) {
        report(&peer.command, of_peer);
        println!("        ratio of medians {:.2}", median(of_peer) / median(&seconds));
    }
}
