//! The data of a step: read, divided, tokenised, and checked against what its objective needs.

use std::path::Path;

use align::data::{
    self, Dataset, HeldOut, Places, Preparation, Prepared, RenderOptions, Report, Source, TokenizedExample,
    TokenizedPair,
};
use align::objective::{Objective, Pairwise, ScoreLoss, Unpaired, WeightRule};
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
    let preparation = preparation(step, base, seed)?;
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
    let least = match objective {
        Objective::Pairwise(_) => 1,
        Objective::Unpaired(objective) => objective.smallest_batch(),
    };
    let rows = [train.len(), validation.len()];
    say_and_check(step, rows, train.unit(), &report, least, &format!("the objective `{}`", step.objective))?;
    Ok(StepData { train, validation, plain_text: report.plain_text })
}

/// As [`load_data`], the pairs that a reward or cost model is trained on by the data and options of a step: those to train on
/// and those held out.
///
/// # Errors
/// As there; a pair that does not say which responses are unsafe, for costs.
pub(crate) fn load_scored_pairs(
    step: &Step,
    loss: ScoreLoss,
    base: &Checkpoint,
    seed: u64,
    cache: &Path,
) -> Result<[Vec<TokenizedPair>; 2]> {
    let preparation = preparation(step, base, seed)?;
    let bar = ui::bytes_bar(&format!("reading {}", step.name));
    let keep = |pair: &TokenizedPair, places: &Places| match (loss, pair.is_unsafe) {
        (ScoreLoss::Cost, None) => Err(Error::input(format!(
            "A cost model needs {SAFETY_LABELS}. {} does not have it. Add it to the data, or train a reward model, which needs \
             nothing but the preferences.",
            places.of(pair.row)
        ))),
        _ => Ok(true),
    };
    let rule = format!("{loss:?} of scores");
    let Prepared { train, held_out, report } = preparation.pairs(cache, &rule, &keep, &mut ui::read_on(&bar))?;
    bar.finish_and_clear();
    say_and_check(step, [train.len(), held_out.len()], "pairs", &report, 1, &format!("a {} model", loss.name()))?;
    Ok([train, held_out])
}

/// How the rows of a step become tokens.
fn preparation<'a>(step: &'a Step, base: &'a Checkpoint, seed: u64) -> Result<Preparation<'a>> {
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
    Ok(Preparation {
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
    })
}

/// Says how many rows there are to train on and held out, and checks that they are enough. `needing` is what they are for,
/// and `least` how many it needs.
fn say_and_check(
    step: &Step,
    [train, held_out]: [usize; 2],
    unit: &str,
    report: &Report,
    least: usize,
    needing: &str,
) -> Result<()> {
    let location = &step.data;
    say_what_was_left_out(report);
    ui::say(format!("Step {}: {train} {unit} to train on, {held_out} held out, from {location}.", step.name,));
    if train == 0 {
        return Err(Error::input(format!(
            "Nothing of {location} is left to train on. Raise data.max_length, lower data.validation_fraction, or give data that \
             suit {needing}."
        )));
    }
    check_size(train, step.train.batch_size, least)
        .map_err(|error| Error::input(format!("In the step `{}`: {error}", step.name)))?;
    if step.train.validate_every.is_some() && held_out < least {
        return Err(Error::input(format!(
            "The step `{}` asks for validation by train.validate_every, but {held_out} rows of {location} are held out and {needing} \
             needs at least {least}. Raise data.validation_fraction, or leave train.validate_every and train.patience out.",
            step.name,
        )));
    }
    Ok(())
}

fn say_what_was_left_out(report: &Report) {
    for (count, what) in [
        (report.dropped_prompts, "rows left out, since their prompt leaves no room for a response"),
        (report.cut_prompts, "prompts that lost their beginning"),
        (report.truncated_responses, "responses cut to max_length"),
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
        (Pairwise::SafeDpo { .. }, None, _) => lacks(SAFETY_LABELS),
        (Pairwise::SafeDpo { .. }, Some([true, true]), _) => Ok(false),
        // judges give it where the step says so
        (Pairwise::Modpo { .. }, _, None) if step.margin.is_none() => lacks(
            "the margin of the other metrics between chosen and rejected response (the column `margin`, a number)",
        ),
        _ => Ok(true),
    }
}

/// What tells unsafe responses from safe ones.
const SAFETY_LABELS: &str = "to know whether each response is safe (the columns `safe_chosen` and `safe_rejected`, or \
                             PKU-SafeRLHF's `is_response_0_safe` and `is_response_1_safe`)";

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
