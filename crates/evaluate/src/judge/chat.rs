//! A language model behind an endpoint as the judge.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use engine::{Error, Result};
use serde_json::{Map, Value, json};

use super::budget::{Budget, Usage};
use super::endpoint::{ApiKey, Endpoint, base_url};
use super::reply::{Reply, Standing};
use super::retry::Clock;
use super::rubric::Rubric;
use super::store::Store;
use super::work::Work;
use super::{Comparison, Judge, Judged, Judgement, Missing, Progress};
use crate::verdict::{Verdict, outcome_of};

/// Tokens that an endpoint's chat template may add to a request.
const TEMPLATE_TOKENS: u64 = 64;

/// What is asked, of whom, and how persistently.
#[derive(Debug, Clone)]
pub struct ChatOptions {
    /// The URL of the endpoint up to `/v1`.
    pub endpoint: String,
    /// The name of the model there.
    pub model: String,
    /// The secret of the endpoint.
    pub key: ApiKey,
    /// What answers are judged by.
    pub rubric: Rubric,
    /// Requests for every order of the two answers, at least 1.
    pub repeats: u32,
    /// The temperature of the judge, at least 0.
    pub temperature: f64,
    /// The longest reply in tokens, at least 1.
    pub max_tokens: u32,
    /// Other fields of a request, which override those above; null leaves a field out.
    pub fields: Map<String, Value>,
    /// Replies that are asked for until one has scores, at least 1.
    pub attempts: usize,
    /// How often a request is made again in a row because of a fault.
    pub retries: u32,
    /// The longest that a request may take.
    pub timeout: Duration,
    /// Requests that are made at once, at least 1.
    pub concurrency: usize,
    /// The most that all verdicts may take, those included that the store has already.
    pub budget: Budget,
}

/// A language model behind an OpenAI-compatible chat endpoint.
///
/// It judges every comparison in both orders of the answers and as often as [`ChatOptions::repeats`] says. Every reply is in
/// the store before anything is made of it, so what is there is not asked again, by nobody who uses the store.
pub struct ChatJudge<'a> {
    pub(super) options: ChatOptions,
    /// The URL in its one form.
    pub(super) base: String,
    most_output_tokens: Option<u64>,
    pub(super) endpoint: Endpoint,
    pub(super) store: &'a Store,
    pub(super) clock: &'a dyn Clock,
}

/// What a judging would take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Verdicts that there will be.
    pub verdicts: usize,
    /// Those that the store has.
    pub kept: usize,
    /// Calls for the others, if every reply has scores. Equal requests are made once.
    pub calls: usize,
    /// What the store's calls for these verdicts took.
    pub used: Usage,
    /// The most that the calls take if no reply has scores, every byte is a token, and every reply is as long as it may be.
    /// Calls that are lost by faults come on top. Without a limit of replies it is not known.
    pub most: Option<Usage>,
}

/// The request for one verdict.
pub(super) struct Request<'a> {
    pub(super) comparison: Comparison<'a>,
    pub(super) swapped: bool,
    pub(super) repeat: u32,
    pub(super) key: String,
}

impl<'a> ChatJudge<'a> {
    /// A judge of these options, which keeps its replies in `store`.
    ///
    /// # Errors
    /// [`Error::Input`] that names the option that is wrong.
    pub fn new(options: ChatOptions, store: &'a Store, clock: &'a dyn Clock) -> Result<Self> {
        let base = base_url(&options.endpoint)?;
        let wrong = |what: &str| Err(Error::input(what));
        if options.model.trim().is_empty() {
            return wrong("The model has no name. Give the name that the endpoint knows it by.");
        }
        if !(options.temperature >= 0.0 && options.temperature.is_finite()) {
            return wrong("The temperature must be a number of at least 0. 0 is usual for a judge.");
        }
        let counts = [options.repeats, options.max_tokens, options.attempts as u32, options.concurrency as u32];
        if counts.contains(&0) || options.timeout.is_zero() {
            return wrong("Repeats, tokens, attempts, concurrency and timeout must be above 0.");
        }
        for field in ["model", "messages", "n", "stream"] {
            if options.fields.contains_key(field) {
                return Err(Error::input(format!(
                    "The field `{field}` of requests cannot be set: what is asked and how it is read depends on it."
                )));
            }
        }
        let endpoint = Endpoint::new(&base, options.key.clone(), options.timeout, options.concurrency);
        let mut judge = Self { options, base, most_output_tokens: None, endpoint, store, clock };
        let body = judge.body("");
        judge.most_output_tokens =
            ["max_completion_tokens", "max_tokens"].iter().find_map(|field| body[field].as_u64());
        if judge.options.budget.cost.is_some() && judge.most_output_tokens.is_none() {
            return wrong(
                "A budget of cost needs a limit of every reply's tokens. Leave max_tokens in, or set max_completion_tokens.",
            );
        }
        Ok(judge)
    }

