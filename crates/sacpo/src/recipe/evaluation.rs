//! `[evaluate]`: what policies answer when all are made, and who judges the answers.

use std::ops::Bound::{Excluded, Included};

use engine::Result;
use engine::generate::Dtype;
use evaluate::judge::Rubric;
use serde::{Serialize, Serializer};

use super::location::Location;
use super::section::Section;
use super::step::{BASE, check_name};
use super::{Judge, POSITIVE, known};
use crate::policy_name::PolicyName;
use crate::suggest::nearest;

pub(super) const EVALUATE_KEYS: &[&str] = &[
    "prompts",
    "policy",
    "judge",
    "max_new_tokens",
    "temperature",
    "top_p",
    "stop",
    "seed",
    "system",
    "batch_size",
    "dtype",
];
pub(super) const PROMPTS_KEYS: &[&str] = &["name", "file", "prompts"];
pub(super) const POLICY_KEYS: &[&str] = &["name", "model", "answers"];
pub(super) const JUDGE_KEYS: &[&str] = &[
    "metric",
    "sets",
    "against",
    "endpoint",
    "model",
    "rubric",
    "api_key_env",
    "repeats",
    "temperature",
    "max_tokens",
    "set",
    "attempts",
    "retries",
    "timeout",
    "concurrency",
    "max_calls",
    "max_cost",
    "input_price",
    "output_price",
];

/// More requests at once are a slip of the finger.
const MAX_CONCURRENCY: usize = 1024;

/// `[evaluate]`: what to ask every policy when all are made.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluate {
    /// The length of an answer at most, in tokens, ≥ 1. Default 64.
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token each time; higher is more random, ≥ 0. Default 0.
    pub temperature: f64,
    /// Only the likeliest tokens that together have this probability are drawn, 0 < p ≤ 1. Default 1.
    pub top_p: f64,
    /// Texts that end an answer. Default: none.
    pub stop: Vec<String>,
    /// The seed of what is drawn. Default: the run's.
    pub seed: Option<u64>,
    /// A system message before every prompt. Default: none.
    pub system: Option<String>,
    /// Answers that are generated at once, ≥ 1. It changes memory and speed, not the answers. Default 16.
    pub batch_size: usize,
    /// What the matrices are read in: fewer bits are faster, and move the answers. Default: f32.
    pub dtype: Dtype,
    /// What is asked, in sets that have names. Default: nothing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prompts: Vec<PromptSet>,
    /// Policies beside the run's own. Default: none.
    #[serde(rename = "policy", skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<External>,
    /// Who compares the answers. Default: nobody.
    #[serde(rename = "judge", skip_serializing_if = "Vec::is_empty")]
    pub judges: Vec<AnswerJudge>,
}

/// `[[evaluate.prompts]]`: a set of prompts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PromptSet {
    /// Its name, fit for a folder's. The list of texts `prompts` in `[evaluate]` is a set of the name `prompts`.
    pub name: String,
    /// Where the prompts are.
    #[serde(flatten)]
    pub source: PromptSource,
}

/// Where prompts are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum PromptSource {
    /// In a file.
    #[serde(rename = "file")]
    File(Location),
    /// In the recipe.
    #[serde(rename = "prompts")]
    Texts(Vec<String>),
}

/// `[[evaluate.policy]]`: a policy that is not the run's own.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct External {
    /// Its name, fit for a file's.
    pub name: String,
    /// What there is of it.
    #[serde(flatten)]
    pub source: ExternalSource,
}

/// What there is of a policy that is not the run's own.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExternalSource {
    /// A model, or two that are mixed.
    #[serde(serialize_with = "model_name")]
    Model {
        /// As the recipe names it.
        given: PolicyName,
        /// The same on this machine, where addresses were fetched. Default: as given.
        fetched: Option<PolicyName>,
    },
    /// A file of its answers.
    Answers(Location),
}

/// `[[evaluate.judge]]`: who compares answers by one metric.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AnswerJudge {
    /// What the verdicts are on.
    pub metric: String,
    /// The names of the sets whose answers are judged. Default: all.
    pub sets: Vec<String>,
    /// The policy that all others are compared with. Default: the base model.
    pub against: String,
    /// The language model that judges; nothing where the recipe's `[[judge]]` of the metric does.
    #[serde(flatten)]
    pub chat: Option<ChatJudge>,
}

