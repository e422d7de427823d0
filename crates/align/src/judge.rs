//! Judges: what responses are worth by a metric, from their tokens.

use std::path::Path;

use engine::{Error, Mixture, Model, OutputHead, Result};

use crate::objective::ScoreLoss;
use crate::reference;
use crate::sequences::Sequences;
use crate::tabular::Table;
use crate::world::{Metric, World};

/// Scores responses by one metric.
#[derive(Debug, Clone)]
pub enum Judge<'a> {
    /// g(x, y) = temperature · log π(y|x)/π_start(y|x), the implicit reward of a policy (DPO, arXiv 2305.18290, eq. 5).
    ///
    /// If the policy is the optimum of a step that started from π_start, this is the metric of that step up to a constant per
    /// prompt: differences between responses to one prompt mean what the metric's do, means over prompts need
    /// [`relative_to`].
    Implicit {
        /// π, what was aligned to the metric.
        policy: Mixture<'a>,
        /// π_start, where that alignment started, and its reference. Its vocabulary is the policy's.
        start: Mixture<'a>,
        /// The temperature of that alignment, above 0: β of a first step, β/λ of a later one.
        temperature: f64,
    },
    /// The score that a reward or cost model gives the response's last token; as in `transformers`, padding tokens at the end
    /// of the response do not count as such.
    Model {
        /// It has a score head.
        model: &'a Model,
        /// Whether the score is a reward or a cost, which counts with the other sign: 0 then parts safe from unsafe.
        loss: ScoreLoss,
    },
    /// The exact values of the quickstart world. A text outside its grammar, such as an answer without its end, is worth
    /// [`Metric::outside`].
    Quickstart {
        /// The world; which of its prompts are held out does not matter.
        world: &'a World,
        /// Which of its values.
        metric: Metric,
    },
}

impl Judge<'_> {
    /// The score of every response, `[item][response]`.
    ///
    /// Log-probabilities of [`Judge::Implicit`] and scores of [`Judge::Model`] are computed and kept as [`reference::logps`] does, `micro_batch_tokens` at a
    /// time in the folder `cache`. `progress` gets the number of items done and may end the work with an error; of two
    /// passes over the items each counts half.
    ///
    /// # Errors
    /// Policies of different vocabularies, or a prompt that the quickstart world does not have ([`Error::Input`]); those of
    /// [`reference::logps`].
    pub fn scores(
        &self,
        items: &[Sequences<'_>],
        micro_batch_tokens: Option<usize>,
        cache: Option<&Path>,
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Table> {
        match self {
            Self::Implicit { policy, start, temperature } => {
                let sizes = [policy, start].map(Mixture::vocab_size);
                if sizes[0] != sizes[1] {
                    return Err(Error::input(format!(
                        "The policy of an implicit reward has {} tokens in its vocabulary and the model that it started from \
                         has {}. Give the model that this policy was aligned from.",
                        sizes[0], sizes[1]
                    )));
                }
                let mut logps = |policy: &Mixture<'_>, before: usize| {
                    let mut half = |done| progress((before + done) / 2);
                    reference::logps(policy.clone(), items, micro_batch_tokens, cache, &mut half)
                };
                let (policy, start) = (logps(policy, 0)?, logps(start, items.len())?);
                let mut scores = policy.iter().zip(&start).map(|(policy, start)| temperature * (policy - start));
                Ok(items.iter().map(|item| scores.by_ref().take(item.responses.len()).collect()).collect())
            }
            Self::Model { model, loss } => {
                let OutputHead::Score { pad_token_id } = model.config.head else {
                    return Err(Error::input(
                        "A language model does not score responses. Give a reward or cost model.",
                    ));
                };
                let is_pad = |token: &u32| Some(*token) == pad_token_id;
                let ended = |response: &[u32]| response.iter().rposition(|token| !is_pad(token)).map_or(0, |at| at + 1);
                let trimmed: Vec<Sequences<'_>> = items
                    .iter()
                    .map(|item| Sequences {
                        responses: item.responses.iter().map(|response| &response[..ended(response)]).collect(),
                        ..*item
                    })
                    .collect();
                let scores = reference::logps(*model, &trimmed, micro_batch_tokens, cache, progress)?;
                let mut scores = scores.into_iter().map(|score| loss.sign() * score);
                Ok(items.iter().map(|item| scores.by_ref().take(item.responses.len()).collect()).collect())
            }
            Self::Quickstart { world, metric } => {
                let known = world.by_tokens();
                let of_item = |item: &Sequences<'_>| {
                    let prompt = known.prompt(item.prompt).ok_or_else(|| {
                        Error::input(format!(
                            "The prompt of row {} is none of the quickstart world's, so what answers to it are worth is not \
                             known. Use this judge for data of that world only.",
                            item.row
                        ))
                    })?;
                    let value = |response: &&[u32]| known.answer(prompt, response).map(|answer| answer.value(*metric));
                    Ok(item.responses.iter().map(|response| value(response).unwrap_or(metric.outside())).collect())
                };
                let scores = items.iter().map(of_item).collect::<Result<_>>()?;
                progress(items.len())?;
                Ok(scores)
            }
        }
    }
}

/// Subtracts from the scores of every prompt the mean score of a base policy's answers to it, `[prompt][answer]` both.
///
/// The constants of [`Judge::Implicit`] vanish, and a mean of 0 is what the base policy has. Every prompt needs at least one
/// answer of it. The mean over few answers is an estimate; as prompts err independently, intervals over prompts contain
/// its error.
///
/// # Panics
/// If the two are not of equally many prompts.
pub fn relative_to(scores: &mut [Vec<f64>], base_scores: &[Vec<f64>]) {
    assert_eq!(scores.len(), base_scores.len(), "every prompt needs scores of the base policy's answers");
    for (scores, base) in scores.iter_mut().zip(base_scores) {
        let mean = base.iter().sum::<f64>() / base.len() as f64;
        scores.iter_mut().for_each(|score| *score -= mean);
    }
}
