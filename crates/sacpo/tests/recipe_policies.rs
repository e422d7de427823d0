//! The policies that a recipe asks for beside a plain chain: other starts, merges, mixtures, judges and constraints.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;

use align::merge::Method;
use align::world::Metric;
use sacpo::recipe::{JudgeSource, Realise, Recipe, Temperature};

/// Two steps, the second a sweep.
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
"#;

/// A safe policy from the base model, at the end of [`CHAIN`].
const ALONE: &str = r#"
[[step]]
name = "alone"
metric = "harmlessness"
from = "base"
beta = 0.05
data = "s"
"#;

const JUDGE: &str = "[[judge]]\nmetric = \"harmlessness\"\npolicy = \"alone\"\n";

fn parse(text: &str) -> engine::Result<Recipe> {
    Recipe::parse(text, Path::new("recipe.toml"), &[])
}

fn read(parts: &[&str]) -> Recipe {
    let text = parts.concat();
    let recipe = parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let written = recipe.to_toml().unwrap();
    let again = parse(&written).unwrap_or_else(|error| panic!("{error}\n{written}"));
    assert_eq!(again, Recipe { run: again.run.clone(), ..recipe.clone() }, "{written}");
    recipe
}

/// The message of the error that the text must give, which says all of `expected`.
fn refused(parts: &[&str], expected: &[&str]) {
    let text = parts.concat();
    let error = parse(&text).expect_err(&text);
    assert_eq!(error.exit_code(), 2, "{error}");
    let message = error.to_string();
    assert!(!message.contains('\n') && message.ends_with(['.', '?']), "not a paragraph: {message:?}");
    for part in expected {
        assert!(message.contains(part), "{message:?} lacks {part:?}\n{text}");
    }
}

/// The trained policies as `name < parent @ temperature`.
fn trained(recipe: &Recipe) -> Vec<String> {
    let plan = recipe.plan().steps;
    let parent = |i: Option<usize>| i.map_or("base", |i| plan[i].name.as_str());
    plan.iter().map(|p| format!("{} < {} @ {}", p.name, parent(p.parent), p.beta)).collect()
}

/// The others as `name: from .. to`.
fn between(recipe: &Recipe) -> Vec<String> {
    let plan = recipe.plan();
    let name = |i: Option<usize>| i.map_or("base", |i| plan.steps[i].name.as_str());
    plan.blends.iter().map(|b| format!("{}: {} .. {}", b.name, name(b.ends[0]), name(b.ends[1]))).collect()
}

#[test]
fn steps_start_where_they_say() {
    // the naive safe policy, and the order swapped with the βs swapped
    let swapped =
        "[[step]]\nname = \"last\"\nmetric = \"helpfulness\"\nfrom = \"alone\"\nbeta_over_lambda = 0.1\ndata = \"h\"\n";
    let recipe = read(&[CHAIN, ALONE, swapped]);
    assert_eq!(
        trained(&recipe),
        [
            "helpfulness < base @ 0.1",
            "harmlessness-0.1 < helpfulness @ 0.1",
            "harmlessness-0.025 < helpfulness @ 0.025",
            "alone < base @ 0.05",
            "last-0.1 < alone @ 0.1",
        ]
    );
    assert_eq!(
        (recipe.steps[1].from.step, recipe.steps[2].from.step, recipe.steps[3].from.step),
        (Some(0), None, Some(2))
    );
    // several β make several policies, and what starts from them too
    let sweep = CHAIN.replace("beta = 0.1\n", "beta = [0.1, 1]\n").replace("[0.1, 0.025]", "0.5");
    let recipe = read(&[&sweep]);
    assert_eq!(recipe.steps[0].temperature, Temperature::Beta(vec![0.1, 1.0]));
    assert_eq!(
        trained(&recipe),
        [
            "helpfulness-0.1 < base @ 0.1",
            "helpfulness-1 < base @ 1",
            "helpfulness-0.1-harmlessness-0.5 < helpfulness-0.1 @ 0.5",
            "helpfulness-1-harmlessness-0.5 < helpfulness-1 @ 0.5",
        ]
    );
}