/// A language model behind an endpoint, with the options of `sacpo judge`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChatJudge {
    /// The URL of the endpoint up to `/v1`.
    pub endpoint: String,
    /// The name of the model there.
    pub model: String,
    /// What answers are judged by. Default: the rubric that has the metric's name.
    #[serde(serialize_with = "rubric_name")]
    pub rubric: Rubric,
    /// The environment variable with the API key. Default: `OPENAI_API_KEY`, if it is set.
    pub api_key_env: Option<String>,
    /// Verdicts for every order of two answers, ≥ 1. Default 1.
    pub repeats: usize,
    /// The temperature of the judge, ≥ 0. Default 0.
    pub temperature: f64,
    /// The longest reply in tokens, ≥ 1. Default 512.
    pub max_tokens: usize,
    /// Other fields of the request, `KEY=VALUE`. Default: none.
    pub set: Vec<String>,
    /// Replies that are asked for until one has scores, ≥ 1. Default 3.
    pub attempts: usize,
    /// How often a request is made again in a row after a fault. Default 8.
    pub retries: usize,
    /// The longest that a request may take, in seconds, ≥ 1. Default 120.
    pub timeout: usize,
    /// Requests that are made at once, ≥ 1. Default 8.
    pub concurrency: usize,
    /// The most calls, over all runs of the recipe. Default: no limit.
    pub max_calls: Option<usize>,
    /// The most that the calls may cost; needs prices. Default: no limit.
    pub max_cost: Option<f64>,
    /// The price of a million tokens of requests. Default: unknown.
    pub input_price: Option<f64>,
    /// The price of a million tokens of replies. Default: unknown.
    pub output_price: Option<f64>,
}

fn model_name<S: Serializer>(
    given: &PolicyName,
    _fetched: &Option<PolicyName>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(given)
}

fn rubric_name<S: Serializer>(rubric: &Rubric, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(rubric.name())
}

/// What `[evaluate]` may name: policies that are known before anything is trained, and the recipe's judges.
pub(super) struct Known<'a> {
    pub(super) policies: &'a [String],
    pub(super) judges: &'a [Judge],
}

impl Evaluate {
    pub(super) fn read(section: &Section<'_>, made: &Known<'_>) -> Result<Self> {
        let mut evaluate = Self {
            max_new_tokens: section.count("max_new_tokens", 1)?.unwrap_or(64),
            temperature: section.number("temperature", 0.0..)?.unwrap_or(0.0),
            top_p: section.number("top_p", (Excluded(0.0), Included(1.0)))?.unwrap_or(1.0),
            stop: section.stop_texts("stop")?.unwrap_or_default(),
            seed: section.seed("seed")?,
            system: section.text("system")?,
            batch_size: section.count("batch_size", 1)?.unwrap_or(16),
            dtype: section.choice("dtype", &Dtype::ALL.map(|dtype| (dtype.name(), dtype)))?.unwrap_or_default(),
            prompts: PromptSet::read_all(section)?,
            policies: Vec::new(),
            judges: Vec::new(),
        };
        let mut names = made.policies.to_vec();
        for section in section.sections("policy")? {
            let policy = External::read(&known(section.clone(), POLICY_KEYS)?)?;
            if names.contains(&policy.name) {
                return Err(
                    section.error(&format!("Another policy is called `{}`. Set a `name` of its own.", policy.name))
                );
            }
            names.push(policy.name.clone());
            evaluate.policies.push(policy);
        }
        let mut files: Vec<String> = Vec::new();
        for section in section.sections("judge")? {
            let section = known(section, JUDGE_KEYS)?;
            let judge = AnswerJudge::read(&section, &evaluate.prompts, &names, made.judges)?;
            for file in judge.sets.iter().map(|set| judge.name_on(set)) {
                if files.contains(&file) {
                    return Err(section.error(&format!(
                        "Two judgings would be called `{file}`, after the set and the metric. Give one of them another `metric`; \
                         `rubric` then says what it judges by."
                    )));
                }
                files.push(file);
            }
            evaluate.judges.push(judge);
        }
        Ok(evaluate)
    }
}

impl PromptSet {
    /// The sets of `[[evaluate.prompts]]`, or the one of a list of texts.
    fn read_all(evaluate: &Section<'_>) -> Result<Vec<Self>> {
        if !evaluate.has_sections("prompts") {
            let texts = evaluate.texts("prompts")?.filter(|texts| !texts.is_empty());
            let set = |texts| Self { name: "prompts".into(), source: PromptSource::Texts(texts) };
            return Ok(texts.map(set).into_iter().collect());
        }
        let mut sets: Vec<Self> = Vec::new();
        for section in evaluate.sections("prompts")? {
            let section = known(section, PROMPTS_KEYS)?;
            let name = section.required("name", section.text("name")?, "name = \"helpful\"")?;
            check_name(&section, "set", &name)?;
            if sets.iter().any(|set| set.name == name) {
                return Err(section.error(&format!("Another set of prompts is called `{name}`. Set another `name`.")));
            }
            let source = match (section.text("file")?, section.texts("prompts")?) {
                (Some(file), None) => PromptSource::File(file.into()),
                (None, Some(texts)) if !texts.is_empty() => PromptSource::Texts(texts),
                (Some(_), Some(_)) => return Err(section.error("It has both `file` and `prompts`. Keep one of them.")),
                _ => {
                    return Err(section.error(
                        "It has no prompts. Give `file`, a file of prompts, or `prompts`, a list of texts in quotes.",
                    ));
                }
            };
            sets.push(Self { name, source });
        }
        Ok(sets)
    }
}

