//! `report.html`: what a run folder holds, gathered for [`evaluate::report`].
//!
//! Whatever of a run is there is shown, and what is missing or cannot be read is said on the page: a report is also for runs that
//! were stopped.

mod answers;
mod origins;
mod ratings;
mod results;

use std::path::{Path, PathBuf};

use align::log::read_metric;
use engine::checkpoint::atomic;
use engine::{Error, Result};
use evaluate::curves::Series;
use evaluate::report::{Curves, Fact, Report};
use serde::Serialize;

use crate::ui;
use answers::{Answers, VerdictFile};
use origins::Origins;
use results::Results;

/// Files beside those of a run.
#[derive(Debug, Default)]
pub(crate) struct Extra {
    /// Answers of policies, `FILE` or `NAME=FILE`.
    pub(crate) answers: Vec<String>,
    pub(crate) verdicts: Vec<PathBuf>,
}

/// What was written.
#[derive(Debug, Serialize)]
pub(crate) struct Written {
    out: PathBuf,
    bytes: usize,
    policies: usize,
    answers: usize,
    verdicts: usize,
    missing: Vec<String>,
}

impl Written {
    /// In words.
    pub(crate) fn text(&self) -> String {
        let Self { out, bytes, policies, answers, verdicts, missing } = self;
        let missing: String = missing.iter().map(|sentence| format!("\nNot in it: {sentence}")).collect();
        format!(
            "{}: {policies} policies, {answers} answers, {verdicts} verdicts, {:.2} MiB.{missing}",
            out.display(),
            *bytes as f64 / f64::from(1 << 20)
        )
    }
}

/// Steps that a curve shows at most; of more, the mean of neighbours is shown.
const CURVE_POINTS: usize = 120;

/// The quantities of a training that are shown, where its objective has them.
const CURVES: [&str; 5] = ["loss", "rewards/margins", "rewards/accuracies", "eval_loss", "eval_rewards/accuracies"];

/// Writes `report.html` into the folder of a run that has ended. What was paid for is in the folder already, so a report that
/// cannot be written is no failure of the run, but is said.
pub(crate) fn finish(run: &Path) {
    let out = run.join("report.html");
    match write(Some(run), &Extra::default(), &out) {
        Ok(_) => ui::say(format!("Report: {}", out.display())),
        Err(error) => ui::say(format!("Warning: {} is not written. {error}", out.display())),
    }
}

/// Writes the report of a run folder, or of files alone.
///
/// # Errors
/// A folder that holds nothing of a run, extra files that cannot be read, and `out` that cannot be written.
pub(crate) fn write(run: Option<&Path>, extra: &Extra, out: &Path) -> Result<Written> {
    let report = gather(run, extra)?;
    let page = report.html()?;
    atomic::write_file(out, |file| file.write_all(page.as_bytes()))?;
    let answers = report.answers.iter().flat_map(|set| &set.prompts).flat_map(|prompt| &prompt.answers);
    Ok(Written {
        out: out.to_owned(),
        bytes: page.len(),
        policies: report.policies.len(),
        answers: answers.flatten().count(),
        verdicts: report.answers.iter().map(|set| set.verdicts.len()).sum(),
        missing: report.missing,
    })
}

fn gather(run: Option<&Path>, extra: &Extra) -> Result<Report> {
    let mut missing = Vec::new();
    let (results, origins) = match run {
        Some(run) => (Results::read(run, &mut missing), Origins::read(run, &mut missing)),
        None => (Results::default(), Origins::default()),
    };
    let order: Vec<String> = results.policies.iter().map(|policy| policy.name.clone()).collect();
    let mut answers = run.map(|run| Answers::read(run, &order, &mut missing)).unwrap_or_default();
    let mut verdicts = run.map(|run| VerdictFile::all(run, &mut missing)).unwrap_or_default();
    let mut rated = run.map(|run| ratings::read(run, &results, &mut missing)).unwrap_or_default();
    answers.add(&extra.answers)?;
    for path in &extra.verdicts {
        verdicts.push(VerdictFile::read(path)?);
    }
    if rated.is_empty() {
        rated = ratings::of_verdicts(&verdicts, &results, &mut missing);
    }
    let curves = run.map(|run| curves(run, &results, &origins, &mut missing)).unwrap_or_default();
    if let Some(run) =
        run.filter(|_| results.policies.is_empty() && curves.is_empty() && answers.is_empty() && rated.is_empty())
    {
        return Err(Error::input(format!(
            "{} holds nothing of a run: neither results.json, nor steps/, answers/, verdicts/ or ratings.json. Give the folder \
             that `sacpo run` or `sacpo quickstart` wrote, its run.out.",
            run.display()
        )));
    }
    let chosen = results.chosen();
    let cost = cost(run, &results, &origins, &answers, &verdicts);
    let sets = answers.sets(&verdicts, chosen, &mut missing);
    let mut frontiers = results.frontiers();
    frontiers.extend(ratings::frontiers(&rated, &results));
    if frontiers.is_empty() {
        missing.push(
            "There is no frontier: it takes policies with two metrics, exact, judged or on held-out pairs.".into(),
        );
    }
    Ok(Report {
        title: run.map_or_else(|| "Answers and verdicts".to_owned(), title),
        facts: origins.facts.clone(),
        frontiers,
        constraint: results.constraint.clone(),
        curves,
        ratings: rated.into_iter().map(|rated| rated.rating).collect(),
        answers: sets,
        policies: origins.policies(&results),
        cost,
        missing,
    })
}