#[test]
fn starts_that_are_none_are_named() {
    let from =
        |from: &str| ALONE.replace("\"base\"", &format!("{from:?}")).replace("beta = 0.05", "beta_over_lambda = 1");
    refused(
        &[CHAIN, &from("helpfulnes")],
        &["`step.3`", "recipe.toml:13", "no step above", "did you mean `helpfulness`?"],
    );
    refused(&[CHAIN, &from("alone")], &["`step.3`", "this very step"]);
    let later = CHAIN.replacen("beta = 0.1", "from = \"harmlessness\"\nbeta_over_lambda = 1", 1);
    refused(&[&later], &["`step.1`", "no step above"]);
    refused(&[CHAIN, &ALONE.replace("\"alone\"", "\"harmlessness\"")], &["`step.3`", "`harmlessness`", "step 2 too"]);
    refused(
        &[CHAIN, &ALONE.replace("beta = 0.05", "beta_over_lambda = 1")],
        &["`step.3.beta_over_lambda`", "takes `beta`"],
    );
    refused(&[CHAIN, &from("helpfulness").replace("beta_over_lambda = 1\n", "")], &["lacks `step.3.beta_over_lambda`"]);
}

#[test]
fn merges_and_mixtures_lie_between_policies() {
    let blends = "[merge]\nq = [0.25, 0.5]\n[mix]\nq = 0.75\n";
    let recipe = read(&[CHAIN, blends]);
    assert_eq!(
        between(&recipe),
        [
            "merge-0.25: helpfulness .. harmlessness-0.025",
            "merge-0.5: helpfulness .. harmlessness-0.025",
            "mix-0.75: helpfulness .. harmlessness-0.025",
        ]
    );
    assert_eq!(recipe.merges[0].merging.unwrap().method, Method::Linear);
    assert!(recipe.mixes[0].merging.is_none());
    // naive merging, and other ways
    let naive = "[[merge]]\nname = \"naive\"\nq = 0.5\nfrom = \"helpfulness\"\nto = \"alone\"\n\
                 [[merge]]\nname = \"ties\"\nq = 1.5\nextrapolate = true\nmethod = \"ties\"\ndensity = 0.2\nfrom = \"base\"\nto = \"harmlessness-0.1\"\n\
                 [[merge]]\nname = \"strongest\"\nq = 0.5\nto = \"harmlessness\"\n";
    let recipe = read(&[CHAIN, ALONE, naive]);
    assert_eq!(
        between(&recipe),
        [
            "naive-0.5: helpfulness .. alone",
            "ties-1.5: base .. harmlessness-0.1",
            "strongest-0.5: helpfulness .. harmlessness-0.025",
        ]
    );
    // what the last step starts from is the base model
    assert_eq!(between(&read(&[CHAIN, ALONE, "[mix]\nq = 0.5\n"])), ["mix-0.5: base .. alone"]);
}

#[test]
fn merges_that_cannot_be_are_named() {
    for (merge, expected) in [
        ("", &["lacks `merge.q`", "[0.25, 0.5, 0.75]"][..]),
        ("q = 1.5", &["`merge`", "recipe.toml:12", "1.5", "`extrapolate = true`"]),
        ("q = [0.5, -0.1]", &["-0.1", "`extrapolate = true`"]),
        ("q = [0.5, 0.5]", &["`merge.q`", "different"]),
        ("q = 0.5\nto = \"harmlesness\"", &["`to`", "no policy and no step", "Did you mean `harmlessness`?"]),
        ("q = 0.5\nfrom = \"harmlessness-0.1\"\nto = \"harmlessness-0.1\"", &["both `harmlessness-0.1`"]),
        ("q = 0.5\nto = \"base\"", &["`to` is the base model", "`from` must be given"]),
        ("q = 0.5\nmethod = \"ties\"", &["`ties`", "`density"]),
        ("q = 0.5\ndensity = 0.5", &["`linear` keeps everything"]),
        ("q = 0.5\nmethod = \"soup\"", &["`merge.method`", "\"linear\" or \"slerp\""]),
        ("q = 0.5\nname = \"a/b\"", &["the merge's name", "a/b"]),
        ("q = 0.5\nname = \"x\"\ndata = \"h\"", &["`merge.data`", "belongs in `[[step]]`"]),
    ] {
        let expected: Vec<&str> =
            expected.iter().map(|part| if *part == "the merge's name" { "merge's name" } else { part }).collect();
        refused(&[CHAIN, "[merge]\n", merge], &expected);
    }
    refused(&[CHAIN, "[mix]\nq = 0.5\nmethod = \"linear\"\n"], &["`mix.method`", "belongs in `[merge]`"]);
    refused(&[CHAIN, "[[merge]]\nq = 0.5\n[[merge]]\nq = 0.5\n"], &["`merge.2`", "Two policies", "`merge-0.5`"]);
    refused(
        &[CHAIN, "[merge]\nname = \"harmlessness\"\nq = 0.1\n"],
        &["`merge`", "Two policies", "`harmlessness-0.1`"],
    );
    let sweep = CHAIN.replace("beta = 0.1\n", "beta = [0.1, 1]\n");
    refused(&[&sweep, "[merge]\nq = 0.5\n"], &["starts from several policies", "`helpfulness-0.1-harmlessness-0.1`"]);
}

