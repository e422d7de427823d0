//! Recipes: what is read, what is planned, and how every mistake is named.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

use align::data::{LongPrompts, TemplateTail};
use engine::optim::Schedule;
use proptest::prelude::*;
use sacpo::recipe::{PromptSource, Recipe, Temperature};

const WHOLE: &str = r#"
[model]
base = "models/base"
[run]
out = "runs/x"
seed = 7
threads = 2
memory_gib = 3.5
[data]
max_length = 320
validation_fraction = 0.2
max_pairs = 1000
long_prompts = "drop"
skip_bad_rows = true
template_tail = "keep"
[train]
learning_rate = 1e-5
epochs = 3
batch_size = 4
schedule = "linear"
warmup_ratio = 0.0
weight_decay = 0.01
max_grad_norm = 2
micro_batch_tokens = 4096
save_every = 5
[[step]]
name = "helpful"
metric = "helpfulness"
objective = "dpo"
label_smoothing = 0.1
beta = 0.1
data = "h.jsonl"
format = "hh"
[[step]]
metric = "harmlessness"
beta_over_lambda = [0.1, 0.05]
data = "s.jsonl"
epochs = 1
long_prompts = "error"
[evaluate]
prompts = ["a", "b"]
max_new_tokens = 9
"#;

const SMALL: &str = r#"
model.base = "base"
[[step]]
metric = "helpfulness"
beta = 1
data = "h.jsonl"
"#;

fn parse(text: &str, overrides: &[&str]) -> engine::Result<Recipe> {
    let overrides: Vec<String> = overrides.iter().map(|o| o.to_string()).collect();
    Recipe::parse(text, Path::new("some/recipe.toml"), &overrides)
}

