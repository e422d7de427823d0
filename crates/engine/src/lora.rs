//! Adapters: low-rank factors on top of a frozen model (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353).
//!
//! An adapted matrix is W + s·B·A with A `[rank, in]` and B `[out, rank]`. Names, initial values and the meaning of
//! every option are those of the Python package PEFT.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use rand::SeedableRng;
use rand::distr::{Distribution, Uniform};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::{Layout, Model, ParamSpec, Product, hash_weights};
use crate::ops::dora;
use crate::ops::dropout::{Dropout, mix};
use crate::ops::lora::{LowRank, Site, Target};
use crate::precision::Precision;

/// How the names of factors A end.
const A: &str = "lora_A.weight";

/// A matrix of a block that can be adapted, by its name in a Hugging Face checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Projection {
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
}

impl Projection {
    /// All of them, in the order of a block.
    pub const ALL: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// The name, such as `q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// The name with the part of the block that it belongs to, such as `self_attn.q_proj`.
    pub(crate) fn path(self) -> String {
        let part = if matches!(self.product(), Product::Qkv | Product::Output) { "self_attn" } else { "mlp" };
        format!("{part}.{}", self.name())
    }

    /// The product that the matrix is a part of.
    fn product(self) -> Product {
        match self {
            Self::QProj | Self::KProj | Self::VProj => Product::Qkv,
            Self::OProj => Product::Output,
            Self::GateProj | Self::UpProj => Product::GateUp,
            Self::DownProj => Product::Down,
        }
    }

    /// Number of the matrix's rows.
    fn outputs(self, config: &ModelConfig) -> usize {
        match self {
            Self::QProj => config.query_width(),
            Self::KProj | Self::VProj => config.key_value_width(),
            Self::OProj | Self::DownProj => config.hidden_size,
            Self::GateProj | Self::UpProj => config.intermediate_size,
        }
    }
}

impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Projection {
    type Err = Error;

    /// # Errors
    /// [`Error::Input`] that says which names there are, or why a part of the model cannot be adapted.
    fn from_str(name: &str) -> Result<Self> {
        if let Some(projection) = Self::ALL.into_iter().find(|p| p.name() == name) {
            return Ok(projection);
        }
        let names = Self::ALL.map(Self::name).join(", ");
        Err(Error::input(match name {
            "lm_head" | "embed_tokens" => format!(
                "{name} cannot be adapted: many models use one matrix as embedding and vocabulary head, and an adapter \
                 of one of the two could not be folded into it. Choose among {names}."
            ),
            _ => format!("{name} is not a matrix that can be adapted. Choose among {names}."),
        }))
    }
}

/// What an adapter is made of. The default has rank 16 and the scale 2 on every matrix of the blocks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraOptions {
    /// Columns of B and rows of A, ≥ 1.
    pub rank: usize,
    /// Numerator of the scale s, > 0.
    pub alpha: f64,
    /// The probability that an element of A's input is dropped in training, in [0, 1).
    pub dropout: f64,
    /// The adapted matrices, in every block.
    pub targets: Vec<Projection>,
    /// Whether s is alpha/√rank (rsLoRA, arXiv 2312.03732) instead of alpha/rank.
    pub rank_stabilized: bool,
    /// Whether the rows' lengths are learned by themselves (DoRA, arXiv 2402.09353).
    pub dora: bool,
}

impl Default for LoraOptions {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            dropout: 0.0,
            targets: Projection::ALL.to_vec(),
            rank_stabilized: false,
            dora: false,
        }
    }
}

impl LoraOptions {
    /// The factor s of B·A.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }

