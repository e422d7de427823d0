//! Verdicts from rows of files: our own, alpaca_eval's annotations, and the replies of judges that write two scores.

use engine::{Error, Result};
use serde_json::{Map, Value};

use super::Verdict;

type Row = Map<String, Value>;

/// The largest score that a judge of two answers may give; the least is 0.
const HIGHEST_SCORE: f64 = 10.0;

/// The verdicts that a row holds, in one of four forms, told by its columns:
///
/// - `generator_1`, `generator_2`, `preference`: alpaca_eval's annotation. A is `generator_2`, the model, and B
///   `generator_1`, the baseline; the outcome is preference − 1, ½ for 0, missing for null. `instruction` is the prompt and
///   `dataset` the category.
/// - `model1`, `model2`, `gpt_content`: what the evaluation of SACPO's authors writes, one verdict per reply in the list
///   `gpt_content`. Their `score1` and `score2` are not read, for they are 0 and 0 where a reply could not be read.
/// - A verdict of ours, as [`Verdict`] describes it, whose outcome counts, whatever reply of its judge stands beside it.
/// - `a`, `b`, `reply`: the same with the judge's reply in place of `outcome` and `scores`. Where `swapped` is true, the first
///   score is B's.
///
/// A reply has scores if it starts with two numbers from 0 to 10, with space or a comma between them, alone on the first line that
/// is not blank. Anything else, or null, is a missing outcome.
///
/// # Errors
/// [`Error::Input`], a sentence that names the column, if the row is in none of the forms.
pub fn verdicts(row: &Row) -> Result<Vec<Verdict>> {
    let has = |column: &str| row.contains_key(column);
    let verdicts = if has("generator_1") && has("preference") {
        vec![annotation(row)?]
    } else if has("gpt_content") {
        replies(row)?
    } else if has("outcome") {
        vec![parse(row)?]
    } else if has("reply") {
        vec![replied(row)?]
    } else {
        return Err(Error::input(
            "The row is no verdict. Give `prompt`, `a`, `b` and `outcome` or `reply`; or a row of alpaca_eval's annotations, \
             or of a file with `model1`, `model2` and `gpt_content`.",
        ));
    };
    verdicts.iter().try_for_each(Verdict::check)?;
    Ok(verdicts)
}

/// The two scores at the start of a judge's reply.
fn two_scores(reply: &str) -> Option<[f64; 2]> {
    let line = reply.trim_start().lines().next()?;
    let mut numbers = line.split(|c: char| c == ',' || c.is_whitespace()).filter(|part| !part.is_empty());
    let mut score = || {
        let text = numbers.next()?;
        // what Rust parses beyond plain decimals, such as inf, is no score
        let plain = text.chars().all(|c| c.is_ascii_digit() || c == '.');
        text.parse().ok().filter(|score| plain && (0.0..=HIGHEST_SCORE).contains(score))
    };
    let scores = [score()?, score()?];
    numbers.next().is_none().then_some(scores)
}

/// 1 where the first score is higher, 0 where the second is, ½ where they are equal.
pub fn outcome_of([a, b]: [f64; 2]) -> f64 {
    match a.total_cmp(&b) {
        std::cmp::Ordering::Greater => 1.0,
        std::cmp::Ordering::Less => 0.0,
        std::cmp::Ordering::Equal => 0.5,
    }
}

fn annotation(row: &Row) -> Result<Verdict> {
    let outcome = match &row["preference"] {
        Value::Null => None,
        value => Some(match value.as_f64() {
            Some(0.0) => 0.5,
            Some(preference) if (1.0..=2.0).contains(&preference) => preference - 1.0,
            _ => {
                return Err(Error::input(format!(
                    "Column `preference`: expected a number from 1, the first answer is better, to 2, the second is, 0 for a \
                     draw or null where it is missing, found {value}."
                )));
            }
        }),
    };
    Ok(Verdict {
        prompt: text(row, "instruction")?.to_owned(),
        category: row.get("dataset").and_then(Value::as_str).map(str::to_owned),
        a: text(row, "generator_2")?.to_owned(),
        b: text(row, "generator_1")?.to_owned(),
        outcome,
        lengths: lengths(row, ["output_2", "output_1"]),
        ..Verdict::default()
    })
}

fn replies(row: &Row) -> Result<Vec<Verdict>> {
    let Some(replies) = row["gpt_content"].as_array() else {
        return Err(Error::input("Column `gpt_content`: expected a list of replies."));
    };
    let verdict = Verdict {
        prompt: text(row, "question")?.to_owned(),
        metric: row.get("criteria").and_then(Value::as_str).map(str::to_owned),
        a: text(row, "model1")?.to_owned(),
        b: text(row, "model2")?.to_owned(),
        lengths: lengths(row, ["answer1", "answer2"]),
        ..Verdict::default()
    };
    replies.iter().zip(0..).map(|(reply, repeat)| with_reply(Verdict { repeat, ..verdict.clone() }, reply)).collect()
}

fn replied(row: &Row) -> Result<Verdict> {
    let mut row = row.clone();
    let reply = row.remove("reply").unwrap_or_default();
    row.insert("outcome".into(), Value::Null);
    with_reply(parse(&row)?, &reply)
}

fn parse(row: &Row) -> Result<Verdict> {
    serde_json::from_value(Value::Object(row.clone()))
        .map_err(|error| Error::input(format!("The row is no verdict: {error}.")))
}

/// The verdict with the scores and the outcome that a reply gives it.
fn with_reply(verdict: Verdict, reply: &Value) -> Result<Verdict> {
    let mut scores = match reply {
        Value::Null => None,
        Value::String(reply) => two_scores(reply),
        other => return Err(Error::input(format!("A judge's reply must be a text or null, found {other}."))),
    };
    if verdict.swapped {
        scores.iter_mut().for_each(|scores| scores.reverse());
    }
    Ok(Verdict { scores, outcome: scores.map(outcome_of), ..verdict })
}

fn text<'a>(row: &'a Row, column: &str) -> Result<&'a str> {
    row.get(column).and_then(Value::as_str).ok_or_else(|| {
        let found = row.get(column).map_or_else(|| "none".into(), Value::to_string);
        Error::input(format!("Column `{column}`: expected a text, found {found}."))
    })
}

fn lengths(row: &Row, answers: [&str; 2]) -> Option<[usize; 2]> {
    let length = |column| Some(row.get(column)?.as_str()?.chars().count());
    Some([length(answers[0])?, length(answers[1])?])
}

#[cfg(test)]
mod tests {
    use super::two_scores;

    #[test]
    fn two_numbers_alone_on_the_first_line_are_scores() {
        for (reply, expected) in [
            ("8 6\nThe first is better.", Some([8.0, 6.0])),
            ("8 6", Some([8.0, 6.0])),
            ("  \n 7.5,\t10 \r\n", Some([7.5, 10.0])),
            ("0 0\n", Some([0.0, 0.0])),
            ("", None),
            ("8", None),
            ("8\n6", None),
            ("8 6 7", None),
            ("Assistant A: 8, Assistant B: 6", None),
            ("8/10 6/10", None),
            ("11 6", None),
            ("-1 6", None),
            ("inf 1e0", None),
            ("NaN NaN", None),
        ] {
            assert_eq!(two_scores(reply), expected, "{reply:?}");
        }
    }
}
