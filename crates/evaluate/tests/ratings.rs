//! Ratings against Python's, against theory, and at their edges.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use evaluate::rating::{Elo, MetricRatings, Options, Ratings, WinRate, markdown, rate};
use evaluate::verdict::Verdict;
use serde_json::Value;

fn options(baseline: Option<&str>) -> Options {
    Options { baseline: baseline.map(str::to_owned), tail: 0.1, benign: Vec::new(), elo: Elo::Online, seed: 0 }
}

fn verdict(prompt: impl ToString, a: &str, b: &str, outcome: impl Into<Option<f64>>) -> Verdict {
    Verdict { prompt: prompt.to_string(), a: a.into(), b: b.into(), outcome: outcome.into(), ..Verdict::default() }
}

/// The ratings of verdicts on one metric.
fn rated(verdicts: &[Verdict], options: &Options) -> MetricRatings {
    match rate(verdicts, options).unwrap() {
        Ratings::One(ratings) => *ratings,
        Ratings::Several { .. } => panic!("several metrics"),
    }
}

fn message(verdicts: &[Verdict], options: &Options) -> String {
    rate(verdicts, options).unwrap_err().to_string()
}

fn near(found: f64, expected: f64, tolerance: f64, what: &str) {
    assert!((found - expected).abs() <= tolerance, "{what}: {found} instead of {expected}");
}

/// Simulated verdicts and what statsmodels makes of them.
fn fixture() -> (Vec<Verdict>, Value) {
    let fixture: Value = serde_json::from_str(include_str!("fixtures/ratings.json")).unwrap();
    let number = |value: &Value| value.as_f64().unwrap();
    let verdict = |row: &Value| Verdict {
        lengths: Some([&row[4], &row[5]].map(|length| number(length) as usize)),
        scores: Some([&row[6], &row[7]].map(number)),
        ..verdict(&row[0], row[1].as_str().unwrap(), row[2].as_str().unwrap(), row[3].as_f64())
    };
    let verdicts = fixture["verdicts"].as_array().unwrap().iter().map(verdict).collect();
    (verdicts, fixture["models"].clone())
}

#[test]
fn ratings_equal_those_of_statsmodels() {
    let (verdicts, expected) = fixture();
    let ratings = rated(&verdicts, &options(Some("base")));
    for (name, expected) in expected.as_object().unwrap() {
        let model = &ratings.models[name];
        let is = |found: f64, path: &str| {
            near(found, expected.pointer(path).unwrap().as_f64().unwrap(), 1e-7, &format!("{name}{path}"));
        };
        is(model.overall.win_rate.unwrap(), "/win_rate");
        is(model.overall.standard_error.unwrap(), "/standard_error");
        let controlled = model.length_controlled.unwrap();
        is(controlled.win_rate, "/length_controlled/win_rate");
        is(controlled.standard_error.unwrap(), "/length_controlled/standard_error");
        is(controlled.length_coefficient, "/length_controlled/length_coefficient");
        let strength = model.bradley_terry.unwrap();
        is(strength.rating, "/bradley_terry/rating");
        is(strength.standard_error.unwrap(), "/bradley_terry/standard_error");
        let scores = model.scores.unwrap();
        is(scores.mean, "/scores/mean");
        is(scores.tail_mean, "/scores/tail_mean");
    }
}

#[test]
fn the_papers_elo_is_what_its_authors_calculate() {
    let (verdicts, expected) = fixture();
    let ratings = rated(&verdicts, &Options { elo: Elo::Paper, ..options(Some("base")) });
    for (name, expected) in expected.as_object().unwrap() {
        let [mean, deviation] =
            ["/paper/elo", "/paper/elo_deviation"].map(|p| expected.pointer(p).unwrap().as_f64().unwrap());
        let found = ratings.models[name].elo.unwrap();
        // our mean is over 50 trials, theirs over 4,000
        near(found.elo, mean, 3.0 * deviation / 50f64.sqrt(), name);
        near(found.elo_deviation, deviation, 0.35 * deviation, name);
    }
    assert_eq!(ratings.models["base"].elo.unwrap().elo, 1000.0);
    // missing verdicts are ties there, and nothing here
    let missing = [verdict(1, "m", "base", 1.0), verdict(2, "m", "base", None), verdict(2, "m", "base", None)];
    let elo = |elo| rated(&missing, &Options { elo, ..options(None) }).models["m"].elo.unwrap();
    assert_eq!(elo(Elo::Online).elo_deviation, 0.0, "one verdict has one order");
    near(elo(Elo::Online).elo, 1032.0, 1e-9, "each moves by 16");
    assert!(elo(Elo::Paper).elo_deviation > 0.0);
}

