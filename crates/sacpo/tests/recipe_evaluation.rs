//! `[evaluate]`: what is read of it, and how every mistake is named.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

use evaluate::judge::Rubric;
use sacpo::policy_name::PolicyName;
use sacpo::recipe::{ExternalSource, PromptSource, Recipe};

const CHAIN: &str = r#"
[model]
base = "base"
[[step]]
metric = "helpfulness"
beta = 0.1
data = "h"
[[step]]
metric = "harmlessness"
beta_over_lambda = [0.1, 0.025]
data = "s"
[mix]
q = 0.5
"#;

const WHOLE: &str = r#"
[[judge]]
metric = "helpfulness"
policy = "helpfulness"
[evaluate]
max_new_tokens = 300
temperature = 0.7
top_p = 0.9
stop = ["USER:"]
seed = 5
system = "Be brief."
batch_size = 4
[[evaluate.prompts]]
name = "helpful"
file = "hf://datasets/a/b/helpful.json"
[[evaluate.prompts]]
name = "own"
prompts = ["One?", "Two?"]
[[evaluate.policy]]
name = "sft"
model = "mix(models/a, hf://o/b, 0.25)"
[[evaluate.policy]]
name = "theirs"
answers = "theirs.jsonl"
[[evaluate.judge]]
metric = "helpfulness"
[[evaluate.judge]]
metric = "safe"
rubric = "harmlessness"
endpoint = "http://localhost:1/v1"
model = "m"
sets = ["own"]
against = "mix-0.5"
api_key_env = "KEY"
repeats = 2
temperature = 0.5
max_tokens = 9
set = ["seed=1"]
attempts = 4
retries = 5
timeout = 6
concurrency = 7
max_calls = 8
max_cost = 9.5
input_price = 1
output_price = 2
"#;

fn parse(parts: &[&str]) -> engine::Result<Recipe> {
    Recipe::parse(&parts.concat(), Path::new("recipe.toml"), &[])
}

#[test]
fn every_key_arrives_where_it_belongs() {
    let recipe = parse(&[CHAIN, WHOLE]).unwrap();
    let evaluate = &recipe.evaluate;
    assert_eq!((evaluate.max_new_tokens, evaluate.temperature, evaluate.top_p), (300, 0.7, 0.9));
    assert_eq!((evaluate.stop.as_slice(), evaluate.seed), (["USER:".to_owned()].as_slice(), Some(5)));
    assert_eq!((evaluate.system.as_deref(), evaluate.batch_size), (Some("Be brief."), 4));
    let sets: Vec<&str> = evaluate.prompts.iter().map(|set| set.name.as_str()).collect();
    assert_eq!(sets, ["helpful", "own"]);
    assert_eq!(evaluate.prompts[0].source, PromptSource::File("hf://datasets/a/b/helpful.json".into()));
    assert_eq!(evaluate.prompts[1].source, PromptSource::Texts(vec!["One?".into(), "Two?".into()]));
    let mixed = PolicyName::Mix { a: "models/a".into(), b: PathBuf::from("hf://o/b"), q: 0.25 };
    assert_eq!(evaluate.policies[0].source, ExternalSource::Model { given: mixed, fetched: None });
    assert_eq!(evaluate.policies[1].source, ExternalSource::Answers("theirs.jsonl".into()));
    let [own, chat] = evaluate.judges.as_slice() else { panic!("{:?}", evaluate.judges) };
    assert_eq!((own.sets.len(), own.against.as_str(), own.chat.is_none()), (2, "base", true));
    assert_eq!((chat.name_on("own"), chat.against.as_str()), ("own-safe".into(), "mix-0.5"));
    let chat = chat.chat.as_ref().unwrap();
    assert_eq!((chat.rubric, chat.model.as_str()), (Rubric::Harmlessness, "m"));
    assert_eq!((chat.repeats, chat.temperature, chat.max_tokens, chat.attempts), (2, 0.5, 9, 4));
    assert_eq!((chat.retries, chat.timeout, chat.concurrency, chat.max_calls), (5, 6, 7, Some(8)));
    assert_eq!((chat.max_cost, chat.input_price, chat.output_price), (Some(9.5), Some(1.0), Some(2.0)));
    assert_eq!((chat.api_key_env.as_deref(), chat.set.as_slice()), (Some("KEY"), ["seed=1".to_owned()].as_slice()));

    let written = recipe.to_toml().unwrap();
    let again = parse(&[&written]).unwrap_or_else(|error| panic!("{error}\n{written}"));
    assert_eq!(again, Recipe { run: again.run.clone(), ..recipe.clone() }, "{written}");
}

#[test]
fn a_list_of_texts_is_a_set() {
    let recipe = parse(&[CHAIN, "[evaluate]\nprompts = [\"One?\"]\n"]).unwrap();
    let [set] = recipe.evaluate.prompts.as_slice() else { panic!("{:?}", recipe.evaluate) };
    assert_eq!((set.name.as_str(), &set.source), ("prompts", &PromptSource::Texts(vec!["One?".into()])));
    assert!(parse(&[CHAIN, "[evaluate]\nprompts = []\n"]).unwrap().evaluate.prompts.is_empty());
    assert_eq!(recipe.evaluate.max_new_tokens, 64);
}

