//! `sacpo loss`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use align::data::{self, Record};
use align::objective::{Labelled, LabelledLoss, Objective, Pair, Pairwise, Response, RunningMean, Unpaired};
use engine::{Error, Result};
use serde::Serialize;
use serde_json::Value;

use super::print_json;
use crate::cli::{Global, Loss};
use crate::ui;

#[derive(Serialize)]
struct Output {
    /// The mean of `losses`.
    loss: f64,
    losses: Vec<f64>,
    /// The gradient of the mean, by what it is taken with respect to.
    grad: BTreeMap<&'static str, Vec<f64>>,
    metrics: BTreeMap<&'static str, f64>,
    /// Where each loss comes from, counted from 1 for people.
    #[serde(skip)]
    rows: Vec<usize>,
}

pub(super) fn run(options: &Loss, global: Global) -> Result<()> {
    let objective = objective(options)?;
    let records = data::read_records(&options.file)?;
    let rows: Vec<Row<'_>> = records.iter().map(|record| Row { record, objective: &objective }).collect();
    warn_of_positive(&records);
    let output = match &objective {
        Objective::Pairwise(pairwise) => of_pairs(pairwise, &rows)?,
        Objective::Unpaired(unpaired) => of_singles(unpaired, &rows)?,
    };
    if global.json { print_json(&output) } else { ui::print(table(&output)) }
}

/// Says of the first log-probability that is none.
fn warn_of_positive(records: &[Record]) {
    const COLUMNS: [&str; 6] = ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "policy", "ref"];
    let of_record = |record: &'_ Record| {
        let value = |column| record.columns.get(column).and_then(Value::as_f64);
        // sums in f32 may end a little above 0
        COLUMNS.into_iter().find_map(|column| Some((column, value(column).filter(|value| *value > 1e-3)?)))
    };
    let first = records.iter().find_map(|record| Some((record, of_record(record)?)));
    if let Some((record, (column, value))) = first {
        ui::say(format!(
            "Warning: {}, column `{column}`: {value} is taken as it stands, but a log-probability is at most 0. If the file \
             holds negative log-likelihoods, change their sign.",
            record.place
        ));
    }
}

fn objective(options: &Loss) -> Result<Objective> {
    let name = options.objective.as_str();
    match options.beta {
        Some(beta) => options.parameters.options().build(name, beta),
        // the one objective without a temperature
        None if name == "sft" => options.parameters.options().build(name, 1.0),
        None => Err(Error::input(format!(
            "The objective `{name}` needs a temperature. Give --beta, for example --beta 0.1; in a later step of a chain it \
             is β/λ."
        ))),
    }
}