/// A random number from 0 to 1 of a sequence, from its place: enough for simulations, and the same everywhere.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        // SplitMix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// In which share of `worlds` simulated sets of verdicts each interval holds the truth.
fn coverage<const N: usize>(worlds: u64, holds: impl Fn(&mut Random) -> [bool; N]) -> [f64; N] {
    let mut random = Random(0);
    let mut counts = [0.0; N];
    for _ in 0..worlds {
        counts.iter_mut().zip(holds(&mut random)).for_each(|(count, holds)| *count += f64::from(u8::from(holds)));
    }
    counts.map(|count| count / worlds as f64)
}

fn contains(interval: [f64; 2], truth: f64) -> bool {
    (interval[0]..=interval[1]).contains(&truth)
}

/// The verdicts with a prompt of its own for each: what is left of the intervals if clusters are ignored.
fn unclustered(verdicts: &[Verdict]) -> Vec<Verdict> {
    verdicts.iter().zip(0..).map(|(one, i)| Verdict { prompt: format!("{i}"), ..one.clone() }).collect()
}

#[test]
fn intervals_of_win_rates_hold_the_truth_in_95_of_100_cases() {
    // 60 prompts with a probability of winning of their own, uniform from 0.2 to 1, judged six times each
    let truth = 60.0;
    let [analytic, bootstrap, ignored] = coverage(250, |random| {
        let mut verdicts = Vec::new();
        for prompt in 0..60 {
            let win = 0.2 + 0.8 * random.uniform();
            for _ in 0..6 {
                verdicts.push(verdict(prompt, "m", "base", f64::from(u8::from(random.uniform() < win))));
            }
        }
        let win_rate = |verdicts: &[Verdict]| rated(verdicts, &options(None)).models["m"].overall;
        let WinRate { interval, bootstrap_interval, .. } = win_rate(&verdicts);
        let ignored = win_rate(&unclustered(&verdicts)).interval;
        [interval, bootstrap_interval, ignored].map(|interval| contains(interval.unwrap(), truth))
    });
    // ± three standard deviations of 250 draws, and a little for the bootstrap with 60 prompts
    assert!((0.91..=0.985).contains(&analytic), "{analytic}");
    assert!((0.90..=0.985).contains(&bootstrap), "{bootstrap}");
    assert!(ignored < 0.85, "the test would not see it if clusters were ignored: {ignored}");
}

#[test]
fn intervals_of_ratings_hold_the_truth_in_95_of_100_cases() {
    // three policies, equal on average, whose skill differs from prompt to prompt; all pairs in both orders
    let names = ["a", "b", "c"];
    let [analytic, bootstrap, ignored] = coverage(200, |random| {
        let mut verdicts = Vec::new();
        for prompt in 0..60 {
            let skill = [(); 3].map(|()| 6.0 * random.uniform());
            for (i, j) in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)] {
                let win = 1.0 / (1.0 + f64::exp(skill[j] - skill[i]));
                verdicts.push(verdict(prompt, names[i], names[j], f64::from(u8::from(random.uniform() < win))));
            }
        }
        let strength = |verdicts: &[Verdict]| rated(verdicts, &options(Some("a"))).models["b"].bradley_terry.unwrap();
        let (clustered, ignored) = (strength(&verdicts), strength(&unclustered(&verdicts)).interval.unwrap());
        [clustered.interval.unwrap(), clustered.bootstrap_interval, ignored].map(|ends| contains(ends, 1000.0))
    });
    assert!((0.91..=0.985).contains(&analytic), "{analytic}");
    assert!((0.90..=0.985).contains(&bootstrap), "{bootstrap}");
    assert!(ignored < 0.86, "the test would not see it if clusters were ignored: {ignored}");
}