#[test]
fn labels_and_margins_come_from_judges() {
    let pecan = "[[step]]\nname = \"joint\"\nmetric = \"both\"\nfrom = \"base\"\nbeta = 0.1\ndata = \"h\"\n\
                 relabel = { helpfulness = 1.0, harmlessness = 0.5 }\n";
    let modpo = "[[step]]\nname = \"modpo\"\nmetric = \"harmlessness\"\nfrom = \"base\"\nbeta = 0.1\ndata = \"s\"\n\
                 objective = \"modpo\"\nmargin = { helpfulness = 1 }\n";
    let judges = "[[judge]]\nmetric = \"helpfulness\"\npolicy = \"helpfulness\"\n";
    let recipe = read(&[CHAIN, ALONE, pecan, modpo, JUDGE, judges]);
    assert_eq!(recipe.steps[3].relabel.as_ref().unwrap()["harmlessness"], 0.5);
    assert_eq!(recipe.steps[4].margin.as_ref().unwrap()["helpfulness"], 1.0);
    let JudgeSource::Policy(policy) = &recipe.judge("harmlessness").unwrap().source else { panic!() };
    assert_eq!((policy.name.as_str(), policy.planned), ("alone", Some(3)));
    let world = read(&[CHAIN, "[[judge]]\nmetric = \"helpfulness\"\nquickstart = \"reward\"\n"]);
    assert_eq!(world.judge("helpfulness").unwrap().source, JudgeSource::Quickstart(Metric::Reward));

    let cost = read(&[CHAIN, "[[judge]]\nmetric = \"harmlessness\"\ncost_model = \"runs/cost\"\n"]);
    assert_eq!(
        cost.judge("harmlessness").unwrap().source,
        JudgeSource::Model("runs/cost".into(), align::objective::ScoreLoss::Cost)
    );
    refused(&[CHAIN, ALONE, pecan, JUDGE], &["`step.4`", "`helpfulness` has no judge", "[[judge]]"]);
    refused(&[CHAIN, pecan, ALONE, JUDGE, judges], &["`step.3`", "`alone`", "not trained before this step"]);
    refused(
        &[CHAIN, ALONE, &pecan.replace("relabel", "objective = \"kto\"\nrelabel"), JUDGE, judges],
        &["`kto` takes single responses"],
    );
    refused(
        &[CHAIN, ALONE, &modpo.replace("modpo\"\nmargin", "dpo\"\nmargin"), JUDGE, judges],
        &["`margin` is for", "`dpo`"],
    );
    refused(
        &[CHAIN, ALONE, &pecan.replace("0.5", "\"much\""), JUDGE, judges],
        &["`step.4.relabel`", "a table of metrics"],
    );
    refused(&[CHAIN, ALONE, JUDGE, JUDGE], &["`judge.2`", "another judge above"]);
    refused(
        &[CHAIN, ALONE, &modpo.replace("margin", "relabel = { helpfulness = 1 }\nmargin"), JUDGE, judges],
        &["both `relabel` and `margin`"],
    );
    // a weight can be set from the command line
    let text = [CHAIN, ALONE, pecan, JUDGE, judges].concat();
    let set = Recipe::parse(&text, Path::new("r"), &["step.4.relabel.harmlessness=2".into()]).unwrap();
    assert_eq!(set.steps[3].relabel.as_ref().unwrap()["harmlessness"], 2.0);

    // an implicit reward is one of the metric alone
    let judge = |metric: &str, policy: &str| format!("[[judge]]\nmetric = \"{metric}\"\npolicy = \"{policy}\"\n");
    refused(
        &[CHAIN, ALONE, &judge("harmlessness", "helpfulness")],
        &["was trained on `helpfulness`", "not on `harmlessness`"],
    );
    read(&[CHAIN, ALONE, &judge("implicit-help", "helpfulness")]);
    refused(&[CHAIN, ALONE, modpo, judges, &judge("harmlessness", "modpo")], &["`modpo`, whose margins"]);
    refused(&[CHAIN, ALONE, pecan, JUDGE, judges, &judge("both", "joint")], &["labels that were drawn anew"]);
    let simpo = ALONE.replace("beta = 0.05", "beta = 0.05\nobjective = \"simpo\"");
    refused(&[CHAIN, &simpo, JUDGE], &["`simpo`, which has no reference"]);
    for (source, expected) in [
        ("", &["who judges"][..]),
        ("policy = \"alone\"\nquickstart = \"safety\"\n", &["several of", "Keep one"]),
        ("reward_model = \"r\"\ncost_model = \"c\"\n", &["several of", "Keep one"]),
        ("cost_model = 3\n", &["cost_model", "text in quotes"]),
        ("policy = \"base\"\n", &["no judge"]),
        ("policy = \"alnoe\"\n", &["no policy and no step", "`alone`"]),
        ("quickstart = \"harm\"\n", &["\"reward\" or \"safety\""]),
    ] {
        refused(&[CHAIN, ALONE, "[[judge]]\nmetric = \"m\"\n", source], expected);
    }
}