    /// Checks that the options make an adapter of a model of this shape.
    ///
    /// # Errors
    /// [`Error::Input`] that names the option.
    pub fn validate(&self, config: &ModelConfig) -> Result<()> {
        let most = config.hidden_size.max(config.intermediate_size);
        let wrong = |what: String| Err(Error::input(format!("An adapter cannot be made: {what}.")));
        if !(1..=most).contains(&self.rank) {
            return wrong(format!(
                "the rank is {}, but must be from 1 to {most}, the size of the model's matrices",
                self.rank
            ));
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return wrong(format!("alpha is {}, but must be a number greater than 0", self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return wrong(format!("the dropout is {}, but must be at least 0 and less than 1", self.dropout));
        }
        if self.targets.is_empty() {
            return wrong("no target is given, so there is nothing to adapt".into());
        }
        Ok(())
    }

    /// Checks that the engine can train an adapter with these options.
    ///
    /// # Errors
    /// [`Error::Input`] when they ask for DoRA with dropout.
    pub fn check_trainable(&self) -> Result<()> {
        if self.dora && self.dropout > 0.0 {
            return Err(Error::input(format!(
                "An adapter with DoRA and a dropout of {} cannot be trained: DoRA computes with whole matrices, so \
                 dropout would fall on the frozen part too. Set the dropout to 0, or leave DoRA out.",
                self.dropout
            )));
        }
        Ok(())
    }
}

/// Where every factor of an adapter lies in its flat vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterLayout {
    /// All factors, in order, under the names that PEFT gives them in a checkpoint.
    pub specs: Vec<ParamSpec>,
    /// Total number of weights.
    pub len: usize,
    /// For each block, its four products.
    sites: Vec<[Site; 4]>,
    /// The score head of a model that has one: it is trained whole, as PEFT does.
    pub(crate) score_head: Option<Range<usize>>,
}

impl AdapterLayout {
    /// The layout of an adapter of models of the given shape.
    pub fn new(config: &ModelConfig, options: &LoraOptions) -> Self {
        let mut specs: Vec<ParamSpec> = Vec::new();
        let mut sites = vec![<[Site; 4]>::default(); config.num_hidden_layers];
        for (block, sites) in sites.iter_mut().enumerate() {
            for product in Product::ALL {
                sites[product as usize] = site(config, options, block, product, &mut specs);
            }
        }
        let mut len = specs.last().map_or(0, |spec| spec.range.end);
        let score_head = config.head.is_score().then(|| {
            let range = len..len + config.hidden_size;
            let name = "base_model.model.score.weight".to_owned();
            specs.push(ParamSpec { name, shape: vec![1, config.hidden_size], range: range.clone() });
            len = range.end;
            range
        });
        Self { specs, len, sites, score_head }
    }

    /// Where the factors at a product of a block lie, if it is adapted.
    pub(crate) fn site(&self, block: usize, product: Product) -> Option<&Site> {
        Some(&self.sites[block][product as usize]).filter(|site| !site.targets.is_empty())
    }

    /// Bytes of the [`Scratch`](crate::ops::lora::Scratch) of passes over `rows` tokens, and of what as many blocks as `tapes`
    /// keep.
    pub(crate) fn pass_bytes(&self, options: &LoraOptions, rows: usize, tapes: usize) -> usize {
        // inputs, width of all factors A, and outputs of every adapted product
        let products = self.sites.iter().flatten().filter_map(|site| {
            let (width, outputs) = (site.targets.len() * options.rank, site.targets.last()?.columns.end);
            Some([site.a.len() / width, width, outputs, outputs * site.a.len() / width])
        });
        let [inputs, width, outputs, merged] =
            products.fold([0; 4], |most, sizes| std::array::from_fn(|i| sizes[i].max(most[i])));
        let dropped = if options.dropout > 0.0 { rows * inputs } else { 0 };
        let of_block = |block: &[Site; 4]| block.iter().map(|site| site.targets.len() * options.rank).sum::<usize>();
        let (dora, kept) = if options.dora {
            (merged + rows * (outputs + width), 0)
        } else {
            (0, tapes * self.sites.iter().map(of_block).max().unwrap_or(0))
        };
        size_of::<f32>() * (rows * (width + kept) + dropped + dora)
    }
}

/// Adds the factors at one product of a block to `specs`.
fn site(
    config: &ModelConfig,
    options: &LoraOptions,
    block: usize,
    product: Product,
    specs: &mut Vec<ParamSpec>,
) -> Site {
    let mut add = |projection: Projection, factor: &str, shape: &[usize]| {
        let name = format!("base_model.model.model.layers.{block}.{}.{factor}", projection.path());
        let start = specs.last().map_or(0, |spec| spec.range.end);
        let range = start..start + shape.iter().product::<usize>();
        specs.push(ParamSpec { name, shape: shape.to_vec(), range: range.clone() });
        range
    };
    let mut adapted = Vec::new();
    let mut column = 0;
    for projection in Projection::ALL.into_iter().filter(|p| p.product() == product) {
        let columns = column..column + projection.outputs(config);
        column = columns.end;
        if options.targets.contains(&projection) {
            adapted.push((projection, columns));
        }
    }
    let (rank, inputs) = (options.rank, product.inputs(config));
    // every A before every B, so that those of one input are one matrix
    let a: Vec<_> = adapted.iter().map(|(p, _)| add(*p, A, &[rank, inputs])).collect();
    let b: Vec<_> = adapted.iter().map(|(p, columns)| add(*p, "lora_B.weight", &[columns.len(), rank])).collect();
    let mut magnitude = |p, columns: &Range<usize>| match options.dora {
        true => add(p, "lora_magnitude_vector", &[columns.len()]),
        false => 0..0,
    };
    let target = |((p, columns), b)| Target { magnitude: magnitude(p, &columns), columns, b };
    let a = a.first().map_or(0, |first| first.start)..a.last().map_or(0, |last| last.end);
    let targets = adapted.into_iter().zip(b).map(target).collect();
    Site { a, targets }
}

/// Low-rank factors that adapt a frozen model.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// What it is made of.
    pub options: LoraOptions,
    /// Where each factor lies in `weights`.
    pub layout: AdapterLayout,
    /// All factors, f32.
    pub weights: Vec<f32>,
}