#[test]
fn length_controlled_rates_hold_the_truth_in_95_of_100_cases() {
    // longer answers win more often; at equal length the policy wins 1 of 3, and prompts differ
    let truth = 100.0 / 3.0;
    let [interval] = coverage(300, |random| {
        let mut verdicts = Vec::new();
        for prompt in 0..80 {
            let length = 200 + (400.0 * random.uniform()) as usize;
            // so that the standard deviation is known: lengths of the other are 300
            let logit = f64::ln(0.5) + 2.0 * f64::tanh((length as f64 - 300.0) / (400.0 / 12f64.sqrt()));
            for _ in 0..2 {
                let won = random.uniform() < 1.0 / (1.0 + f64::exp(-logit));
                let lengths = Some([length, 300]);
                verdicts.push(Verdict { lengths, ..verdict(prompt, "m", "base", f64::from(u8::from(won))) });
            }
        }
        let controlled = rated(&verdicts, &options(None)).models["m"].length_controlled.unwrap();
        [contains(controlled.interval.unwrap(), truth)]
    });
    assert!((0.91..=0.985).contains(&interval), "{interval}");
}

#[test]
fn ties_count_half_and_missing_verdicts_nothing() {
    let outcomes = [Some(1.0), Some(0.5), None, Some(0.0), None, Some(0.75)];
    let verdicts: Vec<Verdict> = outcomes.iter().zip(0..).map(|(&one, i)| verdict(i, "m", "base", one)).collect();
    let ratings = rated(&verdicts, &options(None));
    let found = ratings.models["m"].overall;
    assert_eq!((found.win_rate, found.n, found.missing), (Some(56.25), 4, 2));
    assert_eq!((ratings.verdicts, ratings.prompts), (6, 6));
    // s/√n of 1, ½, 0, ¾
    near(found.standard_error.unwrap(), 100.0 * (0.546_875f64 / 3.0 / 4.0).sqrt(), 1e-12, "error");
    // the other way round it is the same verdict
    let turn = |one: &Verdict| verdict(&one.prompt, "base", "m", one.outcome.map(|outcome| 1.0 - outcome));
    let turned: Vec<Verdict> = verdicts.iter().map(turn).collect();
    let turned = rated(&turned, &options(Some("base")));
    assert_eq!((turned.models["m"].overall, turned.models["m"].elo), (found, ratings.models["m"].elo));
}

#[test]
fn orders_and_repeats_are_no_new_prompts() {
    let once: Vec<Verdict> = (0..40).map(|i| verdict(i, "m", "base", f64::from(u8::from(i % 3 > 0)))).collect();
    let thrice = [&*once, &*once, &*once].concat();
    let [once, thrice] = [once, thrice].map(|verdicts| rated(&verdicts, &options(None)).models["m"].clone());
    assert_eq!((once.overall.n, thrice.overall.n), (40, 120));
    near(thrice.overall.standard_error.unwrap(), once.overall.standard_error.unwrap(), 1e-12, "error");
    let [a, b] = [once, thrice].map(|model| model.bradley_terry.unwrap());
    near(a.standard_error.unwrap(), b.standard_error.unwrap(), 1e-7, "error of the rating");
    near(a.bootstrap_interval[0], b.bootstrap_interval[0], 1e-7, "bootstrap of the rating");
}

#[test]
fn who_the_baseline_is() {
    let of = |verdicts: &[Verdict]| rated(verdicts, &options(None)).baseline;
    let star = [verdict(1, "m", "base", 1.0), verdict(1, "base", "n", 1.0), verdict(2, "n", "base", 0.0)];
    assert_eq!(of(&star).as_deref(), Some("base"));
    assert_eq!(of(&star[1..]).as_deref(), Some("n"), "of two policies the first verdict's B");
    let all = [verdict(1, "m", "base", 1.0), verdict(1, "n", "base", 1.0), verdict(2, "n", "m", 0.0)];
    assert_eq!(of(&all), None);
    let ratings = rated(&all, &options(None));
    let rates = ["m", "n", "base"].map(|name| ratings.models[name].overall.win_rate.unwrap());
    assert_eq!(rates, [100.0, 50.0, 0.0], "against all others");
    assert!(ratings.models["m"].length_controlled.is_none());
    let named = rated(&all, &options(Some("m")));
    assert_eq!(
        named.models["m"].overall,
        WinRate {
            win_rate: Some(50.0),
            standard_error: Some(0.0),
            interval: Some([50.0; 2]),
            bootstrap_interval: Some([50.0; 2]),
            n: 0,
            missing: 0,
        }
    );
    assert_eq!(named.models["base"].overall.n, 1);
    let unknown = message(&all, &options(Some("sft")));
    assert!(unknown.contains("`sft`") && unknown.contains("`base`, `m`, `n`"), "{unknown}");
}

