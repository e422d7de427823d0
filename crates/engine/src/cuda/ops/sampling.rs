//! The next token of each sequence in generation, chosen where the logits are.

use crate::cuda::Module;
use crate::cuda::device::{Buffer, Device, Launch, ViewMut};
use crate::error::Result;
use crate::generate::SamplingOptions;

pub(crate) static MODULE: Module =
    Module { name: "sampling", text: include_str!("../kernels/sampling.cu"), kernels: &["sampling_choose"] };

/// What the kernel writes in place of a token where a logit is not a number.
const NONE: u32 = u32::MAX;

/// The next token of each row of logits, or nothing where one of them is not a number; the logits are used up. logits
/// `[sequences, vocab]`; for each sequence its options, and a random number in [0, 1).
///
/// Tokens are eligible as [`generate`](crate::generate) says. The random number is a place in the sum of the eligible tokens'
/// probabilities, the likeliest first; so are the CPU's where `top_p` or `min_p` is given, and the tokens are then the same.
///
/// # Errors
/// Those of the device. It waits for the tokens.
pub(crate) fn choose<D: Device>(
    device: &D,
    logits: ViewMut<'_, f32>,
    vocab: usize,
    sequences: &[(&SamplingOptions, f64)],
) -> Result<Vec<Option<u32>>> {
    assert_eq!(logits.len(), sequences.len() * vocab);
    let choices = sequences.iter().flat_map(|(options, uniform)| {
        let SamplingOptions { temperature, top_p, min_p, .. } = options;
        [temperature, top_p, min_p, uniform].map(|&number| number as f32)
    });
    let choices = Buffer::<D, f32>::of(device, &choices.collect::<Vec<_>>())?;
    let top_k: Vec<u32> = sequences.iter().map(|(options, _)| options.top_k.min(vocab) as u32).collect();
    let top_k = Buffer::<D, u32>::of(device, &top_k)?;
    let mut tokens = Buffer::<D, u32>::zeros(device, sequences.len())?;
    let arguments =
        [logits.into(), choices.view().into(), top_k.view().into(), tokens.view_mut().into(), (vocab as i32).into()];
    // SAFETY: each sequence has a row of logits, four numbers of choices, and one of the others.
    unsafe { device.launch(&MODULE, "sampling_choose", Launch::blocks(sequences.len()), &arguments)? };
    Ok(tokens.to_vec(device)?.into_iter().map(|token| (token != NONE).then_some(token)).collect())
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;
    use crate::cuda::ops::tests::on;
    use crate::cuda::tested::devices;
    use crate::generate::choose as on_cpu;
    use crate::ops::finite_difference::random;

    fn options(temperature: f64, top_k: usize, top_p: f64, min_p: f64) -> SamplingOptions {
        SamplingOptions { temperature, top_k, top_p, min_p, ..SamplingOptions::default() }
    }

    #[test]
    fn tokens_are_those_of_the_cpu() {
        for device in devices() {
            let mut rng = StdRng::seed_from_u64(1);
            let cases = [
                options(0.0, 0, 1.0, 0.0),
                options(0.0, 3, 0.5, 0.1),
                options(1.0, 0, 0.9, 0.0),
                options(0.7, 0, 0.3, 0.0),
                options(1.3, 40, 0.95, 0.0),
                options(1.0, 0, 1.0, 0.05),
                options(2.0, 7, 1.0, 1e-9),
                options(1.0, 25, 0.8, 0.2),
                options(1.0, 1, 0.999, 0.0),
                options(1.0, 0, 0.9, 1.0),
                options(0.01, 0, 0.9, 0.0),
            ];
            // without equal logits, with many, and with tokens that are ruled out
            let plain = |x: f32, _| 6.0 * x;
            let equal = |x: f32, _| (6.0 * x).round();
            let masked = |x: f32, i: usize| if i.is_multiple_of(3) { f32::NEG_INFINITY } else { 6.0 * x };
            for (vocab, shape) in [(1, plain as fn(f32, usize) -> f32), (301, plain), (301, equal), (700, masked)] {
                let logits: Vec<f32> = random(cases.len() * vocab, 2)
                    .into_iter()
                    .enumerate()
                    .map(|(i, x)| shape(x, i % vocab + 1))
                    .collect();
                let seeds: Vec<u64> = cases.iter().map(|_| rng.random()).collect();
                let expected: Vec<Option<u32>> = (cases.iter().zip(&seeds).zip(logits.chunks(vocab)))
                    .map(|((options, &seed), logits)| on_cpu(logits, options, &mut StdRng::seed_from_u64(seed)))
                    .collect();
                let sequences: Vec<_> =
                    cases.iter().zip(&seeds).map(|(o, &seed)| (o, StdRng::seed_from_u64(seed).random())).collect();
                let tokens = choose(&device, on(&device, &logits).view_mut(), vocab, &sequences).unwrap();
                assert_eq!(tokens, expected, "vocabulary of {vocab}");
            }
        }
    }

    #[test]
    fn draws_have_the_softmax_of_the_likeliest_tokens() {
        for device in devices() {
            let (vocab, draws) = (9, 64);
            let logits = random(vocab, 3);
            for (temperature, top_k) in [(1.0, 0), (0.5, 0), (1.0, 4)] {
                let options = options(temperature, top_k, 1.0, 0.0);
                let places: Vec<_> = (0..draws).map(|i| (&options, (f64::from(i) + 0.5) / f64::from(draws))).collect();
                let mut rows = on(&device, &logits.repeat(draws as usize));
                let tokens = choose(&device, rows.view_mut(), vocab, &places).unwrap();
                let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / temperature).exp()).collect();
                let mut likeliest: Vec<usize> = (0..vocab).collect();
                likeliest.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
                likeliest.truncate(if top_k == 0 { vocab } else { top_k });
                let total: f64 = likeliest.iter().map(|&token| weights[token]).sum();
                for (token, weight) in weights.iter().enumerate() {
                    let drawn = tokens.iter().filter(|t| **t == Some(token as u32)).count() as f64 / f64::from(draws);
                    let share = if likeliest.contains(&token) { weight / total } else { 0.0 };
                    // the places are evenly spread
                    assert!((drawn - share).abs() <= 1.01 / f64::from(draws), "token {token}: {drawn} of {share}");
                }
            }
        }
    }

    #[test]
    fn logits_that_are_no_numbers_show() {
        for device in devices() {
            let (greedy, random) = (options(0.0, 0, 1.0, 0.0), options(1.0, 2, 0.9, 0.1));
            for options in [&greedy, &random] {
                let mut logits = on(&device, &[1.0, f32::NAN, 2.0, 0.0, 3.0, 2.0]);
                let tokens = choose(&device, logits.view_mut(), 3, &[(options, 0.1), (options, 0.1)]).unwrap();
                assert_eq!(tokens, [None, Some(1)]);
            }
        }
    }
}