impl Adapter {
    /// A fresh adapter, which changes nothing yet: A uniform in ±1/√in as PEFT draws it, B zero, DoRA's m the norms of
    /// the model's rows.
    ///
    /// # Errors
    /// As [`LoraOptions::validate`] and [`LoraOptions::check_trainable`].
    pub fn new(model: &Model, options: LoraOptions, seed: u64) -> Result<Self> {
        options.validate(&model.config)?;
        options.check_trainable()?;
        let mut adapter = Self::zeros(&model.config, options);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for spec in adapter.layout.specs.iter().filter(|spec| spec.name.ends_with(A)) {
            let bound = 1.0 / (spec.shape[1] as f32).sqrt();
            let uniform = Uniform::new_inclusive(-bound, bound)
                .map_err(|error| Error::Failed(format!("The adapter's first values cannot be drawn: {error}.")))?;
            adapter.weights[spec.range.clone()].fill_with(|| uniform.sample(&mut rng));
        }
        if let Some(head) = adapter.layout.score_head.clone() {
            adapter.weights[head].copy_from_slice(&model.weights[model.layout.head.clone()]);
        }
        if adapter.options.dora {
            adapter.set_magnitudes(model);
        }
        Ok(adapter)
    }

    /// The score head that takes the place of the model's, if it has one.
    pub(crate) fn score_head(&self) -> Option<&[f32]> {
        self.layout.score_head.clone().map(|head| &self.weights[head])
    }

    /// Sets DoRA's m so that the rows keep the lengths that they have now.
    fn set_magnitudes(&mut self, model: &Model) {
        for (index, block) in model.layout.blocks.iter().enumerate() {
            for product in Product::ALL {
                let w = &model.weights[block.product(product).clone()];
                let Some(low_rank) = self.at(index, product, None) else { continue };
                let norms: Vec<_> = (0..low_rank.site.targets.len()).map(|t| dora::norms(&low_rank, t, w)).collect();
                for (target, norms) in self.layout.sites[index][product as usize].targets.iter().zip(norms) {
                    self.weights[target.magnitude.clone()].copy_from_slice(&norms);
                }
            }
        }
    }

    /// An adapter of zeros.
    pub(crate) fn zeros(config: &ModelConfig, mut options: LoraOptions) -> Self {
        options.targets.sort_unstable();
        options.targets.dedup();
        let layout = AdapterLayout::new(config, &options);
        let weights = vec![0.0; layout.len];
        Self { options, layout, weights }
    }

    /// Replaces the model's weights by those that the adapter makes of them.
    ///
    /// # Panics
    /// If the adapter was made for a model of another shape.
    pub fn fold_into(&self, model: &mut Model) {
        let Model { config, layout, weights } = model;
        assert_eq!(self.layout, AdapterLayout::new(config, &self.options), "the adapter does not fit the model");
        for (index, block) in layout.blocks.iter().enumerate() {
            for product in Product::ALL {
                if let Some(low_rank) = self.at(index, product, None) {
                    let range = block.product(product).clone();
                    low_rank.merge(&mut weights[range]);
                }
            }
        }
        if let Some(head) = self.score_head() {
            weights[layout.head.clone()].copy_from_slice(head);
        }
    }

    /// Replaces rows of a tensor of the model, `first` and those after it, by those that the adapter makes of them.
    pub(crate) fn fold_rows_into(&self, layout: &Layout, spec: &ParamSpec, first: usize, rows: &mut [f32]) {
        for (index, block) in layout.blocks.iter().enumerate() {
            for product in Product::ALL {
                let range = block.product(product);
                let Some(low_rank) = self.at(index, product, None).filter(|_| range.contains(&spec.range.start)) else {
                    continue;
                };
                let row = (spec.range.start - range.start) / spec.shape[1];
                let target = low_rank.site.targets.iter().position(|target| target.columns.start == row);
                if let Some(target) = target {
                    low_rank.merge_rows(target, first, rows);
                }
            }
        }
    }

