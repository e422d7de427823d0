//! The command line of `sacpo bench`.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use engine::generate::Dtype;
use engine::{ModelConfig, OutputHead, Precision, RopeScaling};

use super::{dtype_parser, positive, seed};

/// Measure training and generation on this machine, against what its processor and memory can do.
///
/// Measures the rate of large matrix products and of reading memory, then steps of DPO on drawn pairs with the lengths of
/// PKU-SafeRLHF's, and greedy generation of one and of sixteen answers. Utilisation is the rate of useful floating-point
/// operations over that of large products.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    sacpo bench\n  \
    sacpo bench --dtype bf16 --generation-dtype int8 --json\n  \
    sacpo bench --scaling size,length,threads\n\n\
    Nothing needs to be downloaded: models of --shape have random weights. Figures mean little while other programs work. \
    docs/performance.md says how they are counted.")]
pub(crate) struct Bench {
    /// Shape of the model, whose weights are drawn.
    #[arg(long, value_enum, default_value_t = Shape::Smollm2_135m)]
    pub(crate) shape: Shape,
    /// Measure this model instead: folder in Hugging Face's layout, .gguf file, or hf://OWNER/NAME.
    #[arg(long, value_name = "MODEL", conflicts_with = "shape")]
    pub(crate) model: Option<PathBuf>,
    /// In what precision matrix products of training are computed.
    #[arg(long, default_value = "f32", value_parser = precision_parser())]
    pub(crate) dtype: Precision,
    /// What the matrices are read in while answers are generated [default: as in training].
    #[arg(long, value_parser = dtype_parser())]
    pub(crate) generation_dtype: Option<Dtype>,
    /// Pairs per optimizer step.
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = positive)]
    pub(crate) batch_size: usize,
    /// Optimizer steps that are timed, after one that is not.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = positive)]
    pub(crate) steps: usize,
    /// Also tables of the speed of training over these; `size` goes through all shapes and takes minutes.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "WHAT")]
    pub(crate) scaling: Vec<Scaling>,
    /// Seed of the drawn weights and tokens.
    #[arg(long, default_value_t = 0, value_parser = seed())]
    pub(crate) seed: u64,
}

/// What a table of speeds goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scaling {
    /// The shapes.
    Size,
    /// Tokens of a prompt with a response.
    Length,
    /// Numbers of threads, up to --threads.
    Threads,
}

/// Shapes of models of the Llama family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    /// 0.1 million weights, for a quick try of the command.
    Tiny,
    /// 15 million weights.
    #[value(name = "llama-15m")]
    Llama15m,
    /// SmolLM2-135M.
    #[value(name = "smollm2-135m")]
    Smollm2_135m,
    /// SmolLM2-360M.
    #[value(name = "smollm2-360m")]
    Smollm2_360m,
}

impl Bench {
    /// What the matrices are read in while answers are generated.
    pub(crate) fn generation_dtype(&self) -> Dtype {
        self.generation_dtype.unwrap_or(match self.dtype {
            Precision::F32 => Dtype::F32,
            Precision::Bf16 => Dtype::Bf16,
        })
    }
}

impl Shape {
    /// All of them, smallest first.
    pub(crate) const ALL: [Self; 4] = [Self::Tiny, Self::Llama15m, Self::Smollm2_135m, Self::Smollm2_360m];

    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::Llama15m => "llama-15m",
            Self::Smollm2_135m => "smollm2-135m",
            Self::Smollm2_360m => "smollm2-360m",
        }
    }

    /// The shape.
    pub(crate) fn config(self) -> ModelConfig {
        // vocabulary, width, feed-forward, blocks, query heads, key heads; all heads but those of `Tiny` are 48 or 64 wide
        let [vocab_size, hidden_size, intermediate_size, num_hidden_layers, query, key_value] = match self {
            Self::Tiny => [512, 64, 128, 2, 4, 2],
            Self::Llama15m => [32_000, 288, 768, 6, 6, 6],
            Self::Smollm2_135m => [49_152, 576, 1536, 30, 9, 3],
            Self::Smollm2_360m => [49_152, 960, 2560, 32, 15, 5],
        };
        ModelConfig {
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads: query,
            num_key_value_heads: key_value,
            head_dim: hidden_size / query,
            max_position_embeddings: 8192,
            rms_norm_eps: 1e-5,
            rope_theta: 100_000.0,
            rope_scaling: RopeScaling::Default,
            tie_word_embeddings: true,
            model_type: "llama".into(),
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            head: OutputHead::Vocabulary,
        }
    }
}

fn precision_parser() -> impl TypedValueParser<Value = Precision> {
    PossibleValuesParser::new(Precision::ALL.map(Precision::name))
        .map(|name| Precision::ALL.into_iter().find(|dtype| dtype.name() == name).unwrap_or_default())
}