#[test]
fn ratings_that_do_not_exist_are_left_out_with_a_reason() {
    let note = |verdicts: &[Verdict]| {
        let ratings = rated(verdicts, &options(Some("base")));
        assert!(ratings.models.values().all(|model| model.bradley_terry.is_none()));
        let [note] = &*ratings.notes else { panic!("{:?}", ratings.notes) };
        note.clone()
    };
    let swept: Vec<Verdict> = (0..9).map(|i| verdict(i, "m", "base", 1.0)).collect();
    let found = note(&swept);
    assert!(found.contains("gives `base` anything against `m`"), "{found}");
    // m beats base and n beats m, each not always; nobody compares x and y with them
    let mut apart = vec![verdict(1, "m", "base", 1.0), verdict(2, "m", "base", 0.0), verdict(1, "x", "y", 0.5)];
    let found = note(&apart);
    assert!(found.contains("compares `base`, `m` with `x`, `y`"), "{found}");
    apart.push(verdict(3, "x", "m", 1.0));
    let found = note(&apart);
    assert!(found.contains("gives `base`, `m` anything against `x`, `y`"), "{found}");
    apart.push(verdict(4, "y", "base", 0.25));
    assert!(rated(&apart, &options(Some("base"))).notes.is_empty());
    let found = note(&[verdict(1, "m", "base", None)]);
    assert!(found.contains("No verdict was reached"), "{found}");
}

#[test]
fn a_policy_that_always_wins_has_an_interval_all_the_same() {
    let swept: Vec<Verdict> = (0..20).map(|i| verdict(i, "m", "base", 1.0)).collect();
    let found = rated(&swept, &options(None)).models["m"].overall;
    assert_eq!((found.win_rate, found.standard_error), (Some(100.0), Some(0.0)));
    let [low, high] = found.interval.unwrap();
    // Wilson's for 20 of 20, with t = 2.093
    near(low, 100.0 * 20.0 / (20.0 + 2.093_024_054f64.powi(2)), 1e-6, "lower end");
    near(high, 100.0, 1e-9, "upper end");
    let one = rated(&swept[..1], &options(None)).models["m"].overall;
    assert_eq!((one.standard_error, one.interval), (None, None), "one prompt tells no spread");
}

#[test]
fn lengths_that_determine_nothing_are_told() {
    let with = |outcome: f64, lengths: [usize; 2], i: usize| Verdict {
        lengths: Some(lengths),
        ..verdict(i, "m", "base", outcome)
    };
    let note = |verdicts: &[Verdict]| {
        let ratings = rated(verdicts, &options(None));
        assert!(ratings.models["m"].length_controlled.is_none());
        ratings.notes.concat()
    };
    let parted: Vec<Verdict> = (0..10).map(|i| with(f64::from(u8::from(i > 4)), [100 + i, 100], i)).collect();
    assert!(note(&parted).contains("parted by the lengths"), "{}", note(&parted));
    let same: Vec<Verdict> = (0..10).map(|i| with(f64::from(u8::from(i > 4)), [100, 90], i)).collect();
    assert!(note(&same).contains("same number of characters"), "{}", note(&same));
    let mut unknown = parted.clone();
    unknown.push(verdict(10, "m", "base", 0.0));
    assert_eq!(note(&unknown), "", "a verdict without lengths: no length-controlled rate is expected");
}

#[test]
fn the_worst_scores_and_refusals() {
    let with = |prompt: usize, category: &str, scores: [f64; 2], refusals: [bool; 2]| Verdict {
        category: Some(category.into()),
        scores: Some(scores),
        refusals: Some(refusals),
        ..verdict(prompt, "m", "base", 0.5)
    };
    let verdicts = [
        with(0, "benign", [4.0, 5.0], [true, false]),
        // the same prompt again counts once
        with(0, "benign", [6.0, 5.0], [false, false]),
        with(1, "benign", [2.0, 5.0], [true, false]),
        with(2, "harmful", [1.0, 5.0], [true, false]),
        with(3, "harmful", [9.0, 5.0], [true, true]),
    ];
    let ratings = rated(&verdicts, &Options { tail: 0.375, benign: vec!["benign".into()], ..options(None) });
    let model = &ratings.models["m"];
    let scores = model.scores.unwrap();
    // by prompt: 5, 2, 1, 9; the worst 1.5 of 4 are 1 and half of 2
    assert_eq!((scores.mean, scores.tail_mean), (4.25, 2.0 / 1.5));
    let [low, high] = scores.tail_interval;
    assert!((1.0..2.0 / 1.5).contains(&low) && (2.0 / 1.5..9.0).contains(&high), "{low} {high}");
    assert_eq!(model.refusal_rate.unwrap().rate, 80.0);
    near(model.over_refusal_rate.unwrap().rate, 100.0 * 2.0 / 3.0, 1e-12, "over-refusal");
    let base = &ratings.models["base"];
    assert_eq!((base.refusal_rate.unwrap().rate, base.over_refusal_rate.unwrap().rate), (20.0, 0.0));
    assert_eq!(model.categories["harmful"].n, 2);
    // nothing is guessed where no judge says
    let unjudged: Vec<Verdict> = verdicts.iter().map(|one| Verdict { refusals: None, ..one.clone() }).collect();
    let unjudged = rated(&unjudged, &Options { benign: vec!["benign".into()], ..options(None) });
    assert!(unjudged.models["m"].refusal_rate.is_none() && unjudged.models["m"].over_refusal_rate.is_none());
    assert!(!markdown(&Ratings::One(Box::new(unjudged))).contains("refused"));
}