    /// One adapter that does what all of them do together: the ranks add up, and B takes the scales.
    ///
    /// # Errors
    /// [`Error::Input`] when there is none, or when one has DoRA, which is not a sum.
    ///
    /// # Panics
    /// If one was made for a model of another shape than `config`.
    pub fn stack(config: &ModelConfig, adapters: &[&Self]) -> Result<Self> {
        Self::weighted_sum(config, adapters, &vec![1.0; adapters.len()])
    }

    /// As [`stack`](Self::stack), of the adapters' updates times `coefficients`, one for each: Σ cᵢ·sᵢ·Bᵢ·Aᵢ. What PEFT's
    /// `add_weighted_adapter` calls `cat`.
    ///
    /// # Errors
    /// As [`stack`](Self::stack).
    ///
    /// # Panics
    /// As [`stack`](Self::stack).
    pub fn weighted_sum(config: &ModelConfig, adapters: &[&Self], coefficients: &[f64]) -> Result<Self> {
        if adapters.iter().any(|adapter| adapter.options.dora) {
            return Err(Error::input(
                "An adapter with DoRA cannot be stacked: it scales what lies below it. Fold it into its model instead.",
            ));
        }
        let rank: usize = adapters.iter().map(|adapter| adapter.options.rank).sum();
        let targets = adapters.iter().flat_map(|adapter| adapter.options.targets.clone()).collect();
        let options = LoraOptions { rank, alpha: rank as f64, targets, ..LoraOptions::default() };
        options.validate(config)?;
        for Self { options, layout, .. } in adapters {
            assert_eq!(*layout, AdapterLayout::new(config, options), "an adapter does not fit the model");
        }
        let mut stacked = Self::zeros(config, options);
        for to in &stacked.layout.specs {
            let mut first = 0;
            for (Self { options, layout, weights }, coefficient) in adapters.iter().zip(coefficients) {
                // where an adapter has no such factor, its part stays zero
                if let Some(from) = layout.specs.iter().find(|from| from.name == to.name) {
                    let (width, of_a) = (to.shape[1], to.name.ends_with(A));
                    let (to, from) = (&mut stacked.weights[to.range.clone()], &weights[from.range.clone()]);
                    if of_a {
                        to[first * width..][..from.len()].copy_from_slice(from);
                    } else {
                        for (to, from) in to.chunks_exact_mut(rank).zip(from.chunks_exact(options.rank)) {
                            let scale = coefficient * options.scale();
                            let scaled = from.iter().map(|b| (scale * f64::from(*b)) as f32);
                            to[first..].iter_mut().zip(scaled).for_each(|(to, b)| *to = b);
                        }
                    }
                }
                first += options.rank;
            }
        }
        Ok(stacked)
    }

    /// What adapts a product of a block, if anything does. `dropout` is the seed of the pass and the rows' keys.
    pub(crate) fn at<'a>(
        &'a self,
        block: usize,
        product: Product,
        dropout: Option<(u64, &'a [u64])>,
    ) -> Option<LowRank<'a>> {
        let site = self.layout.site(block, product)?;
        let dropout = dropout.filter(|_| self.options.dropout > 0.0).map(|(seed, row_keys)| Dropout {
            rate: self.options.dropout,
            seed: dropout_seed(seed, block, product),
            row_keys,
        });
        Some(LowRank {
            site,
            weights: &self.weights,
            rank: self.options.rank,
            scale: self.options.scale() as f32,
            dropout,
            precision: Precision::F32,
            rowwise: false,
        })
    }

    /// A hash of options and weights that names this adapter: 64 hexadecimal digits.
    pub fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{:?} {:?}", self.options, self.layout.specs).as_bytes());
        hash_weights(&mut hasher, &self.weights);
        hasher.finalize().to_hex().to_string()
    }
}

/// The seed of the dropout at a product of a block, of that of the pass.
pub(crate) fn dropout_seed(seed: u64, block: usize, product: Product) -> u64 {
    mix(seed ^ mix((Product::ALL.len() * block + product as usize) as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::tiny_config;

    #[test]
    fn every_product_of_every_pass_drops_others() {
        let model = Model::random(tiny_config(), 0.1, 1);
        let adapter = Adapter::new(&model, LoraOptions { dropout: 0.5, ..LoraOptions::default() }, 0).unwrap();
        let mut seeds = std::collections::BTreeSet::new();
        for (block, seed) in [(0, 1), (1, 1), (0, 2), (1, 2)] {
            for product in Product::ALL {
                let low_rank = adapter.at(block, product, Some((seed, &[]))).unwrap();
                assert!(seeds.insert(low_rank.dropout.unwrap().seed), "{product:?} of block {block}");
            }
        }
    }
}