/// The message of the error that `text` must give.
fn message(text: &str, overrides: &[&str]) -> String {
    let error = parse(text, overrides).expect_err(text);
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

#[test]
fn every_key_arrives_where_it_belongs() {
    let recipe = parse(WHOLE, &[]).unwrap();
    assert_eq!(recipe.model.base, "models/base".into());
    let run = &recipe.run;
    assert_eq!(
        (run.out.as_path(), run.seed, run.threads, run.memory_gib),
        (Path::new("runs/x"), 7, Some(2), Some(3.5))
    );
    let [helpful, harmless] = recipe.steps.as_slice() else { panic!("{:?}", recipe.steps) };
    let data = &helpful.data_options;
    assert_eq!((data.max_length, data.validation_fraction, data.max_pairs), (320, 0.2, Some(1000)));
    assert_eq!((data.long_prompts, data.skip_bad_rows), (LongPrompts::Drop, true));
    assert_eq!(data.template_tail, TemplateTail::Keep);
    let train = &helpful.train;
    assert_eq!((train.learning_rate, train.epochs, train.batch_size), (1e-5, 3, 4));
    assert_eq!((train.schedule, train.warmup_ratio, train.weight_decay), (Schedule::Linear, 0.0, 0.01));
    assert_eq!((train.max_grad_norm, train.micro_batch_tokens), (2.0, Some(4096)));
    assert_eq!(train.save_every, 5);
    assert_eq!((helpful.name.as_str(), helpful.parameters.label_smoothing), ("helpful", Some(0.1)));
    assert_eq!(helpful.temperature, Temperature::Beta(vec![0.1]));
    assert_eq!((harmless.name.as_str(), harmless.format), ("harmlessness", None));
    assert_eq!(harmless.temperature, Temperature::BetaOverLambda(vec![0.1, 0.05]));
    assert_eq!(
        (harmless.train.epochs, harmless.train.batch_size),
        (1, 4),
        "a step overrides the key that it sets alone"
    );
    assert_eq!((harmless.data_options.long_prompts, harmless.data_options.max_length), (LongPrompts::Error, 320));
    assert_eq!((recipe.evaluate.prompts.len(), recipe.evaluate.max_new_tokens), (1, 9));
}

#[test]
fn the_resolved_recipe_is_a_recipe() {
    for text in [WHOLE, SMALL] {
        let recipe = parse(text, &[]).unwrap();
        let written = recipe.to_toml().unwrap();
        let again =
            Recipe::parse(&written, Path::new("elsewhere.toml"), &[]).unwrap_or_else(|e| panic!("{e}\n{written}"));
        assert_eq!(again, recipe, "{written}");
    }
}

#[test]
fn defaults_fill_a_small_recipe() {
    let recipe = parse(SMALL, &[]).unwrap();
    assert_eq!(recipe.run.out, PathBuf::from("runs/recipe"), "named after the file");
    assert_eq!(recipe.steps[0].name, "helpfulness");
    assert_eq!(recipe.steps[0].temperature, Temperature::Beta(vec![1.0]), "a whole number is a number");
    assert!(recipe.evaluate.prompts.is_empty());
}

/// The plan as `name < parent @ temperature`.
fn planned(text: &str) -> Vec<String> {
    let plan = parse(text, &[]).unwrap().plan().steps;
    let parent = |i: Option<usize>| i.map_or("base", |i| plan[i].name.as_str());
    plan.iter().map(|p| format!("{} < {} @ {}", p.name, parent(p.parent), p.beta)).collect()
}

#[test]
fn sweeps_expand_into_policies_with_parents() {
    assert_eq!(
        planned(WHOLE),
        ["helpful < base @ 0.1", "harmlessness-0.1 < helpful @ 0.1", "harmlessness-0.05 < helpful @ 0.05"]
    );
    let third = "[[step]]\nmetric = \"honesty\"\nbeta_over_lambda = 1e-9\ndata = \"t\"\n";
    assert_eq!(
        planned(&format!("{WHOLE}{third}"))[3..],
        [
            "harmlessness-0.1-honesty-1e-9 < harmlessness-0.1 @ 0.000000001",
            "harmlessness-0.05-honesty-1e-9 < harmlessness-0.05 @ 0.000000001"
        ]
    );
    let plan = parse(WHOLE, &[]).unwrap().plan().steps;
    assert_eq!(plan.iter().map(|p| p.beta_over_lambda()).collect::<Vec<_>>(), [None, Some(0.1), Some(0.05)]);
    assert_eq!(plan.iter().map(|p| p.step).collect::<Vec<_>>(), [0, 1, 1]);
}

#[test]
fn overrides_replace_and_add() {
    let recipe = parse(
        SMALL,
        &[
            "step.1.beta=0.05",
            "train.epochs = 2",
            "run.out=runs/a=b",
            "step.1.name=\"7\"",
            "evaluate.prompts=['x']",
            "train.epochs=5",
        ],
    )
    .unwrap();
    assert_eq!(recipe.steps[0].temperature, Temperature::Beta(vec![0.05]));
    assert_eq!(recipe.steps[0].train.epochs, 5, "the last one wins, in a section that the file lacks");
    assert_eq!(recipe.run.out, PathBuf::from("runs/a=b"), "text needs no quotes and may hold an equals sign");
    assert_eq!(recipe.steps[0].name, "7");
    assert_eq!(recipe.evaluate.prompts[0].source, PromptSource::Texts(vec!["x".into()]));
}

#[test]
fn wrong_overrides_are_named() {
    for (setting, parts) in [
        ("train.epochs", &["--set train.epochs", "no `=`"][..]),
        ("=3", &["--set =3", "no place"]),
        ("train..epochs=3", &["--set train..epochs=3", "no place"]),
        ("model.base.x=3", &["no place"]),
        ("step.2.beta=1", &["names no `step`", "has 1"]),
        ("step.0.beta=1", &["names no `step`"]),
        ("step.beta=1", &["names no `step`"]),
        ("step.1=1", &["names no `step`"]),
        ("trian.epochs=1", &["unknown key `trian`", "--set trian.epochs=1", "`train`"]),
        ("step.1.betta=1", &["unknown key `step.1.betta`", "--set step.1.betta=1", "`beta`"]),
        ("train.epochs=many", &["`train.epochs`", "--set train.epochs=many", "the text \"many\""]),
        ("train.epochs=1\nbatch_size=0", &["`train.epochs`", "the text"]),
        ("step=3", &["`step`", "[[step]]"]),
        (&format!("{}=1", "a.".repeat(100_000)), &["no place"]),
        (&format!("{}b=1", "a.".repeat(100_000)), &["no place"]),
    ] {
        let message = message(SMALL, &[setting]);
        for part in parts {
            assert!(message.contains(part), "{setting}: {message:?} lacks {part:?}");
        }
    }
}

#[test]
fn wrong_recipes_are_named_with_key_and_line() {
    // (what stands in WHOLE, what replaces it, what the message must contain)
    let cases: &[(&str, &str, &[&str])] = &[
        ("seed = 7", "sed = 7", &["`run.sed`", "some/recipe.toml:6", "Did you mean `seed`?"]),
        ("[train]", "[trian]", &["`trian`", "recipe.toml:16", "`train`"]),
        ("beta = 0.1", "betta = 0.1", &["`step.1.betta`", "recipe.toml:31", "`beta`"]),
        ("out = \"runs/x\"", "epochs = 2", &["`run.epochs`", "belongs in `[train]`"]),
        ("epochs = 1\n", "zzz = 1\n", &["`step.2.zzz`", "recipe.toml:38", "`metric`", "`epochs`"]),
        ("seed = 7", "seed = -1", &["`run.seed`", "-1", "from 0"]),
        ("seed = 7", "seed = 99999999999999999999", &["99999999999999999999", "recipe.toml:6", "too large"]),
        ("threads = 2", "threads = 0", &["`run.threads`", "recipe.toml:7", "is 0", "from 1"]),
        ("memory_gib = 3.5", "memory_gib = 0", &["`run.memory_gib`", "greater than 0"]),
        ("max_length = 320", "max_length = 1", &["`data.max_length`", "recipe.toml:10", "from 2"]),
        ("max_length = 320", "max_length = 320.0", &["`data.max_length`", "is 320", "a whole number"]),
        ("validation_fraction = 0.2", "validation_fraction = 1.0", &["at least 0 and less than 1"]),
        ("validation_fraction = 0.2", "validation_fraction = nan", &["is NaN", "at least 0"]),
        ("max_pairs = 1000", "max_pairs = 0", &["`data.max_pairs`"]),
        ("max_pairs = 1000", "max_validation_pairs = 0", &["`data.max_validation_pairs`"]),
        ("long_prompts = \"drop\"", "long_prompts = \"cut\"", &["\"cut\"", "\"error\" or \"drop\""]),
        ("skip_bad_rows = true", "skip_bad_rows = 1", &["`data.skip_bad_rows`", "true or false"]),
        ("learning_rate = 1e-5", "learning_rate = 0.0", &["`train.learning_rate`", "greater than 0"]),
        ("learning_rate = 1e-5", "learning_rate = inf", &["`train.learning_rate`", "is inf"]),
        ("learning_rate = 1e-5", "learning_rate = 1e999", &["`train.learning_rate`"]),
        ("batch_size = 4", "batch_size = 0", &["`train.batch_size`", "is 0"]),
        ("batch_size = 4", "batch_size = \"4\"", &["the text \"4\"", "a whole number"]),
        ("batch_size = 4", "batch_size = 9000000000000000000", &["to 1000000000"]),
        ("schedule = \"linear\"", "schedule = \"step\"", &["\"cosine\" or \"linear\" or \"constant\""]),
        ("warmup_ratio = 0.0", "warmup_ratio = 1.5", &["at least 0 and at most 1"]),
        ("weight_decay = 0.01", "weight_decay = -0.1", &["`train.weight_decay`", "-0.1", "at least 0"]),
        ("name = \"helpful\"", "name = \"../x\"", &["\"../x\"", "`step.1`", "recipe.toml:26"]),
        ("name = \"helpful\"", "name = \"base\"", &["`base`", "untrained"]),
        ("name = \"helpful\"", "name = \"harmlessness-0.05\"", &["`step.2`", "Two policies", "`harmlessness-0.05`"]),
        ("metric = \"helpfulness\"", "metric = \" \"", &["`step.1.metric`", "not empty"]),
        ("metric = \"helpfulness\"\n", "", &["lacks `step.1.metric`", "recipe.toml:26"]),
        ("objective = \"dpo\"", "objective = \"ppo\"", &["`step.1.objective`", "\"dpo\""]),
        ("label_smoothing = 0.1", "label_smoothing = 0.5", &["less than 0.5"]),
        (
            "objective = \"dpo\"",
            "objective = \"kto\"",
            &["`step.1`", "`label_smoothing`", "`kto`", "no such parameter"],
        ),
        ("label_smoothing = 0.1", "desirable_weight = 2", &["`step.1`", "`desirable_weight`", "`dpo`"]),
        ("save_every = 5", "patience = 5", &["`train`", "`patience`", "`validate_every`"]),
        ("save_every = 5", "lora_rank = 0", &["`train.lora_rank`", "is 0"]),
        ("save_every = 5", "lora_targets = [\"lm_head\"]", &["`train`", "`lora_targets`", "lm_head", "q_proj"]),
        ("save_every = 5", "lora_alpha = 16", &["`train`", "`lora_alpha`", "Set `lora_rank`"]),
        ("save_every = 5", "lora_previous = \"stack\"", &["`train`", "`lora_previous`", "Set `lora_rank`"]),
        ("save_every = 5", "lora_rank = 4\nlora_dora = true\nlora_dropout = 0.1", &["DoRA", "dropout"]),
        ("epochs = 1\n", "epochs = 1\nlora_rank = 4\nlora_previous = \"stack\"\n", &["`step.2`", "there is none"]),
        ("save_every = 5", "ema_decay = 1", &["`train.ema_decay`", "less than 1"]),
        ("save_every = 5", "optimizer = \"adam\"", &["\"adamw\" or \"adamw-8bit\" or \"lion\" or \"muon\""]),
        ("beta = 0.1", "beta = 0", &["`step.1.beta`", "recipe.toml:31", "greater than 0"]),
        ("beta = 0.1", "beta = [0.1, 0.1]", &["`step.1.beta`", "the list [0.1, 0.1]", "different"]),
        ("beta = 0.1", "beta = 1979-05-27", &["the date 1979-05-27"]),
        ("beta = 0.1\n", "", &["lacks `step.1.beta`"]),
        ("beta = 0.1", "beta_over_lambda = 0.1", &["`step.1.beta_over_lambda`", "takes `beta`"]),
        ("beta_over_lambda = [0.1, 0.05]", "beta = 0.1", &["`step.2.beta`", "recipe.toml:36", "β/λ"]),
        ("beta_over_lambda = [0.1, 0.05]", "beta_over_lambda = []", &["an empty list"]),
        ("beta_over_lambda = [0.1, 0.05]", "beta_over_lambda = [0.1, -1]", &["[0.1, -1]", "greater than 0"]),
        ("beta_over_lambda = [0.1, 0.05]", "beta_over_lambda = [0.1, 0.1]", &["different"]),
        ("beta_over_lambda = [0.1, 0.05]", "beta_over_lambda = [nan]", &["[NaN]"]),
        ("data = \"h.jsonl\"\n", "", &["lacks `step.1.data`"]),
        ("format = \"hh\"", "format = \"hf\"", &["\"trl\" or \"pku\" or \"hh\" or \"unpaired\""]),
        ("base = \"models/base\"", "", &["lacks `model.base`", "recipe.toml:2"]),
        ("[model]\nbase = \"models/base\"", "", &["lacks `model.base`"]),
        ("[model]", "[[model]]", &["`model`", "`[model]`"]),
        ("prompts = [\"a\", \"b\"]", "prompts = [\"a\", \"\"]", &["`evaluate.prompts`", "none of them empty"]),
        ("prompts = [\"a\", \"b\"]", "prompts = \"a\"", &["`evaluate.prompts`", "a list"]),
        ("max_new_tokens = 9", "max_new_tokens = 0", &["`evaluate.max_new_tokens`"]),
        ("epochs = 3", "epochs = = 3", &["recipe.toml:18", "not valid TOML"]),
        ("epochs = 3", "epochs = 3\nepochs = 4", &["recipe.toml:19", "not valid TOML"]),
    ];
    for (from, to, parts) in cases {
        assert!(WHOLE.contains(from), "{from}");
        let message = message(&WHOLE.replacen(from, to, 1), &[]);
        for part in *parts {
            assert!(message.contains(part), "{from} -> {to}: {message:?} lacks {part:?}");
        }
        assert!(!message.contains('\n') && message.ends_with(['.', '?']), "not a paragraph: {message:?}");
    }
    assert!(message("model.base = 'x'", &[]).contains("no step"));
    assert!(message("", &[]).contains("lacks `model.base`"));
    assert!(message("[step]\nbeta = 1", &[]).contains("`[[step]]` with two pairs"));
    assert!(message("step = [1]", &[]).contains("`[[step]]`"));
    assert!(message("beta = 1", &[]).contains("belongs in `[[step]]`"));
}

#[test]
fn sweeps_that_multiply_beyond_reason_are_refused() {
    let values: Vec<String> = (1..=40).map(|i| i.to_string()).collect();
    let step =
        |i: usize| format!("[[step]]\nmetric = \"m{i}\"\nbeta_over_lambda = [{}]\ndata = \"d\"\n", values.join(", "));
    let recipe = (0..20).fold(SMALL.to_string(), |text, i| text + &step(i));
    let message = message(&recipe, &[]);
    assert!(message.contains("`step.3`") && message.contains("1641 policies"), "{message}");
}

#[test]
fn files_that_are_no_recipes() {
    for deep in ["a.".repeat(100_000) + "b = 1", "a = ".to_string() + &"[".repeat(100_000)] {
        assert!(message(&deep, &[]).contains("recipe.toml:1"));
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.toml");
    let missing = Recipe::load(&path, &[]).unwrap_err();
    assert!(missing.to_string().contains("r.toml") && missing.exit_code() == 2, "{missing}");
    std::fs::write(&path, b"[model]\nbase = \"\xff\"").unwrap();
    let message = Recipe::load(&path, &[]).unwrap_err().to_string();
    assert!(message.contains("r.toml:2") && message.contains("UTF-8"), "{message}");
    std::fs::write(&path, SMALL).unwrap();
    assert_eq!(Recipe::load(&path, &[]).unwrap().run.out, PathBuf::from("runs/r"));
}

#[test]
fn committed_recipes_and_the_documented_one_are_valid() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut seen = 0;
    for entry in std::fs::read_dir(root.join("recipes")).unwrap() {
        let path = entry.unwrap().path();
        Recipe::load(&path, &[]).unwrap_or_else(|error| panic!("{error}"));
        seen += 1;
    }
    assert!(seen > 0);
    let docs = std::fs::read_to_string(root.join("docs/recipes.md")).unwrap();
    let example = docs.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let recipe = parse(example, &[]).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(recipe.steps[1].train.epochs, 2);
    let written = recipe.to_toml().unwrap() + WHOLE;
    for key in written.lines().filter_map(|line| line.split_once(" = ")).map(|(key, _)| key) {
        assert!(docs.contains(&format!("| `{key}` |")), "docs/recipes.md says nothing of `{key}`");
    }
    for line in parse(SMALL, &[]).unwrap().to_toml().unwrap().lines() {
        // every default that is a value of its own stands in its row
        let Some((key, value)) = line.split_once(" = ") else { continue };
        let rows = docs.lines().filter(|row| row.starts_with(&format!("| `{key}` |")));
        let of_row = |row: &'_ str| row.trim_end_matches([' ', '|']).rsplit("| ").next().unwrap().to_owned();
        let defaults: Vec<String> = rows.map(of_row).collect();
        let same = |default: &String| {
            let Some(default) = default.strip_prefix('`').and_then(|d| d.strip_suffix('`')) else { return true };
            default == value || default.parse::<f64>().is_ok_and(|d| value.parse() == Ok(d))
        };
        // sections may have keys of the same name
        assert!(defaults.iter().any(same), "docs/recipes.md gives `{key}` the default {defaults:?}, the code {value}");
    }
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(at in 0..WHOLE.len(), cut in 0usize..40, put in "[\\x00-\\x7f€]{0,6}") {
        let end = (at + cut).min(WHOLE.len());
        let _ = parse(&format!("{}{put}{}", &WHOLE[..at], &WHOLE[end..]), &[]);
    }

    #[test]
    fn no_override_makes_the_parser_panic(key in "(step|train|model|run)?[.0-9a-z]{0,8}", value in "\\PC{0,12}") {
        let _ = parse(SMALL, &[&format!("{key}={value}")]);
    }
}