fn of_pairs(objective: &Pairwise, rows: &[Row<'_>]) -> Result<Output> {
    let pairs = rows.iter().map(Row::pair).collect::<Result<Vec<Pair>>>()?;
    let n = pairs.len() as f64;
    let mut losses = Vec::new();
    let mut grad = BTreeMap::new();
    let mut metrics = BTreeMap::new();
    for (row, pair) in rows.iter().zip(&pairs) {
        let got = objective.evaluate(pair);
        let (chosen, rejected) = (got.chosen, got.rejected);
        row.check([got.loss, chosen.logp, rejected.logp, chosen.kl, rejected.kl])?;
        losses.push(got.loss);
        let mut slopes = vec![("policy_chosen", chosen.logp), ("policy_rejected", rejected.logp)];
        if let Pairwise::Tdpo { .. } = objective {
            slopes.extend([("kl_chosen", chosen.kl), ("kl_rejected", rejected.kl)]);
        }
        for (input, slope) in slopes {
            grad.entry(input).or_insert_with(Vec::new).push(slope / n);
        }
        let margin = got.reward_chosen - got.reward_rejected;
        for (name, value) in [
            ("rewards/chosen", got.reward_chosen),
            ("rewards/rejected", got.reward_rejected),
            ("rewards/margins", margin),
            ("rewards/accuracies", f64::from(u8::from(margin > 0.0))),
            ("logps/chosen", pair.chosen.policy),
            ("logps/rejected", pair.rejected.policy),
        ] {
            *metrics.entry(name).or_insert(0.0) += value;
        }
    }
    metrics.values_mut().for_each(|sum| *sum /= n);
    Ok(Output {
        loss: losses.iter().sum::<f64>() / n,
        losses,
        grad,
        metrics,
        rows: rows.iter().map(|row| row.record.row).collect(),
    })
}

/// The whole file is one batch: z₀ of `kto` is over all its mismatched pairs, δ of `bco` over all its responses.
fn of_singles(objective: &Unpaired, rows: &[Row<'_>]) -> Result<Output> {
    let mut examples = Vec::new();
    for row in rows {
        examples.extend(row.labelled(objective)?.into_iter().map(|example| (row, example)));
    }
    let mut metrics = BTreeMap::new();
    let shift = match objective {
        Unpaired::Kto { .. } => {
            let mismatched = rows.iter().map(Row::mismatched).collect::<Result<Vec<f64>>>()?;
            let kl = Unpaired::kl_estimate(&mismatched);
            metrics.insert("kl", kl);
            kl
        }
        Unpaired::Bco { .. } => {
            let rewards: Vec<f64> =
                examples.iter().map(|(_, example)| objective.evaluate(example, 0.0).reward).collect();
            let delta = RunningMean::default().update(&rewards);
            metrics.insert("delta", delta);
            delta
        }
        _ => 0.0,
    };
    let counts = |example: &Labelled| example.desirable || !matches!(objective, Unpaired::Sft);
    let n = examples.iter().filter(|(_, example)| counts(example)).count() as f64;
    if n == 0.0 {
        return Err(Error::input(
            "No row is desirable, but `sft` learns from desirable responses alone. Set `desirable` to true where a response \
             is to be imitated.",
        ));
    }
    let mut evaluated = Vec::new();
    for (row, example) in &examples {
        let got = objective.evaluate(example, shift);
        row.check([got.loss, got.derivative.logp])?;
        evaluated.push((example, got));
    }
    for (desirable, logps, rewards) in
        [(true, "logps/chosen", "rewards/chosen"), (false, "logps/rejected", "rewards/rejected")]
    {
        let mean = |of: fn(&Labelled, &LabelledLoss) -> f64| {
            let of_class = evaluated.iter().filter(|(example, _)| example.desirable == desirable);
            let values: Vec<f64> = of_class.map(|(example, got)| of(example, got)).collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        metrics.extend(mean(|example, _| example.response.policy).map(|mean| (logps, mean)));
        if !matches!(objective, Unpaired::Sft) {
            metrics.extend(mean(|_, got| got.reward).map(|mean| (rewards, mean)));
        }
    }
    if let (Some(chosen), Some(rejected)) = (metrics.get("rewards/chosen"), metrics.get("rewards/rejected")) {
        metrics.insert("rewards/margins", chosen - rejected);
    }
    let losses: Vec<f64> = evaluated.iter().map(|(_, got)| got.loss).collect();
    Ok(Output {
        loss: losses.iter().sum::<f64>() / n,
        losses,
        grad: BTreeMap::from([("policy", evaluated.iter().map(|(_, got)| got.derivative.logp / n).collect())]),
        metrics,
        rows: examples.iter().map(|(row, _)| row.record.row).collect(),
    })
}

/// A row of the file, and what it is read for.
struct Row<'a> {
    record: &'a Record,
    objective: &'a Objective,
}

impl Row<'_> {
    fn pair(&self) -> Result<Pair> {
        if !self.has("policy_chosen") && self.has("policy") {
            return Err(self.bad(
                "policy",
                format!(
                    "the row holds a single response, but `{}` compares pairs. Give `policy_chosen`, `policy_rejected` and \
                     so on, or use `kto`, `bco` or `sft`.",
                    self.objective.name()
                ),
            ));
        }
        let mut pair = Pair {
            chosen: self.response(["policy_chosen", "ref_chosen", "len_chosen"])?,
            rejected: self.response(["policy_rejected", "ref_rejected", "len_rejected"])?,
            is_unsafe: [false; 2],
            margin: 0.0,
        };
        match self.objective {
            Objective::Pairwise(Pairwise::SafeDpo { .. }) => {
                pair.is_unsafe = [!self.flag("safe_chosen")?, !self.flag("safe_rejected")?];
                if pair.is_unsafe == [true; 2] {
                    return Err(self.bad(
                        "safe_chosen",
                        "both responses are unsafe, which is contradictory: `safe-dpo` prefers a safe response, and there is \
                         none. Remove the row, or correct `safe_chosen` or `safe_rejected`.",
                    ));
                }
            }
            Objective::Pairwise(Pairwise::Modpo { .. }) => pair.margin = self.number("margin")?,
            Objective::Pairwise(Pairwise::Tdpo { .. }) => {
                pair.chosen.kl = self.divergence("kl_chosen")?;
                pair.rejected.kl = self.divergence("kl_rejected")?;
            }
            _ => {}
        }
        Ok(pair)
    }

    /// The single response of the row, or both of a pair: the chosen one is desirable, the rejected one is not.
    fn labelled(&self, objective: &Unpaired) -> Result<Vec<Labelled>> {
        let sft = matches!(objective, Unpaired::Sft);
        if self.has("policy_chosen") {
            let chosen = self.response(["policy_chosen", "ref_chosen", "len_chosen"])?;
            let mut both = vec![Labelled { response: chosen, desirable: true }];
            if !sft {
                let rejected = self.response(["policy_rejected", "ref_rejected", "len_rejected"])?;
                both.push(Labelled { response: rejected, desirable: false });
            }
            return Ok(both);
        }
        let response = self.response(["policy", "ref", "len"])?;
        // demonstrations need no label
        let desirable = if sft && !self.has("desirable") { true } else { self.flag("desirable")? };
        Ok(vec![Labelled { response, desirable }])
    }

    /// log π_θ/π_ref of the row's mismatched prompt and response.
    fn mismatched(&self) -> Result<f64> {
        Ok(self.number("policy_kl")? - self.number("ref_kl")?)
    }

    fn response(&self, [policy, reference, len]: [&str; 3]) -> Result<Response> {
        let needed = |column, needed: bool| needed || self.has(column);
        let response = Response {
            policy: self.number(policy)?,
            reference: if needed(reference, self.objective.uses_reference()) { self.number(reference)? } else { 0.0 },
            len: if needed(len, self.objective.uses_lengths()) { self.length(len)? } else { 1 },
            kl: 0.0,
        };
        if response.policy >= 0.0 && matches!(self.objective, Objective::Pairwise(Pairwise::Orpo { .. })) {
            let found = format!(
                "the log-probability is {}, but `orpo` takes its odds, which exist only below 0. Correct it, or use another \
                 objective.",
                response.policy
            );
            return Err(self.bad(policy, found));
        }
        Ok(response)
    }

    fn has(&self, column: &str) -> bool {
        self.record.columns.get(column).is_some_and(|value| !value.is_null())
    }

    fn value(&self, column: &str) -> Result<&Value> {
        self.record.columns.get(column).filter(|value| !value.is_null()).ok_or_else(|| {
            let name = self.objective.name();
            self.bad(column, format!("it is missing, but `{name}` needs it: {}. Add the column.", meaning(column)))
        })
    }

    fn number(&self, column: &str) -> Result<f64> {
        let value = self.value(column)?;
        value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| {
            self.bad(column, format!("expected a number, {}, found {}. Correct it.", meaning(column), short(value)))
        })
    }

    fn divergence(&self, column: &str) -> Result<f64> {
        let number = self.number(column)?;
        if number < 0.0 {
            let found = format!("expected {}, which is never below 0, found {number}. Correct it.", meaning(column));
            return Err(self.bad(column, found));
        }
        Ok(number)
    }

    fn length(&self, column: &str) -> Result<usize> {
        let value = self.value(column)?;
        // lengths that went through a table of floats are whole all the same
        let number = value.as_f64().filter(|number| *number >= 1.0 && *number < 1e15 && number.fract() == 0.0);
        number.map(|number| number as usize).ok_or_else(|| {
            let found = short(value);
            self.bad(
                column,
                format!("expected {}, a whole number of at least 1, found {found}. Correct it.", meaning(column)),
            )
        })
    }

    fn flag(&self, column: &str) -> Result<bool> {
        let value = self.value(column)?;
        value.as_bool().ok_or_else(|| {
            let found = short(value);
            self.bad(column, format!("expected true or false, {}, found {found}. Correct it.", meaning(column)))
        })
    }

    /// Numbers from the file are finite, but their squares need not be.
    fn check<const N: usize>(&self, results: [f64; N]) -> Result<()> {
        if results.iter().all(|result| result.is_finite()) {
            return Ok(());
        }
        Err(Error::input(format!(
            "{}: the loss of `{}` is not finite, since its numbers are too large to calculate with. Correct the row.",
            self.record.place,
            self.objective.name()
        )))
    }

    fn bad(&self, column: &str, problem: impl AsRef<str>) -> Error {
        Error::input(format!("{}, column `{column}`: {}", self.record.place, problem.as_ref()))
    }
}

