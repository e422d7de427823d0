//! The measurements as text.

use std::fmt::Write as _;

use indicatif::BinaryBytes;

use super::Output;
use super::generation::Speed;
use super::scaling::Point;

/// All of it.
pub(super) fn of(output: &Output) -> String {
    let Output { train, generate, scaling, .. } = output;
    let mut text = format!(
        "{}, {} weights, {} threads\n\nmatrix products in f32   {:7.1} GFLOP/s\n",
        output.model, output.parameters, output.threads, output.gemm_f32_gflops
    );
    if let Some(gflops) = output.gemm_bf16_gflops {
        let _ = writeln!(text, "matrix products in bf16  {gflops:7.1} GFLOP/s");
    }
    let _ = writeln!(text, "reading memory           {:7.1} GB/s", output.bandwidth_gbs);
    let _ = writeln!(
        text,
        "\nTraining in {}: {:.3} pairs/s, {:.1} tokens/s; {} pairs and {} tokens a step, {:.2} s.\n\
         Useful operations are {} of the rate of matrix products.{}\n",
        train.dtype.name(),
        train.pairs_per_second,
        train.tokens_per_second,
        train.pairs_per_step,
        train.tokens_per_step,
        train.seconds_per_step,
        percent(train.utilisation),
        train
            .peak_memory_bytes
            .map_or_else(String::new, |bytes| format!(" Memory: {} at most.", BinaryBytes(bytes as u64))),
    );
    let _ = writeln!(text, "{:26} {:>9} {:>7} {:>16} {:>12}", "stage", "seconds", "share", "rate", "of the best");
    for stage in &train.stages {
        let gflops = stage.gflops.map(|rate| format!("{rate:.1} GFLOP/s"));
        let rate = gflops.or(stage.gbs.map(|rate| format!("{rate:.1} GB/s"))).unwrap_or_default();
        let best = stage.roofline.map(percent).unwrap_or_default();
        let share = percent(stage.share);
        let _ = writeln!(text, "{:26} {:>9.3} {share:>7} {rate:>16} {best:>12}", stage.stage, stage.seconds);
    }
    let speed = |name: &str, Speed { tokens_per_second, decode_tokens_per_second, bandwidth_utilisation }: &Speed| {
        let share = percent(*bandwidth_utilisation);
        format!("{name:26} {tokens_per_second:9.1} {decode_tokens_per_second:15.1} {share:>26}\n")
    };
    let generation = format!("generation in {}", generate.dtype.name());
    let head = [&*generation, "tokens/s", "after the first", "weights read, of the best"];
    let _ = writeln!(text, "\n{:26} {:>9} {:>15} {:>26}", head[0], head[1], head[2], head[3]);
    text += &speed("one answer", &generate.batch_1);
    text += &speed("sixteen answers", &generate.batch_16);
    for (name, points) in [("size", &scaling.size), ("length", &scaling.length), ("threads", &scaling.threads)] {
        text += &table(name, points);
    }
    text.trim_end().to_owned()
}

/// A table of scaling, or nothing.
fn table(name: &str, points: &[Point]) -> String {
    if points.is_empty() {
        return String::new();
    }
    let mut text = format!(
        "\n{:26} {:>12} {:>8} {:>8} {:>10} {:>12}\n",
        format!("training by {name}"),
        "weights",
        "length",
        "threads",
        "tokens/s",
        "utilisation"
    );
    for point in points {
        let _ = writeln!(
            text,
            "{:26} {:>12} {:>8} {:>8} {:>10.1} {:>12}",
            "",
            point.parameters,
            point.length,
            point.threads,
            point.tokens_per_second,
            percent(point.utilisation)
        );
    }
    text
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}
