//! Optimizers over a flat vector of weights, chosen by name; the norm of a gradient; learning-rate schedules; a moving
//! average of weights.
//!
//! [`Optimizer`] gives every tensor a rule; each rule is a file that holds the state of one tensor and the formula of one
//! step. An optimizer of some kind may treat tensors differently (Muon is for matrices), so rules are chosen per tensor.

pub(crate) mod adamw;
pub(crate) mod adamw8bit;
mod ema;
mod lion;
mod muon;
mod schedule;

pub use ema::Ema;
pub use schedule::Schedule;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::model::ParamSpec;
use crate::ops::simd::dispatch;
use crate::profile::{self, Stage, Work};

/// Weights per task; also the grouping of the sum in [`global_norm`].
const CHUNK: usize = 1 << 16;

/// The optimizers, under the names that recipes use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay (algorithm 2 of arXiv 1711.05101).
    #[serde(rename = "adamw")]
    AdamW,
    /// AdamW whose moments are kept in 8 bits (arXiv 2110.02861); tensors of fewer than 4096 weights keep f32 moments.
    #[serde(rename = "adamw-8bit")]
    AdamW8bit,
    /// The sign of an interpolated momentum (algorithm 2 of arXiv 2302.06675).
    #[serde(rename = "lion")]
    Lion,
    /// Orthogonalised momentum for matrices, scaled as in equation 4 of arXiv 2502.16982; AdamW for the token embedding,
    /// the head, and everything that is no matrix.
    #[serde(rename = "muon")]
    Muon,
}

impl OptimizerKind {
    /// All optimizers.
    pub const ALL: [Self; 4] = [Self::AdamW, Self::AdamW8bit, Self::Lion, Self::Muon];

    /// The name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::AdamW => "adamw",
            Self::AdamW8bit => "adamw-8bit",
            Self::Lion => "lion",
            Self::Muon => "muon",
        }
    }

    /// Bytes that an optimizer of this kind takes for the tensors `specs`: what it keeps, and what its steps work in.
    pub fn bytes(self, specs: &[ParamSpec]) -> usize {
        let work =
            specs.iter().filter(|spec| self == Self::Muon && muon::applies_to(spec)).map(muon::scratch_bytes).max();
        specs.iter().map(|spec| Rule::bytes(self, spec)).sum::<usize>() + work.unwrap_or(0)
    }

    /// The constants that its paper recommends, without weight decay.
    pub fn defaults(self) -> OptimizerOptions {
        let beta2 = if self == Self::Lion { 0.99 } else { 0.999 };
        OptimizerOptions { beta1: 0.9, beta2, eps: 1e-8, momentum: 0.95, weight_decay: 0.0 }
    }
}

/// The constants of an optimizer. Start from [`OptimizerKind::defaults`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct OptimizerOptions {
    /// AdamW: decay of the first moment. Lion: weight of the momentum in the update. In [0, 1).
    pub beta1: f64,
    /// AdamW: decay of the second moment. Lion: decay of the momentum. In [0, 1).
    pub beta2: f64,
    /// AdamW: added to the root of the second moment, > 0.
    pub eps: f64,
    /// Muon: decay of the momentum of matrices, in [0, 1).
    pub momentum: f64,
    /// Decoupled decay per unit of learning rate, ≥ 0; applies to matrices, not to the gains of norms.
    pub weight_decay: f64,
}

/// An optimizer: what it keeps for every tensor, and the number of steps taken.
#[derive(Debug, Clone)]
pub struct Optimizer {
    options: OptimizerOptions,
    tensors: Vec<(ParamSpec, Rule)>,
    scratch: muon::Scratch,
    /// Steps taken.
    pub steps: u64,
}

/// How one tensor is updated, and what is kept for that.
#[derive(Debug, Clone)]
enum Rule {
    AdamW(adamw::Moments),
    AdamW8bit(adamw8bit::Moments),
    Lion(lion::Momentum),
    Muon(muon::Momentum),
}

impl Rule {
    fn new(kind: OptimizerKind, spec: &ParamSpec) -> Self {
        let len = spec.range.len();
        match kind {
            OptimizerKind::AdamW8bit if adamw8bit::applies_to(spec) => Self::AdamW8bit(adamw8bit::Moments::new(len)),
            OptimizerKind::Lion => Self::Lion(lion::Momentum::new(len)),
            OptimizerKind::Muon if muon::applies_to(spec) => Self::Muon(muon::Momentum::new(len)),
            _ => Self::AdamW(adamw::Moments::new(len)),
        }
    }