fn title(run: &Path) -> String {
    let path = std::path::absolute(run).unwrap_or_else(|_| run.to_owned());
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// The curves of every step, of all its policies in one plot.
fn curves(run: &Path, results: &Results, origins: &Origins, missing: &mut Vec<String>) -> Vec<Curves> {
    let folder = run.join("steps");
    let mut names: Vec<String> = entries(&folder).iter().filter_map(|path| name_of(path)).collect();
    names.sort_by_key(|name| results.place(name));
    let mut all: Vec<Curves> = Vec::new();
    for name in names {
        let path = folder.join(&name).join("metrics.jsonl");
        let step = origins.step_of(&name).or(results.step_of(&name)).unwrap_or(&name).to_owned();
        for metric in CURVES {
            let points = match read_metric(&path, metric) {
                Ok(points) => thinned(&points),
                Err(error) => {
                    missing.push(format!("The training of {name} is not shown. {error}"));
                    break;
                }
            };
            if points.is_empty() {
                continue;
            }
            let series = Series { name: name.clone(), points };
            match all.iter_mut().find(|curves| curves.step == step && curves.metric == metric) {
                Some(curves) => curves.series.push(series),
                None => all.push(Curves { step: step.clone(), metric: metric.into(), series: vec![series] }),
            }
        }
    }
    if all.is_empty() {
        missing.push("There are no training curves: no policy of the run was trained.".into());
    }
    // a step's plots one after the other, whichever of its policies has which quantity
    let steps: Vec<String> = all.iter().map(|curves| curves.step.clone()).collect();
    all.sort_by_key(|curves| steps.iter().position(|step| *step == curves.step));
    all
}

/// A curve of few enough points, each the mean of as many steps, at the last of them.
fn thinned(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let together = points.len().div_ceil(CURVE_POINTS).max(1);
    let mean = |chunk: &[(u64, f64)]| {
        let sum: f64 = chunk.iter().map(|(_, value)| value).sum();
        chunk.last().map(|&(step, _)| (step, sum / chunk.len() as f64))
    };
    points.chunks(together).filter_map(mean).collect()
}

/// What the run took.
fn cost(
    run: Option<&Path>,
    results: &Results,
    origins: &Origins,
    answers: &Answers,
    verdicts: &[VerdictFile],
) -> Vec<Fact> {
    let mut facts = Vec::new();
    let mut say = |name: &str, value: Option<String>| facts.extend(value.map(|value| fact(name, value)));
    let training = origins.seconds();
    say("Training and merging", (training > 0.0).then(|| ui::duration(training)));
    say("The last call", results.seconds.map(ui::duration));
    let gib = |bytes: usize| format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30));
    say("Memory at most", results.peak_memory_bytes.map(gib));
    let metrics = run.map(|run| entries(&run.join("steps"))).unwrap_or_default();
    let read = |path: &PathBuf| read_metric(&path.join("metrics.jsonl"), "tokens").unwrap_or_default();
    let tokens: f64 = metrics.iter().flat_map(read).map(|(_, tokens)| tokens).sum();
    say("Tokens trained on", (tokens > 0.0).then(|| format!("{tokens}")));
    let (texts, tokens) = answers.amount();
    say(
        "Answers",
        (texts > 0).then(|| if tokens > 0 { format!("{texts}, {tokens} tokens") } else { format!("{texts}") }),
    );
    let judged = || verdicts.iter().flat_map(|file| &file.verdicts);
    let lost = judged().filter(|verdict| verdict.outcome.is_none()).count();
    say("Verdicts", (judged().count() > 0).then(|| format!("{}, of which {lost} are missing", judged().count())));
    facts
}

fn fact(name: &str, value: String) -> Fact {
    Fact { name: name.into(), value }
}

/// What a folder holds, sorted; nothing where there is no such folder.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// The name of a policy's folder.
fn name_of(path: &Path) -> Option<String> {
    path.is_dir().then(|| path.file_name().map(|name| name.to_string_lossy().into_owned())).flatten()
}

/// A JSON file of the run; nothing if it is not there, and a sentence if it cannot be read.
fn read_json<T: serde::de::DeserializeOwned>(path: &Path, missing: &mut Vec<String>) -> Option<T> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => {
            missing.push(Error::io("read", path)(error).to_string());
            return None;
        }
    };
    serde_json::from_slice(&bytes)
        .map_err(|error| missing.push(format!("{} is damaged: {error}.", path.display())))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::thinned;

    #[test]
    fn long_curves_become_means_of_neighbours() {
        let short: Vec<(u64, f64)> = (1..=120).map(|step| (step, step as f64)).collect();
        assert_eq!(thinned(&short), short);
        let long: Vec<(u64, f64)> = (1..=361).map(|step| (step, step as f64)).collect();
        let thin = thinned(&long);
        assert_eq!((thin.len(), thin[0], thin[90]), (91, (4, 2.5), (361, 361.0)));
    }
}