#[test]
fn two_metrics_have_a_frontier() {
    let on = |metric: &str, verdicts: Vec<Verdict>| {
        verdicts.into_iter().map(|one| Verdict { metric: Some(metric.into()), ..one }).collect::<Vec<_>>()
    };
    let wins =
        |name: &'static str, wins: usize| (0..10).map(move |i| verdict(i, name, "base", f64::from(u8::from(i < wins))));
    let helpful = on("helpfulness", wins("h", 9).chain(wins("s", 5)).chain(wins("bad", 2)).collect());
    let harmless = on("harmlessness", wins("h", 3).chain(wins("s", 8)).chain(wins("bad", 2)).collect());
    let Ratings::Several { metrics, frontier } = rate(&[helpful.clone(), harmless].concat(), &options(None)).unwrap()
    else {
        panic!("two metrics")
    };
    assert_eq!(metrics.keys().collect::<Vec<_>>(), ["harmlessness", "helpfulness"]);
    let frontier = frontier.unwrap();
    assert_eq!(frontier.metrics, ["harmlessness", "helpfulness"]);
    let members: Vec<(&str, bool)> = frontier.models.iter().map(|(name, one)| (&**name, one.on_frontier)).collect();
    // base is at 50, 50 and s at 80, 50
    assert_eq!(members, [("bad", false), ("base", false), ("h", true), ("s", true)]);
    near(frontier.hypervolume, 0.3 * 0.9 + 0.5 * 0.5, 1e-12, "hypervolume");
    let support = |name: &str| frontier.models[name].support;
    assert!(support("h") > 0.9 && support("s") > 0.9 && support("bad") < 0.05, "{frontier:?}");
    assert!(contains(frontier.interval, frontier.hypervolume));
    let one = message(&[helpful.clone(), on("other", wins("h", 1).collect())].concat(), &options(Some("s")));
    assert!(one.contains("`s` by the metric `other`"), "{one}");
    let mixed = message(&[helpful, vec![verdict(1, "m", "base", 1.0)]].concat(), &options(None));
    assert!(mixed.contains("name no metric") && mixed.contains("`helpfulness`"), "{mixed}");
}

#[test]
fn equal_seeds_give_equal_ratings() {
    let (verdicts, _) = fixture();
    let with = |seed| rated(&verdicts, &Options { seed, ..options(Some("base")) });
    assert_eq!(with(3), with(3));
    let (a, b) = (with(3).models["p"].clone(), with(4).models["p"].clone());
    assert_ne!(a.overall.bootstrap_interval, b.overall.bootstrap_interval);
    assert_ne!(a.elo, b.elo);
    assert_eq!(a.bradley_terry.unwrap().rating, b.bradley_terry.unwrap().rating);
}

#[test]
fn what_cannot_be_rated_is_an_error() {
    assert!(message(&[], &options(None)).contains("no verdicts"));
    let one = [verdict(1, "m", "base", 1.0)];
    for tail in [0.0, -0.1, 1.1, f64::NAN] {
        let found = message(&one, &Options { tail, ..options(None) });
        assert!(found.contains(&format!("{tail:?}")), "{found}");
    }
    let found = message(&one, &Options { benign: vec!["safe".into()], ..options(None) });
    assert!(found.contains("`safe`"), "{found}");
    let round = [verdict(1, "a", "b", 1.0), verdict(1, "b", "c", 1.0), verdict(1, "c", "a", 1.0)];
    let found = message(&round, &Options { elo: Elo::Paper, ..options(None) });
    assert!(found.contains("baseline"), "{found}");
}
