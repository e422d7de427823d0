//! Judges that score every answer by itself.

use std::collections::HashMap;

use engine::Result;

use super::{Comparison, Judge, Judged, Judgement, Progress};
use crate::verdict::{Verdict, outcome_of};

/// Scores answers, each by itself, such as a reward model does.
pub trait Scorer {
    /// The score of each answer, given with its prompt; more is better. The same answer to the same prompt always has the same
    /// score. `progress` is told how many are done, and may end the work with an error.
    ///
    /// # Errors
    /// An answer that cannot be scored; the error of `progress`.
    fn scores(&self, answers: &[(&str, &str)], progress: &mut dyn FnMut(usize) -> Result<()>) -> Result<Vec<f64>>;
}

/// A judge whose verdicts are which of two answers scores more.
pub struct ScoreJudge<'a> {
    /// What scores answers.
    pub scorer: &'a dyn Scorer,
    /// What the scores are about.
    pub metric: String,
    /// The name of the judge.
    pub name: String,
}

impl Judge for ScoreJudge<'_> {
    /// One verdict for each comparison: there is no order to favour, and nothing to repeat. Each different answer to a prompt is
    /// scored once.
    fn judge(
        &self,
        comparisons: &[Comparison<'_>],
        progress: &mut dyn FnMut(&Progress) -> Result<()>,
    ) -> Result<Judged> {
        let mut places: HashMap<(&str, &str), usize> = HashMap::new();
        let mut different: Vec<(&str, &str)> = Vec::new();
        let places: Vec<[usize; 2]> = comparisons
            .iter()
            .map(|comparison| {
                comparison.answers.map(|answer| {
                    *places.entry((comparison.prompt, answer)).or_insert_with(|| {
                        different.push((comparison.prompt, answer));
                        different.len() - 1
                    })
                })
            })
            .collect();
        let total = comparisons.len();
        let mut advance = |answers: usize| {
            progress(&Progress { total, done: total * answers / different.len().max(1), ..Progress::default() })
        };
        let scores = self.scorer.scores(&different, &mut advance)?;
        let judgement = |(comparison, places): (&Comparison<'_>, [usize; 2])| {
            let scores = places.map(|place| scores[place]);
            Judgement {
                verdict: Verdict {
                    prompt: comparison.prompt.to_owned(),
                    category: comparison.category.map(str::to_owned),
                    metric: Some(self.metric.clone()),
                    a: comparison.names[0].to_owned(),
                    b: comparison.names[1].to_owned(),
                    outcome: Some(outcome_of(scores)),
                    scores: Some(scores),
                    lengths: Some(comparison.answers.map(|answer| answer.chars().count())),
                    ..Verdict::default()
                },
                judge: self.name.clone(),
                reply: None,
                missing: None,
            }
        };
        let judgements = comparisons.iter().zip(places).map(judgement).collect();
        Ok(Judged { judgements, stopped: None })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use engine::Error;

    use super::*;

    /// Scores an answer by its length, and notes what it was asked.
    #[derive(Default)]
    struct Lengths(RefCell<Vec<String>>);

    impl Scorer for Lengths {
        fn scores(&self, answers: &[(&str, &str)], progress: &mut dyn FnMut(usize) -> Result<()>) -> Result<Vec<f64>> {
            self.0.borrow_mut().extend(answers.iter().map(|(prompt, answer)| format!("{prompt}{answer}")));
            progress(answers.len())?;
            Ok(answers.iter().map(|(_, answer)| answer.len() as f64).collect())
        }
    }

    fn comparison<'a>(prompt: &'a str, names: [&'a str; 2], answers: [&'a str; 2]) -> Comparison<'a> {
        Comparison { prompt, category: Some("c"), names, answers }
    }

    #[test]
    fn the_answer_of_the_higher_score_is_better_and_each_is_scored_once() {
        let lengths = Lengths::default();
        let judge = ScoreJudge { scorer: &lengths, metric: "length".into(), name: "ruler".into() };
        let comparisons = [
            comparison("p", ["a", "b"], ["xx", "é"]),
            comparison("p", ["a", "c"], ["xx", "yy"]),
            comparison("q", ["a", "b"], ["xx", "xxx"]),
        ];
        let mut told = Vec::new();
        let judged = judge.judge(&comparisons, &mut |progress| {
            told.push((progress.done, progress.total));
            Ok(())
        });
        let judged = judged.unwrap();
        let outcomes: Vec<_> = judged.judgements.iter().map(|judgement| judgement.verdict.outcome).collect();
        assert_eq!(outcomes, [Some(0.5), Some(0.5), Some(0.0)]);
        assert_eq!(*lengths.0.borrow(), ["pxx", "pé", "pyy", "qxx", "qxxx"]);
        assert_eq!(told, [(3, 3)]);
        let first = &judged.judgements[0];
        assert_eq!((first.verdict.scores, first.verdict.lengths), (Some([2.0, 2.0]), Some([2, 1])));
        let json = serde_json::to_value(first).unwrap();
        assert_eq!(
            (&json["metric"], &json["judge"], &json["category"]),
            (&"length".into(), &"ruler".into(), &"c".into())
        );
        let stop = judge.judge(&comparisons, &mut |_| Err(Error::Interrupted("stopped".into())));
        assert!(matches!(stop.unwrap_err(), Error::Interrupted(_)));
    }
}