    /// What judging would take beyond what the store has. Nothing is asked.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn plan(&self, comparisons: &[Comparison<'_>]) -> Result<Plan> {
        let requests = self.requests(comparisons)?;
        let mut plan = Plan { verdicts: 0, kept: 0, calls: 0, used: self.store.usage(), most: Some(Usage::default()) };
        for (request, verdicts) in &requests {
            plan.verdicts += verdicts;
            let replies = self.store.replies(&request.key)?;
            if self.standing(&replies) != Standing::Open {
                plan.kept += verdicts;
                continue;
            }
            plan.calls += 1;
            let tried = replies.iter().filter(|reply| Reply::read(reply).is_some()).count();
            let most =
                self.most_output_tokens.map(|_| self.most(request).times((self.options.attempts - tried) as u64));
            plan.most = plan.most.zip(most).map(|(sum, most)| sum + most);
        }
        Ok(plan)
    }

    /// The different requests for comparisons, and how many verdicts hang on each; they become the store's job.
    fn requests<'c>(&self, comparisons: &[Comparison<'c>]) -> Result<Vec<(Request<'c>, usize)>> {
        let mut requests: Vec<(Request<'c>, usize)> = Vec::new();
        let mut places = HashMap::new();
        for request in comparisons.iter().flat_map(|comparison| self.requests_of(*comparison)) {
            let place = *places.entry(request.key.clone()).or_insert(requests.len());
            match requests.get_mut(place) {
                Some((_, verdicts)) => *verdicts += 1,
                None => requests.push((request, 1)),
            }
        }
        self.store.begin_job(requests.iter().map(|(request, _)| request.key.as_str()), self.clock.now())?;
        Ok(requests)
    }

    /// The requests for one comparison: both orders, and each repeated.
    fn requests_of<'c>(&self, comparison: Comparison<'c>) -> impl Iterator<Item = Request<'c>> {
        let keys = [false, true].map(|swapped| self.key(&self.text(comparison, swapped)));
        let repeats = self.options.repeats;
        [false, true].into_iter().zip(keys).flat_map(move |(swapped, keys)| {
            (0..repeats).map(move |repeat| Request { comparison, swapped, repeat, key: format!("{keys}-{repeat}") })
        })
    }

    /// A hash of everything but the repetition that a reply depends on: where the request goes, and what it says.
    fn key(&self, text: &str) -> String {
        blake3::hash(format!("{}\n{}", self.base, self.body(text)).as_bytes()).to_hex().to_string()
    }

    pub(super) fn text(&self, comparison: Comparison<'_>, swapped: bool) -> String {
        let [a, b] = comparison.answers;
        self.options.rubric.request(comparison.prompt, if swapped { [b, a] } else { [a, b] })
    }

    /// The body of a request.
    pub(super) fn body(&self, text: &str) -> Value {
        let mut body = json!({
            "model": self.options.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": self.options.temperature,
            "max_tokens": self.options.max_tokens,
        });
        if let Value::Object(body) = &mut body {
            body.extend(self.options.fields.clone());
            body.retain(|_, value| !value.is_null());
        }
        body
    }

    /// The most that one call takes: no token is shorter than a byte.
    pub(super) fn most(&self, request: &Request<'_>) -> Usage {
        let text = self.text(request.comparison, request.swapped);
        Usage::call(text.len() as u64 + TEMPLATE_TOKENS, self.most_output_tokens.unwrap_or(0))
    }

    pub(super) fn standing(&self, replies: &[String]) -> Standing {
        Standing::of(replies, self.options.attempts)
    }

    /// What the store says of comparisons.
    fn judgements(&self, comparisons: &[Comparison<'_>]) -> Result<Vec<Judgement>> {
        let mut judgements = Vec::new();
        for request in comparisons.iter().flat_map(|comparison| self.requests_of(*comparison)) {
            let standing = self.standing(&self.store.replies(&request.key)?);
            judgements.push(self.judgement(&request, standing));
        }
        Ok(judgements)
    }

    fn judgement(&self, request: &Request<'_>, standing: Standing) -> Judgement {
        let Request { comparison: Comparison { prompt, category, names, answers }, swapped, repeat, .. } = *request;
        let (scores, reply, missing) = match standing {
            Standing::Scored([first, second], reply) => {
                (Some(if swapped { [second, first] } else { [first, second] }), Some(reply), None)
            }
            Standing::Unreadable(reply) => (None, Some(reply), Some(Missing::Unreadable)),
            Standing::Open => (None, None, Some(Missing::NotJudged)),
        };
        let verdict = Verdict {
            prompt: prompt.to_owned(),
            category: category.map(str::to_owned),
            metric: Some(self.options.rubric.name().to_owned()),
            a: names[0].to_owned(),
            b: names[1].to_owned(),
            outcome: scores.map(outcome_of),
            scores,
            lengths: Some(answers.map(|answer| answer.chars().count())),
            refusals: None,
            swapped,
            repeat,
        };
        Judgement { verdict, judge: self.options.model.clone(), reply, missing }
    }
}

impl Judge for ChatJudge<'_> {
    fn judge(
        &self,
        comparisons: &[Comparison<'_>],
        progress: &mut dyn FnMut(&Progress) -> Result<()>,
    ) -> Result<Judged> {
        let requests = self.requests(comparisons)?;
        let mut state = Progress { total: requests.iter().map(|(_, verdicts)| verdicts).sum(), ..Progress::default() };
        let mut open = VecDeque::new();
        for (request, verdicts) in requests {
            match self.standing(&self.store.replies(&request.key)?) {
                Standing::Open => open.push_back((request, verdicts)),
                standing => state.settle(matches!(standing, Standing::Unreadable(_)), verdicts),
            }
        }
        let stopped = Work::new(self, open).done(&mut state, progress).err();
        let judgements = self.judgements(comparisons)?;
        let left = judgements.iter().filter(|judgement| judgement.missing == Some(Missing::NotJudged)).count();
        let stopped = stopped.or_else(|| (left > 0).then(|| incomplete(left, &state)));
        Ok(Judged { judgements, stopped })
    }
}

fn incomplete(left: usize, state: &Progress) -> Error {
    let why = state.trouble.as_ref().map(|trouble| format!(": {trouble}")).unwrap_or_default();
    Error::Failed(format!(
        "{left} of {} verdicts could not be had, for the endpoint failed too often{why}. Run the same command again to ask for \
         them; nothing else is asked again.",
        state.total
    ))
}