impl External {
    fn read(section: &Section<'_>) -> Result<Self> {
        let name = section.required("name", section.text("name")?, "name = \"sft\"")?;
        check_name(section, "policy", &name)?;
        let source = match (section.text("model")?, section.text("answers")?) {
            (Some(model), None) => ExternalSource::Model {
                given: model.parse().map_err(|error| section.error(&format!("In `model`: {error}.")))?,
                fetched: None,
            },
            (None, Some(answers)) => ExternalSource::Answers(answers.into()),
            (Some(_), Some(_)) => return Err(section.error("It has both `model` and `answers`. Keep one of them.")),
            (None, None) => {
                return Err(section.error(
                    "It must say what there is of the policy: `model`, a folder, hf://OWNER/NAME or \"mix(A, B, q)\", or `answers`, \
                     a file of its answers.",
                ));
            }
        };
        Ok(Self { name, source })
    }
}

impl AnswerJudge {
    fn read(section: &Section<'_>, prompts: &[PromptSet], policies: &[String], judges: &[Judge]) -> Result<Self> {
        let metric = section.required("metric", section.text("metric")?, "metric = \"harmlessness\"")?;
        check_name(section, "metric", &metric)?;
        if prompts.is_empty() {
            return Err(section.error(
                "There are no answers to judge. Give prompts: `[[evaluate.prompts]]`, or a list `prompts` in `[evaluate]`.",
            ));
        }
        let all: Vec<String> = prompts.iter().map(|set| set.name.clone()).collect();
        let sets = match section.texts("sets")? {
            None => all,
            Some(sets) => {
                for set in &sets {
                    check_known(section, "sets", "set of prompts", set, &all)?;
                }
                sets
            }
        };
        let against = section.text("against")?.unwrap_or_else(|| BASE.into());
        check_known(section, "against", "policy that is known before training", &against, policies)?;
        let judge = Self { chat: ChatJudge::read(section, &metric)?, metric, sets, against };
        if judge.chat.is_none() && !judges.iter().any(|local| local.metric == judge.metric) {
            return Err(section.error(&format!(
                "Nobody judges `{0}`: add a `[[judge]]` with `metric = \"{0}\"`, or give `endpoint` and `model`, a language model \
                 that judges.",
                judge.metric
            )));
        }
        Ok(judge)
    }

    /// The name of its verdicts on a set.
    pub fn name_on(&self, set: &str) -> String {
        format!("{set}-{}", self.metric)
    }
}

impl ChatJudge {
    /// The language model that a section names, if it does.
    fn read(section: &Section<'_>, metric: &str) -> Result<Option<Self>> {
        let Some(endpoint) = section.text("endpoint")? else {
            for key in JUDGE_KEYS.iter().filter(|key| !["metric", "sets", "against", "endpoint"].contains(key)) {
                section.forbid(key, "It is about a language model as the judge. Give `endpoint` too, or remove it.")?;
            }
            return Ok(None);
        };
        let rubrics = Rubric::ALL.map(|rubric| (rubric.name(), rubric));
        let of_metric = rubrics.iter().find(|(name, _)| *name == metric).map(|(_, rubric)| *rubric);
        let rubric = section.choice("rubric", &rubrics)?.or(of_metric);
        let chat = Self {
            endpoint,
            model: section.required("model", section.text("model")?, "model = \"gpt-4.1-mini\"")?,
            rubric: section.required("rubric", rubric, "rubric = \"harmlessness\"")?,
            api_key_env: section.text("api_key_env")?,
            repeats: section.count("repeats", 1)?.unwrap_or(1),
            temperature: section.number("temperature", 0.0..)?.unwrap_or(0.0),
            max_tokens: section.count("max_tokens", 1)?.unwrap_or(512),
            set: section.texts("set")?.unwrap_or_default(),
            attempts: section.count("attempts", 1)?.unwrap_or(3),
            retries: section.count("retries", 0)?.unwrap_or(8),
            timeout: section.count("timeout", 1)?.unwrap_or(120),
            concurrency: section.count("concurrency", 1)?.unwrap_or(8),
            max_calls: section.count("max_calls", 1)?,
            max_cost: section.number("max_cost", POSITIVE)?,
            input_price: section.number("input_price", 0.0..)?,
            output_price: section.number("output_price", 0.0..)?,
        };
        if chat.concurrency > MAX_CONCURRENCY {
            return Err(section.error(&format!("`concurrency` may be {MAX_CONCURRENCY} at most.")));
        }
        if chat.input_price.is_some() != chat.output_price.is_some() {
            return Err(section.error("A cost needs both `input_price` and `output_price`. Give the other one too."));
        }
        if chat.max_cost.is_some() && chat.input_price.is_none() {
            return Err(section.error("`max_cost` needs `input_price` and `output_price`. Give them."));
        }
        Ok(Some(chat))
    }
}

/// Fails unless a name is one of those that are known.
fn check_known(section: &Section<'_>, key: &str, what: &str, name: &str, known: &[String]) -> Result<()> {
    if known.iter().any(|other| other == name) {
        return Ok(());
    }
    let meant = match nearest(name, known.iter().map(String::as_str)) {
        Some(meant) => format!("Did you mean `{meant}`?"),
        None => format!("There are {}.", known.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")),
    };
    Err(section.error(&format!("`{key}` names `{name}`, which is no {what} of this recipe. {meant}")))
}