#[test]
fn every_mistake_is_named() {
    let chat = "endpoint = \"http://localhost:1/v1\"\nmodel = \"m\"\n";
    let cases: &[(&str, &str, &[&str])] = &[
        ("sets = [\"own\"]", "sets = [\"onw\"]", &["`evaluate.judge.2`", "`onw`", "no set", "Did you mean `own`?"]),
        ("sets = [\"own\"]", "sets = [\"zzz\"]", &["`zzz`", "There are `helpful`, `own`."]),
        ("against = \"mix-0.5\"", "against = \"mix\"", &["`against`", "no policy that is known before training"]),
        ("name = \"own\"", "name = \"helpful\"", &["`evaluate.prompts.2`", "Another set", "`helpful`"]),
        ("name = \"own\"", "name = \"a/b\"", &["set's name", "cannot name a folder"]),
        ("name = \"own\"\n", "", &["lacks `evaluate.prompts.2.name`"]),
        ("prompts = [\"One?\", \"Two?\"]", "", &["`evaluate.prompts.2`", "no prompts"]),
        ("prompts = [\"One?\", \"Two?\"]", "prompts = [\"One?\"]\nfile = \"f\"", &["both `file` and `prompts`"]),
        ("prompts = [\"One?\", \"Two?\"]", "promts = [\"One?\"]", &["`evaluate.prompts.2.promts`", "`prompts`"]),
        ("name = \"sft\"", "name = \"mix-0.5\"", &["`evaluate.policy.1`", "Another policy is called `mix-0.5`"]),
        ("name = \"sft\"", "name = \"theirs\"", &["`evaluate.policy.2`", "`theirs`"]),
        ("name = \"sft\"", "name = \"base\"", &["`base` is taken"]),
        ("0.25)\"", "x)\"", &["`evaluate.policy.1`", "q a number"]),
        ("answers = \"theirs.jsonl\"", "", &["`evaluate.policy.2`", "`model`", "`answers`"]),
        ("answers = \"theirs.jsonl\"", "answers = \"x\"\nmodel = \"y\"", &["both `model` and `answers`"]),
        ("metric = \"safe\"", "metric = \"own/safe\"", &["metric's name"]),
        ("rubric = \"harmlessness\"\n", "", &["lacks `evaluate.judge.2.rubric`"]),
        ("rubric = \"harmlessness\"", "rubric = \"humour\"", &["\"helpfulness\" or \"harmlessness\""]),
        ("endpoint = \"http://localhost:1/v1\"\n", "", &["`evaluate.judge.2.model`", "Give `endpoint` too"]),
        ("model = \"m\"\n", "", &["lacks `evaluate.judge.2.model`"]),
        (
            "metric = \"helpfulness\"\n[[evaluate.judge]]",
            "metric = \"wit\"\n[[evaluate.judge]]",
            &["Nobody judges `wit`", "[[judge]]"],
        ),
        ("metric = \"safe\"\n", "metric = \"helpfulness\"\n", &["`evaluate.judge.2`", "`own-helpfulness`", "`rubric`"]),
        ("input_price = 1\n", "", &["both `input_price` and `output_price`"]),
        ("input_price = 1\noutput_price = 2\n", "", &["`max_cost` needs"]),
        ("concurrency = 7", "concurrency = 5000", &["1024"]),
        ("repeats = 2", "repeats = 0", &["`evaluate.judge.2.repeats`", "from 1"]),
        ("top_p = 0.9", "top_p = 0", &["`evaluate.top_p`", "greater than 0"]),
        ("temperature = 0.7", "temperature = -1", &["`evaluate.temperature`"]),
        ("stop = [\"USER:\"]", "stop = [\"\"]", &["`evaluate.stop`"]),
    ];
    for (from, to, parts) in cases {
        assert!(WHOLE.contains(from), "{from}");
        refused(&[CHAIN, &WHOLE.replacen(from, to, 1)], parts);
    }
    let judge = format!("[[evaluate.judge]]\nmetric = \"helpfulness\"\n{chat}");
    refused(&[CHAIN, &judge], &["no answers to judge", "[[evaluate.prompts]]"]);
    refused(&[CHAIN, "[evaluate]\nprompts = [\"a\", {}]\n"], &["`evaluate.prompts`", "`[[evaluate.prompts]]`"]);
}

/// The message of the error that the text must give says all of `expected`.
fn refused(parts: &[&str], expected: &[&str]) {
    let text = parts.concat();
    let error = parse(&[&text]).expect_err(&text);
    assert_eq!(error.exit_code(), 2, "{error}");
    let message = error.to_string();
    assert!(!message.contains('\n') && message.ends_with(['.', '?']), "not a paragraph: {message:?}");
    for part in expected {
        assert!(message.contains(part), "{message:?} lacks {part:?}\n{text}");
    }
}