#[test]
fn constraints_name_their_step_and_how_to_meet_them() {
    let constraint = "[constraint]\nmetric = \"harmlessness\"\nat_least = 0\n";
    let recipe = read(&[CHAIN, ALONE, JUDGE, constraint, "step = \"harmlessness\"\n"]);
    let [constraint_read] = recipe.constraints.as_slice() else { panic!("{:?}", recipe.constraints) };
    assert_eq!((constraint_read.step.index, constraint_read.at_least), (1, 0.0));
    let choice = constraint_read.choice.clone().unwrap();
    assert_eq!((choice.confidence, choice.realise, choice.answers, choice.shots), (0.95, Realise::Train, 64, 4));
    assert_eq!((choice.max_prompts, choice.max_new_tokens, choice.prompts), (200, 128, None));
    // the step of its metric is found, and need not have a sweep of its own
    let found = CHAIN.replace("beta_over_lambda = [0.1, 0.025]\n", "");
    let quickstart = "[[judge]]\nmetric = \"harmlessness\"\nquickstart = \"safety\"\n";
    let all = "realise = \"train\"\nconfidence = 0.9\nprompts = \"p\"\nheld_out_prompts = \"q\"\nmax_prompts = 5\nanswers = 17\nmax_new_tokens = 7\nshots = 1\n";
    let recipe = read(&[&found, quickstart, constraint, all]);
    assert_eq!(trained(&recipe), ["helpfulness < base @ 0.1"]);
    assert_eq!(recipe.constraints[0].choice.as_ref().unwrap().held_out_prompts, Some("q".into()));
    let set =
        Recipe::parse(&[CHAIN, quickstart, constraint].concat(), Path::new("r"), &["constraint.at_least=0.5".into()]);
    assert_eq!(set.unwrap().constraints[0].at_least, 0.5);

    // λ as a weight in labels: the step waits for it
    let joint = "[[step]]\nname = \"joint\"\nmetric = \"both\"\nfrom = \"base\"\nbeta = 0.1\ndata = \"h\"\nrelabel = { helpfulness = 1 }\n";
    let judges = "[[judge]]\nmetric = \"helpfulness\"\npolicy = \"helpfulness\"\n";
    let recipe = read(&[CHAIN, ALONE, joint, JUDGE, judges, constraint, "step = \"joint\"\n"]);
    assert!(recipe.constraints[0].weighs_labels(&recipe.steps));
    assert_eq!(trained(&recipe).len(), 4);

    // several: a chain in the order of its steps
    let third = "[[step]]\nname = \"third\"\nmetric = \"honesty\"\nfrom = \"harmlessness\"\ndata = \"t\"\n";
    let honest = "[[judge]]\nmetric = \"honesty\"\nquickstart = \"reward\"\n";
    let several = |first: &str, second: &str| {
        let table = |metric: &str| format!("[[constraint]]\nmetric = \"{metric}\"\nat_least = 0\n");
        table(first) + &table(second)
    };
    let recipe = read(&[&found, third, quickstart, honest, &several("harmlessness", "honesty")]);
    assert_eq!(recipe.constraints.iter().map(|c| c.step.index).collect::<Vec<_>>(), [1, 2]);
    assert!(recipe.constraints[1].choice.is_none());
    refused(&[&found, third, quickstart, honest, &several("honesty", "harmlessness")], &["`constraint.2`", "a chain"]);
    refused(&[&found, third, quickstart, honest, &several("honesty", "honesty")], &["constrained twice"]);
    refused(
        &[&found, third, quickstart, honest, &several("harmlessness", "honesty"), "shots = 2\n"],
        &["`constraint.2.shots`", "the first of them"],
    );
    let mixed = several("harmlessness", "honesty").replacen("at_least = 0\n", "at_least = 0\nrealise = \"mix\"\n", 1);
    refused(&[&found, third, quickstart, honest, &mixed], &["`harmlessness` has no policy to mix"]);
    refused(&[CHAIN, third, quickstart, honest, &mixed], &["realise one constraint"]);
}

