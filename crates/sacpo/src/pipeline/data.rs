//! The data of a step: read, divided, tokenised, and checked against what its objective needs.

use std::path::Path;

use align::data::{
    self, Dataset, HeldOut, Places, Preparation, Prepared, RenderOptions, Report, Source, TokenizedExample,
    TokenizedPair,
};
use align::objective::{Objective, Pairwise, Unpaired, WeightRule};
use align::trainer::check_size;
use engine::checkpoint::Checkpoint;
use engine::{Error, Result};
use sacpo::recipe::{Recipe, Step};

use crate::ui;

/// The data of one step, as tokens.
pub(crate) struct StepData {
    pub(crate) train: Dataset,
    pub(crate) validation: Dataset,
    /// Whether its prompts are plain texts, to which no chat template applies.
    pub(crate) plain_text: bool,
}

/// Says which steps of a chain Theorem 1 does not cover.
///
/// # Errors
/// None for a parsed recipe.
pub(crate) fn warn_of_objectives(recipe: &Recipe) -> Result<()> {
    if recipe.steps.len() < 2 {
        return Ok(());
    }
    for step in &recipe.steps {
        // parameters decide, not temperatures
        let objective = step.objective_at(1.0)?;
        if let Some(reason) = objective.outside_theorem() {
            ui::say(format!(
                "Warning: the step `{}` uses `{}`, which Theorem 1 does not cover, so the chain need not end at the \
                 constrained optimum. {reason}",
                step.name, step.objective
            ));
        }
    }
    Ok(())
}

/// Reads, divides and tokenises the data of a step, and says what came of them. Tokens are files of the folder `cache`, which
/// must not change as long as they are used.
///
/// # Errors
/// Bad rows, rows without what the objective needs, sequences beyond the model's context, nothing left to train on or to
/// validate on, batches too small for the objective, an adapter that the model cannot have.
pub(super) fn load_data(step: &Step, base: &Checkpoint, seed: u64, cache: &Path) -> Result<StepData> {
    let options = &step.data_options;
    let context = base.model.config.max_position_embeddings;
    if options.max_length > context {
        return Err(Error::input(format!(
            "The step `{}` allows sequences of {} tokens, but the model's context is {context} tokens. Set \
             data.max_length to {context} or less, in the recipe or with --set data.max_length={context}.",
            step.name, options.max_length
        )));
    }
    let location = &step.data;
    let mut excluded = Vec::new();
    for prompts in &options.exclude_prompts {
        excluded.extend(data::read_prompts(prompts.path())?);
    }
    let preparation = Preparation {
        source: Source {
            path: location.path(),
            format: step.format,
            metric: &step.metric,
            skip_bad_rows: options.skip_bad_rows,
        },
        held_out: match &step.validation_data {
            Some(held_out) => HeldOut::Path(held_out.path()),
            None => HeldOut::Share { fraction: options.validation_fraction, seed },
        },
        excluded,
        deduplicate: options.deduplicate,
        most: [options.max_pairs, options.max_validation_pairs],
        shuffle: options.shuffle.then_some(seed),
        tokenizer: &base.tokenizer,
        render: RenderOptions {
            max_length: options.max_length,
            template_tail: options.template_tail,
            long_prompts: options.long_prompts,
        },
    };
    let bar = ui::bytes_bar(&format!("reading {}", step.name));
    let mut progress = ui::read_on(&bar);
    // parameters decide, not temperatures
    let objective = step.objective_at(1.0)?;
    let rule = format!("{objective:?} {}", step.margin.is_some());
    let (train, validation, report) = match objective {
        Objective::Pairwise(objective) => {
            let keep = |pair: &TokenizedPair, places: &Places| can_learn(pair, places, &objective, step);
            let Prepared { train, held_out, report } = preparation.pairs(cache, &rule, &keep, &mut progress)?;
            (Dataset::Pairs(train), Dataset::Pairs(held_out), report)
        }
        Objective::Unpaired(objective) => {
            // what is not imitated need not be computed
            let keep = |example: &TokenizedExample, _: &Places| Ok(objective != Unpaired::Sft || example.desirable);
            let Prepared { train, held_out, report } = preparation.examples(cache, &rule, &keep, &mut progress)?;
            check_kto_weights(&train, &objective, step);
            (Dataset::Examples(train), Dataset::Examples(held_out), report)
        }
    };
    bar.finish_and_clear();
    say_what_was_left_out(&report);
    let loaded = StepData { train, validation, plain_text: report.plain_text };
    ui::say(format!(
        "Step {}: {} {} to train on, {} held out, from {location}.",
        step.name,
        loaded.train.len(),
        loaded.train.unit(),
        loaded.validation.len(),
    ));
    if loaded.train.is_empty() {
        return Err(Error::input(format!(
            "Nothing of {location} is left to train on. Raise data.max_length, lower data.validation_fraction, or give data that \
             suit the objective `{}`.",
            step.objective
        )));
    }
    let least = match objective {
        Objective::Pairwise(_) => 1,
        Objective::Unpaired(objective) => objective.smallest_batch(),
    };
    check_size(loaded.train.len(), step.train.batch_size, least)
        .map_err(|error| Error::input(format!("In the step `{}`: {error}", step.name)))?;
    if step.train.validate_every.is_some() && loaded.validation.len() < least {
        return Err(Error::input(format!(
            "The step `{}` asks for validation by train.validate_every, but {} rows of {location} are held out and the objective \
             `{}` needs at least {least}. Raise data.validation_fraction, or leave train.validate_every and \
             train.patience out.",
            step.name,
            loaded.validation.len(),
            step.objective
        )));
    }
    Ok(loaded)
}