    /// Bytes of what [`new`](Self::new) makes.
    fn bytes(kind: OptimizerKind, spec: &ParamSpec) -> usize {
        let len = spec.range.len();
        match kind {
            OptimizerKind::AdamW8bit if adamw8bit::applies_to(spec) => 2 * adamw8bit::Quantised::bytes(len),
            OptimizerKind::Lion => size_of::<f32>() * len,
            OptimizerKind::Muon if muon::applies_to(spec) => size_of::<f32>() * len,
            _ => 2 * size_of::<f32>() * len,
        }
    }

    fn state(&mut self) -> Vec<(&'static str, StateValues<'_>)> {
        use StateValues::{F32, U8};
        match self {
            Self::AdamW(m) => vec![("first", F32(&mut m.first)), ("second", F32(&mut m.second))],
            Self::AdamW8bit(m) => vec![
                ("first.codes", U8(&mut m.first.codes)),
                ("first.absmax", F32(&mut m.first.absmax)),
                ("second.codes", U8(&mut m.second.codes)),
                ("second.absmax", F32(&mut m.second.absmax)),
            ],
            Self::Lion(m) => vec![("momentum", F32(&mut m.0))],
            Self::Muon(m) => vec![("momentum", F32(&mut m.0))],
        }
    }
}

/// What one step is, as every rule sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(crate) options: OptimizerOptions,
    /// This step's number, from 1.
    pub(crate) number: u64,
    pub(crate) learning_rate: f64,
    /// The factor on the gradient.
    pub(crate) scale: f64,
    /// The factor on the weights that weight decay leaves.
    pub(crate) keep: f64,
}

/// One tensor of an optimizer's state.
#[derive(Debug)]
pub struct StateTensor<'a> {
    /// The name of the weights that it belongs to, a dot, and what it is: `first`, `second`, `momentum`, and for 8-bit
    /// moments `first.codes`, `first.absmax`, `second.codes`, `second.absmax`.
    pub name: String,
    /// The shape of the weights, or `[blocks]` for `absmax`.
    pub shape: Vec<usize>,
    /// The values.
    pub values: StateValues<'a>,
}

impl StateValues<'_> {
    /// The memory that they take.
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(values) => size_of_val(*values),
            Self::U8(values) => size_of_val(*values),
        }
    }
}

/// The values of a [`StateTensor`], row-major.
#[derive(Debug, PartialEq)]
pub enum StateValues<'a> {
    /// Numbers.
    F32(&'a mut [f32]),
    /// Codes of quantised numbers.
    U8(&'a mut [u8]),
}

impl Optimizer {
    /// An optimizer of the tensors `specs` that has taken no step.
    pub fn new(kind: OptimizerKind, options: OptimizerOptions, specs: &[ParamSpec]) -> Self {
        let tensors = specs.iter().map(|spec| (spec.clone(), Rule::new(kind, spec))).collect();
        Self { options, tensors, scratch: muon::Scratch::default(), steps: 0 }
    }

    /// Takes one step and sets the gradient to zero. The gradient counts times `scale` (for clipping).
    ///
    /// # Panics
    /// If `weights` or `gradient` end before the range of a tensor does.
    pub fn step(&mut self, weights: &mut [f32], gradient: &mut [f32], learning_rate: f64, scale: f64) {
        let tensors = &mut self.tensors;
        let _span = profile::span(Stage::Optimizer, || {
            let state: usize =
                tensors.iter_mut().flat_map(|(_, rule)| rule.state()).map(|(_, values)| values.bytes()).sum();
            Work::Bytes(2.0 * (size_of_val(weights) + size_of_val(gradient) + state) as f64)
        });
        self.steps += 1;
        for (spec, rule) in &mut self.tensors {
            let keep = if spec.decays() { 1.0 - learning_rate * self.options.weight_decay } else { 1.0 };
            let step = Step { options: self.options, number: self.steps, learning_rate, scale, keep };
            let (weights, gradient) = (&mut weights[spec.range.clone()], &mut gradient[spec.range.clone()]);
            match rule {
                Rule::AdamW(moments) => moments.step(weights, gradient, step),
                Rule::AdamW8bit(moments) => moments.step(weights, gradient, step),
                Rule::Lion(momentum) => momentum.step(weights, gradient, step),
                Rule::Muon(momentum) => momentum.step(&spec.shape, weights, gradient, step, &mut self.scratch),
            }
        }
    }

    /// All that is kept besides [`steps`](Self::steps): read it to save, overwrite it to restore.
    pub fn state(&mut self) -> Vec<StateTensor<'_>> {
        let mut all = Vec::new();
        for (spec, rule) in &mut self.tensors {
            for (what, values) in rule.state() {
                let shape = match &values {
                    StateValues::F32(blocks) if what.ends_with("absmax") => vec![blocks.len()],
                    _ => spec.shape.clone(),
                };
                all.push(StateTensor { name: format!("{}.{what}", spec.name), shape, values });
            }
        }
        all
    }
}