#[test]
fn constraints_that_cannot_be_met_by_a_recipe_are_named() {
    let constraint = "[constraint]\nmetric = \"harmlessness\"\nat_least = 0\n";
    let quickstart = "[[judge]]\nmetric = \"harmlessness\"\nquickstart = \"safety\"\n";
    let with = |more: &str, expected: &[&str]| refused(&[CHAIN, quickstart, constraint, more], expected);
    with("confidence = 1\n", &["`constraint.confidence`", "at least 0.5 and at most 0.999"]);
    with("realise = \"pray\"\n", &["\"train\" or \"mix\" or \"merge\""]);
    with("answers = 0\n", &["`constraint.answers`"]);
    with("max_prompts = 1\n", &["`constraint.max_prompts`", "from 2"]);
    with("step = \"nowhere\"\n", &["no step of this recipe"]);
    with("step = \"helpfulness\"\n", &["starts from the base model and has no λ"]);
    with("threshold = 0\n", &["`constraint.threshold`", "unknown key"]);
    refused(&[CHAIN, constraint], &["`harmlessness` has no judge"]);
    refused(&[CHAIN, quickstart, "[constraint]\nmetric = \"harmlessness\"\n"], &["lacks `constraint.at_least`"]);
    refused(
        &[CHAIN, quickstart, &constraint.replace("harmlessness", "honesty")],
        &["No step has the metric `honesty`"],
    );
    let sweep = CHAIN.replace("beta = 0.1\n", "beta = [0.1, 1]\n");
    refused(&[&sweep, quickstart, constraint], &["the 2 policies of `helpfulness`", "one temperature"]);
    let joint = "[[step]]\nname = \"joint\"\nmetric = \"both\"\nfrom = \"base\"\nbeta = 0.1\ndata = \"h\"\nrelabel = { harmlessness = 1 }\n";
    refused(
        &[CHAIN, joint, quickstart, constraint, "step = \"joint\"\n"],
        &["cannot be given a weight in `relabel` as well"],
    );
    let open = CHAIN.replace("beta_over_lambda = [0.1, 0.025]\n", "");
    let third = "[[step]]\nmetric = \"honesty\"\nbeta_over_lambda = 1\ndata = \"t\"\n";
    refused(&[&open, third, quickstart, constraint], &["`step.3`", "no policy before its λ is chosen"]);
    let both =
        "[[constraint]]\nmetric = \"harmlessness\"\nat_least = 0\n[[constraint]]\nmetric = \"honesty\"\nat_least = 0\n";
    let honest = "[[judge]]\nmetric = \"honesty\"\nquickstart = \"reward\"\n";
    refused(&[&open, third, quickstart, honest, both], &["`step.3`", "its own `beta_over_lambda` makes none"]);
    refused(
        &[&open, quickstart, constraint, "[merge]\nq = 0.5\n"],
        &["`to` is the step `harmlessness`", "only a constraint"],
    );
    refused(&[&open, quickstart, constraint, "realise = \"merge\"\n"], &["has no policy to mix or merge with"]);
}
