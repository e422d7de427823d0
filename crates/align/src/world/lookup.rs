//! Prompts and answers by their tokens.

use std::collections::BTreeMap;

use super::{Answer, Prompt, World};

/// The prompts and answers of a world by their tokens. Made by [`World::by_tokens`].
#[derive(Debug, Clone)]
pub struct ByTokens<'w> {
    prompts: BTreeMap<Vec<u32>, &'w Prompt>,
    /// By topic.
    answers: Vec<BTreeMap<Vec<u32>, &'w Answer>>,
}

impl World {
    /// Everything that can be asked and answered, in training and held out, to be found by its tokens.
    pub fn by_tokens(&self) -> ByTokens<'_> {
        let prompts = self.train_prompts.iter().chain(&self.heldout_prompts);
        let prompts = prompts.map(|prompt| (self.prompt_tokens(prompt), prompt)).collect();
        let of_topics = self.answers.iter();
        let answers = of_topics.map(|answers| answers.iter().map(|a| (self.answer_tokens(a), a)).collect()).collect();
        ByTokens { prompts, answers }
    }
}

impl<'w> ByTokens<'w> {
    /// The prompt with these tokens, those of [`World::prompt_tokens`].
    pub fn prompt(&self, tokens: &[u32]) -> Option<&'w Prompt> {
        self.prompts.get(tokens).copied()
    }

    /// The answer to a prompt with these tokens, those of [`World::answer_tokens`]; nothing if they are not all of them, or
    /// of no answer to this prompt.
    pub fn answer(&self, prompt: &Prompt, tokens: &[u32]) -> Option<&'w Answer> {
        self.answers[prompt.topic].get(tokens).copied()
    }
}