fn say_what_was_left_out(report: &Report) {
    for (count, what) in [
        (report.dropped_prompts, "rows left out, since their prompt leaves no room for a response"),
        (report.cut_prompts, "prompts that lost their beginning"),
        (report.truncated_responses, "responses cut to the longest length"),
        (report.not_kept, "rows left out, from which the objective cannot learn"),
        (report.bad, "bad rows left out"),
        (report.excluded, "rows left out, since their prompts are held out or among those of data.exclude_prompts"),
        (report.repeated, "rows left out, since they repeat others"),
    ] {
        if count > 0 {
            ui::say(format!("  {count} {what}."));
        }
    }
    if let Some(first) = &report.first_bad {
        ui::say(format!("  The first: {first}"));
    }
}

/// Whether the objective can learn from a pair.
///
/// # Errors
/// If the pair lacks a label that the objective needs.
fn can_learn(pair: &TokenizedPair, places: &Places, objective: &Pairwise, step: &Step) -> Result<bool> {
    let lacks = |what: &str| {
        Err(Error::input(format!(
            "The objective `{}` of the step `{}` needs {what}. {} does not have it. Add it to the data, or choose another \
             objective.",
            step.objective,
            step.name,
            places.of(pair.row)
        )))
    };
    match (objective, pair.is_unsafe, pair.margin) {
        (Pairwise::SafeDpo { .. }, None, _) => lacks(
            "to know whether each response is safe (the columns `safe_chosen` and `safe_rejected`, or PKU-SafeRLHF's \
             `is_response_0_safe` and `is_response_1_safe`)",
        ),
        (Pairwise::SafeDpo { .. }, Some([true, true]), _) => Ok(false),
        // judges give it where the step says so
        (Pairwise::Modpo { .. }, _, None) if step.margin.is_none() => lacks(
            "the margin of the other metrics between chosen and rejected response (the column `margin`, a number)",
        ),
        _ => Ok(true),
    }
}

/// Says when the weights of `kto` do not suit the numbers of desirable and undesirable examples.
fn check_kto_weights(examples: &[TokenizedExample], objective: &Unpaired, step: &Step) {
    let Unpaired::Kto { desirable_weight, undesirable_weight, .. } = *objective else { return };
    let desirable = examples.iter().filter(|example| example.desirable).count();
    let counts = [desirable, examples.len() - desirable];
    let rule = WeightRule::new(counts, [desirable_weight, undesirable_weight]);
    if rule.holds() {
        return;
    }
    let advice = match rule.desirable_weight {
        Some([least, most]) => format!("Set `desirable_weight` between {least:.3} and {most:.3}."),
        None => "One of the classes is missing, so that nothing holds the other back.".to_owned(),
    };
    ui::say(format!(
        "Warning: the step `{}` has {} desirable and {} undesirable responses, which with the weights {desirable_weight} and \
         {undesirable_weight} is a ratio of {:.3}; KTO's rule is a ratio from 1 to 4/3. {advice}",
        step.name, counts[0], counts[1], rule.ratio
    ));
}
