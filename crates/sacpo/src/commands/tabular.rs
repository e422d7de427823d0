//! `sacpo tabular`.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use align::tabular::{Description, Policy, Problem, Solution, Table, largest_difference_over_orders};
use engine::{Error, Result};
use sacpo::suggest::nearest;
use serde::Serialize;
use serde_json::Value;

use super::print_json;
use crate::cli::{Global, Tabular};
use crate::ui;

/// With more constraints than this there are too many orders of steps to try them all.
const MAX_PERMUTED: usize = 5;

#[derive(Serialize)]
struct Output {
    lambda: Vec<f64>,
    policy: Table,
    reward: f64,
    safety: Vec<f64>,
    kl: f64,
    duality_gap: f64,
    kkt_residual: f64,
    stepwise: Stepwise,
}

#[derive(Serialize)]
struct Stepwise {
    /// The policy after the reward step, then after each constraint's.
    policies: Vec<Table>,
    /// From the optimum to the end of the chain, over `orders` orders of its steps.
    max_difference: f64,
    orders: usize,
}

pub(super) fn run(options: &Tabular, global: Global) -> Result<()> {
    let problem = read(&options.problem)?;
    let solution = problem.solve()?;
    let steps = problem.steps(&solution.lambda);
    let policies = problem.stepwise(&steps);
    let (max_difference, orders) = if solution.lambda.len() <= MAX_PERMUTED {
        let largest = largest_difference_over_orders(problem.reference(), &steps, &solution.policy);
        (largest, (1..=steps.len()).product())
    } else {
        (policies.last().map_or(0.0, |last| last.max_difference(&solution.policy)), 1)
    };
    let policies: Vec<Table> = policies.iter().map(Policy::probabilities).collect();
    let stepwise = Stepwise { policies, max_difference, orders };
    if global.json {
        let policy = solution.policy.probabilities();
        let Solution { lambda, reward, safety, kl, duality_gap, kkt_residual, .. } = solution;
        return print_json(&Output { lambda, policy, reward, safety, kl, duality_gap, kkt_residual, stepwise });
    }
    ui::print(describe(&problem, &solution, &stepwise))
}

/// Reads and checks a problem; every error names the file.
fn read(path: &Path) -> Result<Problem> {
    let file = path.display();
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|error| Error::input(format!("{file} is no valid JSON: {error}. Correct it there.")))?;
    let Some(object) = value.as_object() else {
        return Err(Error::input(format!(
            "{file} must hold one JSON object with the keys {}. `sacpo tabular --help` describes them.",
            keys()
        )));
    };
    if let Some(key) = object.keys().find(|key| !Description::KEYS.contains(&key.as_str())) {
        let advice = match nearest(key, Description::KEYS) {
            Some(meant) => format!("Did you mean `{meant}`?"),
            None => format!("Known keys are {}.", keys()),
        };
        return Err(Error::input(format!("{file} has an unknown key `{}`. {advice}", key.escape_debug())));
    }
    let needed = Description::KEYS.iter().filter(|key| **key != "prompt_weights");
    if let Some(key) = needed.into_iter().find(|key| !object.contains_key(**key)) {
        return Err(Error::input(format!(
            "{file} lacks the key `{key}`. `sacpo tabular --help` says what it should hold."
        )));
    }
    let description: Description = serde_json::from_slice(&bytes).map_err(|error| {
        Error::input(format!(
            "{file} does not have the form of a problem: {error}. `beta` is a number, `thresholds` and `prompt_weights` \
             are lists of numbers, `ref` and `reward` lists of such lists, one per prompt, and `safety` a list of those, \
             one per constraint."
        ))
    })?;
    Problem::new(description).map_err(|error| Error::input(format!("{file}: {error}")))
}

fn keys() -> String {
    Description::KEYS.map(|key| format!("`{key}`")).join(", ")
}

/// The solution as text: constraints, then every answer's probability along the chain.
fn describe(problem: &Problem, solution: &Solution, stepwise: &Stepwise) -> String {
    let objective = solution.reward - problem.beta() * solution.kl;
    let mut text = format!(
        "E[r] {:.6}, KL {:.6} nats, E[r] − β KL {objective:.6} at β {}\n",
        solution.reward,
        solution.kl,
        problem.beta()
    );
    let _ = writeln!(
        text,
        "Duality gap {:.1e}, KKT residual {:.1e}, largest difference from stepwise alignment {:.1e} (orders tried: {})",
        solution.duality_gap, solution.kkt_residual, stepwise.max_difference, stepwise.orders
    );
    if !solution.lambda.is_empty() {
        let _ = write!(text, "\n{:>10} {:>12} {:>12} {:>12} {:>12}", "constraint", "E[g]", "threshold", "λ", "β/λ");
        let rows = solution.safety.iter().zip(problem.thresholds()).zip(&solution.lambda);
        for (i, ((safety, threshold), lambda)) in rows.enumerate() {
            let temperature = if *lambda > 0.0 { format!("{:.6}", problem.beta() / lambda) } else { "no step".into() };
            let _ = write!(text, "\n{:>10} {safety:>12.6} {threshold:>12.6} {lambda:>12.6} {temperature:>12}", i + 1);
        }
        text.push('\n');
    }
    let names = (1..stepwise.policies.len()).map(|i| format!("+ safety {i}"));
    let _ = write!(text, "\n{:>6} {:>6} {:>10} {:>10}", "prompt", "answer", "ref", "reward");
    names.for_each(|name| {
        let _ = write!(text, " {name:>10}");
    });
    let reference = problem.reference().probabilities();
    for (x, row) in reference.iter().enumerate() {
        for (y, p) in row.iter().enumerate() {
            let _ = write!(text, "\n{:>6} {:>6} {p:>10.6}", x + 1, y + 1);
            for policy in &stepwise.policies {
                let _ = write!(text, " {:>10.6}", policy[x][y]);
            }
        }
    }
    text
}