/// The Euclidean norm of all gradients together, summed in f64.
pub fn global_norm(gradient: &[f32]) -> f64 {
    let _span = profile::span(Stage::Optimizer, || Work::Bytes(size_of_val(gradient) as f64));
    let partial: Vec<f64> = gradient
        .par_chunks(CHUNK)
        .map(|chunk| {
            dispatch(
                #[inline(always)]
                || {
                    let mut lanes = [0f64; 8];
                    let (body, tail) = chunk.as_chunks::<8>();
                    for x in body {
                        for j in 0..8 {
                            lanes[j] = f64::from(x[j]).mul_add(f64::from(x[j]), lanes[j]);
                        }
                    }
                    lanes.iter().sum::<f64>() + tail.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>()
                },
            )
        })
        .collect();
    partial.iter().sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Layout;
    use crate::model::tests::tiny_config;
    use crate::ops::finite_difference::random;

    /// Tensors of the given shapes, one after the other.
    pub(super) fn specs(shapes: &[&[usize]]) -> Vec<ParamSpec> {
        let mut end = 0;
        let spec = |(i, shape): (usize, &&[usize])| {
            let start = end;
            end += shape.iter().product::<usize>();
            ParamSpec { name: format!("tensor{i}"), shape: shape.to_vec(), range: start..end }
        };
        shapes.iter().enumerate().map(spec).collect()
    }

    /// The weights after `steps` steps of learning rate 0.01, on the gradient that `gradient` gives of the weights.
    pub(super) fn trained(
        optimizer: &mut Optimizer,
        mut weights: Vec<f32>,
        steps: u64,
        gradient: impl Fn(u64, &[f32]) -> Vec<f32>,
    ) -> Vec<f32> {
        for step in 0..steps {
            let mut gradient = gradient(step, &weights);
            optimizer.step(&mut weights, &mut gradient, 0.01, 0.7);
            assert!(gradient.iter().all(|&g| g == 0.0), "the gradient is not set to zero");
        }
        weights
    }

    #[test]
    fn names_are_those_of_recipes() {
        for kind in OptimizerKind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
            assert_eq!(serde_json::from_value::<OptimizerKind>(kind.name().into()).unwrap(), kind);
        }
    }

    #[test]
    fn steps_follow_the_formula_and_spare_norms_from_decay() {
        let layout = Layout::new(&tiny_config());
        let options = OptimizerOptions { weight_decay: 0.1, ..OptimizerKind::AdamW.defaults() };
        let mut optimizer = Optimizer::new(OptimizerKind::AdamW, options, &layout.specs);
        let (mut weights, mut m, mut v) = (vec![0.5f32; layout.len], 0.0, 0.0);
        let (matrix, norm) = (layout.embedding.start, layout.final_norm.start);
        let mut expected = [0.5f64; 2];
        for step in 1..=5 {
            let g = 0.3 * f64::from(step);
            let mut gradient = vec![g as f32; layout.len];
            optimizer.step(&mut weights, &mut gradient, 0.01, 0.5);
            assert!(gradient.iter().all(|&g| g == 0.0));
            m = 0.9 * m + 0.1 * g * 0.5;
            v = 0.999 * v + 0.001 * (g * 0.5) * (g * 0.5);
            let update = 0.01 * (m / (1.0 - 0.9f64.powi(step))) / ((v / (1.0 - 0.999f64.powi(step))).sqrt() + 1e-8);
            expected = [expected[0] * (1.0 - 0.01 * 0.1) - update, expected[1] - update];
        }
        assert!((f64::from(weights[matrix]) - expected[0]).abs() < 1e-6);
        assert!((f64::from(weights[norm]) - expected[1]).abs() < 1e-6);
    }

    #[test]
    fn decay_alone_shrinks_matrices_and_leaves_vectors() {
        for kind in OptimizerKind::ALL {
            let specs = specs(&[&[70, 80], &[9]]);
            let options = OptimizerOptions { weight_decay: 0.5, ..kind.defaults() };
            let mut optimizer = Optimizer::new(kind, options, &specs);
            let weights = trained(&mut optimizer, vec![2.0; 5609], 2, |_, w| vec![0.0; w.len()]);
            assert!(weights[..5600].iter().all(|w| (w - 2.0 * 0.995 * 0.995).abs() < 1e-6), "{kind:?}");
            assert!(weights[5600..].iter().all(|&w| w == 2.0), "{kind:?}");
        }
    }

    #[test]
    fn weights_do_not_depend_on_the_number_of_threads() {
        let specs = specs(&[&[300, 301], &[33, 2000], &[5]]);
        let start = random(specs[2].range.end, 1);
        for kind in OptimizerKind::ALL {
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut optimizer = Optimizer::new(kind, kind.defaults(), &specs);
                pool.install(|| trained(&mut optimizer, start.clone(), 3, |step, w| random(w.len(), 2 + step)))
            };
            assert_eq!(run(1), run(2), "{kind:?}");
        }
    }

    #[test]
    fn the_state_is_all_that_is_kept() {
        let specs = specs(&[&[64, 65], &[33, 20], &[5]]);
        let gradient = |step, w: &[f32]| random(w.len(), 2 + step);
        for kind in OptimizerKind::ALL {
            let mut optimizer = Optimizer::new(kind, kind.defaults(), &specs);
            let middle = trained(&mut optimizer, random(specs[2].range.end, 1), 3, gradient);
            let mut restored = Optimizer::new(kind, kind.defaults(), &specs);
            restored.steps = optimizer.steps;
            for (to, from) in restored.state().into_iter().zip(optimizer.state()) {
                assert_eq!((to.name, to.shape), (from.name, from.shape));
                match (to.values, from.values) {
                    (StateValues::F32(to), StateValues::F32(from)) => to.copy_from_slice(from),
                    (StateValues::U8(to), StateValues::U8(from)) => to.copy_from_slice(from),
                    _ => panic!("different types"),
                }
            }
            let end = |optimizer| trained(optimizer, middle.clone(), 3, |step, w| gradient(9 + step, w));
            assert_eq!(end(&mut restored), end(&mut optimizer), "{kind:?}");
        }
    }

    #[test]
    fn the_state_has_the_documented_size() {
        // 1,048,576 weights in matrices, 64 in a vector
        let specs = specs(&[&[1024, 512], &[512, 1024], &[64]]);
        let bytes = |kind: OptimizerKind| -> usize {
            let size = |tensor: &StateTensor| match &tensor.values {
                StateValues::F32(values) => size_of_val(*values),
                StateValues::U8(codes) => codes.len(),
            };
            Optimizer::new(kind, kind.defaults(), &specs).state().iter().map(size).sum()
        };
        assert_eq!(bytes(OptimizerKind::AdamW), (8 << 20) + 8 * 64);
        // a byte and 1/256 of an f32 for each moment
        assert_eq!(bytes(OptimizerKind::AdamW8bit), (2 << 20) + (8 << 20) / 256 + 8 * 64);
        assert_eq!(bytes(OptimizerKind::Lion), (4 << 20) + 4 * 64);
        assert_eq!(bytes(OptimizerKind::Muon), (4 << 20) + 8 * 64);
        for kind in OptimizerKind::ALL {
            // update and next update of the largest matrix, and two squares of its smaller side
            let work = if kind == OptimizerKind::Muon { 2 * 4 * (1024 * 512 + 512 * 512) } else { 0 };
            assert_eq!(kind.bytes(&specs), bytes(kind) + work, "{kind:?}");
        }
    }

    #[test]
    fn the_norm_is_that_of_all_parts_together() {
        let gradient: Vec<f32> = (0..200_003).map(|i| (i % 7) as f32).collect();
        let expected: f64 = gradient.iter().map(|&g| f64::from(g * g)).sum::<f64>().sqrt();
        assert!((global_norm(&gradient) / expected - 1.0).abs() < 1e-12);
    }
}