/// What a column holds, as a phrase.
fn meaning(column: &str) -> &'static str {
    match column {
        "policy_chosen" => "the log-probability of the chosen response under the policy",
        "policy_rejected" => "the log-probability of the rejected response under the policy",
        "ref_chosen" => "the log-probability of the chosen response under the reference",
        "ref_rejected" => "the log-probability of the rejected response under the reference",
        "policy" => "the log-probability of the response under the policy",
        "ref" => "the log-probability of the response under the reference",
        "policy_kl" => {
            "the log-probability under the policy of a response to another row's prompt, a mismatched pair from which the \
             divergence z₀ is estimated (`bco` needs none)"
        }
        "ref_kl" => "the log-probability of the mismatched pair in `policy_kl` under the reference",
        "kl_chosen" | "kl_rejected" => "the sum over the response's tokens of KL(π_ref ‖ π_θ)",
        "margin" => "the weighted sum of the other metrics of the chosen response, less that of the rejected one",
        "safe_chosen" => "whether the chosen response is safe",
        "safe_rejected" => "whether the rejected response is safe",
        "desirable" => "whether the response is desirable",
        _ => "the number of tokens of the response",
    }
}

/// A value as a message can show it.
fn short(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        Value::String(text) => format!("the text \"{}\"", text.chars().take(20).collect::<String>()),
        other => format!("`{other}`"),
    }
}

fn table(output: &Output) -> String {
    let mut table = format!("{:>6}  {:>14}", "row", "loss");
    for input in output.grad.keys() {
        let _ = write!(table, "  {:>18}", format!("d/d {input}"));
    }
    for (i, loss) in output.losses.iter().enumerate() {
        let _ = write!(table, "\n{:>6}  {loss:>14.6}", output.rows[i]);
        for slopes in output.grad.values() {
            let _ = write!(table, "  {:>18.6e}", slopes[i]);
        }
    }
    let _ = write!(table, "\n\n{:<20} {:>14.6}", "mean loss", output.loss);
    for (name, value) in &output.metrics {
        let _ = write!(table, "\n{name:<20} {value:>14.6}");
    }
    table
}
