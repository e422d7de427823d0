//! Reward and cost models, and policies, as judges of texts.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use align::data::{
    LabelledExample, LongPrompts, Prompt, RenderOptions, TemplateTail, TokenizedExample, Tokens, tokenize_examples,
    tokenize_prompt,
};
use align::judge::Judge;
use align::objective::ScoreLoss;
use align::sequences::Sequences;
use engine::checkpoint::Checkpoint;
use engine::{Error, Result, Tokenizer};
use evaluate::judge::Scorer;

use crate::answer_files::shortened;
use crate::answers::as_chat;
use crate::ui;

/// Answers that are scored in one pass with their prompt.
const SCORED_TOGETHER: usize = 16;

/// Loads a model that gives rewards or costs.
///
/// # Errors
/// As [`Checkpoint::load_scorer`]; a model of the other kind, as far as it says which it is.
pub(crate) fn load(path: &Path, loss: ScoreLoss) -> Result<Checkpoint> {
    let provenance = std::fs::read(path.join("provenance.json")).ok();
    let provenance = provenance.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok());
    let other =
        provenance.as_ref().and_then(|provenance| provenance["kind"].as_str()).filter(|kind| *kind != loss.name());
    if let Some(other) = other {
        return Err(Error::input(format!(
            "{0} is a {other} model, but it is given as a {1} model. A high reward is good and a high cost is bad, so give it as \
             {other} model (--{other}-model, or {other}_model in a recipe).",
            path.display(),
            loss.name()
        )));
    }
    Checkpoint::load_scorer(path)
}

/// A judge of tokens as one of texts.
pub(crate) struct TextScorer<'a> {
    pub(crate) judge: Judge<'a>,
    pub(crate) tokenizer: &'a Tokenizer,
    /// The longest prompt and answer together, in tokens.
    pub(crate) context: usize,
    pub(crate) template_tail: TemplateTail,
    /// Keeps scores for as long as the judging is not done.
    pub(crate) cache: PathBuf,
}

impl TextScorer<'_> {
    /// The tokens of an answer to a prompt, as those of a response to train on, and whether its end was cut. A policy may have
    /// answered nothing.
    fn tokens(&self, prompt: &str, answer: &str, row: usize) -> Result<(TokenizedExample, bool)> {
        let place = |_: usize| format!("An answer to {:?}", shortened(prompt));
        let prompt = Prompt::Text(prompt.to_owned());
        let prompt = if self.tokenizer.has_chat_template() { as_chat(prompt, None) } else { prompt };
        if answer.trim().is_empty() {
            let prompt: Tokens = tokenize_prompt(&prompt, self.tokenizer)?.into();
            let end: Vec<u32> = self.tokenizer.eos().into_iter().collect();
            if prompt.is_empty() || prompt.len() >= self.context || end.is_empty() {
                return Err(Error::input(format!("{} is empty, and cannot be judged. Leave it out.", place(row))));
            }
            return Ok((TokenizedExample { prompt, response: end.into(), desirable: true, row }, false));
        }
        let example = LabelledExample { prompt, completion: answer.to_owned(), desirable: true, row };
        let options = RenderOptions {
            max_length: self.context,
            template_tail: self.template_tail,
            long_prompts: LongPrompts::Error,
        };
        let mut tokenized = tokenize_examples(&[example], &place, self.tokenizer, &options)?;
        let cut = tokenized.truncated_responses > 0;
        tokenized.rows.pop().map(|row| (row, cut)).ok_or_else(|| Error::Failed("An answer was lost.".into()))
    }
}

impl Scorer for TextScorer<'_> {
    fn scores(&self, answers: &[(&str, &str)], progress: &mut dyn FnMut(usize) -> Result<()>) -> Result<Vec<f64>> {
        let mut examples = Vec::with_capacity(answers.len());
        let mut cut = 0;
        for (row, (prompt, answer)) in (1..).zip(answers) {
            let (example, was_cut) = self.tokens(prompt, answer, row)?;
            cut += usize::from(was_cut);
            examples.push(example);
        }
        if cut > 0 {
            ui::say(format!("  {cut} answers are judged without their end, which is beyond {} tokens.", self.context));
        }
        // those to one prompt together, in the order in which the prompts come
        let mut places: HashMap<&[u32], usize> = HashMap::new();
        let mut of_prompts: Vec<Vec<usize>> = Vec::new();
        for (index, example) in examples.iter().enumerate() {
            let place = *places.entry(&example.prompt).or_insert(of_prompts.len());
            if place == of_prompts.len() {
                of_prompts.push(Vec::new());
            }
            of_prompts[place].push(index);
        }
        let parts: Vec<&[usize]> = of_prompts.iter().flat_map(|indices| indices.chunks(SCORED_TOGETHER)).collect();
        let item = |part: &&[usize]| Sequences {
            prompt: &examples[part[0]].prompt,
            responses: part.iter().map(|&index| &*examples[index].response).collect(),
            row: examples[part[0]].row,
        };
        let items: Vec<Sequences<'_>> = parts.iter().map(item).collect();
        let done: Vec<usize> = parts.iter().map(|part| part.len()).collect();
        let mut told = (0, 0);
        let mut advance = |items: usize| {
            // of two passes over the items each counts half, so it never goes back
            while told.0 < items {
                told = (told.0 + 1, told.1 + done[told.0]);
            }
            progress(told.1)
        };
        let scored = self.judge.scores(&items, None, Some(&self.cache), &mut advance)?;
        let mut scores = vec![0.0; answers.len()];
        for (index, score) in parts.iter().copied().flatten().zip(scored.iter().flatten()) {
            scores[*index] = *score;
        }
        Ok(scores)
    }
}
