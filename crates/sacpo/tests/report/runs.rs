//! Run folders as `sacpo run` leaves them, without having trained anything.

use std::fs;
use std::path::Path;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// Texts that would do harm as markup, script, template or line end.
pub(crate) const HOSTILE: [&str; 6] = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror=\"window.hacked = 1\">",
    "line\u{2028}separator\u{2029}and \u{0} nothing",
    "<!-- <script> {{ title }} {% raw %} ]]> &amp; &#60;b>",
    "\"><svg onload=window.hacked=1>",
    "javascript:window.hacked=1 // ' \" ` \\u003c ${1}",
];

/// A policy's name that would do harm too; it is a file's name as well.
pub(crate) const HOSTILE_NAME: &str = "<img src=x onerror='hacked=1'>&\"";

/// What a run folder holds.
pub(crate) struct Made {
    pub(crate) policies: Vec<String>,
    /// By policy and prompt.
    pub(crate) answers: Vec<Vec<String>>,
    pub(crate) prompts: Vec<String>,
}

/// Answers of a thousand to two thousand characters, in words that are drawn evenly and so compress worse than a language.
pub(crate) fn long_answers(policies: usize, prompts: usize) -> Vec<Vec<String>> {
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let letters = b"etaoinshrdlucmfwypvbgk";
    let words: Vec<String> = (0..3_000)
        .map(|_| {
            (0..random.random_range(2..10))
                .map(|_| char::from(letters[random.random_range(0..letters.len())]))
                .collect()
        })
        .collect();
    let mut answer = || {
        let length = random.random_range(1_000..2_000);
        let mut text = String::new();
        while text.len() < length {
            text += &words[random.random_range(0..words.len())];
            text.push(' ');
        }
        text
    };
    (0..policies).map(|_| (0..prompts).map(|_| answer()).collect()).collect()
}

/// Short answers with something to search for, the hostile texts among them.
pub(crate) fn short_answers(policies: &[String], prompts: usize) -> Vec<Vec<String>> {
    let answer = |policy: &str, prompt: usize| match HOSTILE.get(prompt) {
        Some(text) => format!("{text} by {policy}"),
        None => format!("Answer {prompt} of {policy}, needle-{prompt}."),
    };
    policies.iter().map(|policy| (0..prompts).map(|prompt| answer(policy, prompt)).collect()).collect()
}

/// `base`, `helpfulness`, policies of a sweep of safety, and a merge.
pub(crate) fn names(policies: usize) -> Vec<String> {
    let sweep = (0..policies - 3).map(|number| format!("safety-{}", f64::from(number as u32 + 1) / 8.0));
    ["base", "helpfulness"].map(str::to_owned).into_iter().chain(sweep).chain(["merge-0.5".to_owned()]).collect()
}

/// Writes the folder of a run with these policies and answers.
pub(crate) fn write(run: &Path, policies: Vec<String>, answers: Vec<Vec<String>>) -> Made {
    let prompts: Vec<String> = (0..answers[0].len())
        .map(|number| match HOSTILE.get(number) {
            Some(text) => format!("Prompt {number} with {text}"),
            None => format!("Prompt {number}?"),
        })
        .collect();
    let json_file = |name: &str, value: &Value| {
        let path = run.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, value.to_string()).unwrap();
    };
    let lines = |name: String, rows: Vec<Value>| {
        let path = run.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    };
    let category = |prompt: usize| if prompt.is_multiple_of(5) { "crime" } else { "cooking" };
    let base = json!({"policy": "base", "model": "ba5e00", "made_by": "given", "path": "models/base", "from": []});
    for (number, (name, texts)) in policies.iter().zip(&answers).enumerate() {
        let rows = prompts.iter().zip(texts).enumerate().map(|(prompt, (text, answer))| {
            let finish = if prompt % 7 == 0 { "length" } else { "stop" };
            json!({"prompt": text, "text": answer, "tokens": 10 + prompt, "finish": finish, "category": category(prompt)})
        });
        lines(format!("answers/questions/{name}.jsonl"), rows.collect());
        if number == 0 || name.starts_with("merge") {
            continue;
        }
        let rows = (1..=500).map(|step| {
            let loss = 0.7 - 0.001 * f64::from(step) + 0.01 * number as f64;
            let mut row = json!({"step": step, "loss": loss, "rewards/margins": 1.0 - loss, "tokens": 1000});
            if step % 100 == 0 {
                row["eval_loss"] = json!(loss + 0.01);
            }
            row
        });
        lines(format!("steps/{name}/metrics.jsonl"), rows.collect());
        let (step, from) = if number == 1 { ("helpfulness", &policies[0]) } else { ("safety", &policies[1]) };
        let mut parent = base.clone();
        if number > 1 {
            parent = provenance(&policies[1], "helpfulness", &parent);
        }
        let mut record = provenance(name, step, &parent);
        assert_eq!(record["from"][0]["policy"], **from);
        record["seconds"] = json!(61.0);
        json_file(&format!("steps/{name}/policy.json"), &record);
    }
    for metric in ["helpfulness", "harmlessness"] {
        let mut rows = Vec::new();
        for (number, name) in policies.iter().enumerate().skip(1) {
            for (prompt, text) in prompts.iter().enumerate() {
                for swapped in [false, true] {
                    // every policy wins, ties, loses or has no verdict somewhere
                    let [a, b] = match (prompt + number * 3 + metric.len()) % 4 {
                        0 => [8, 6],
                        1 => [5, 5],
                        _ => [3, 7],
                    };
                    let missing = swapped && prompt % 11 == 3;
                    let (a, b) = (f64::from(a), f64::from(b));
                    let outcome = if a > b {
                        1.0
                    } else if a < b {
                        0.0
                    } else {
                        0.5
                    };
                    rows.push(json!({
                        "prompt": text, "category": category(prompt), "metric": metric, "a": name, "b": "base",
                        "outcome": if missing { Value::Null } else { json!(outcome) },
                        "scores": if missing { Value::Null } else { json!([a, b]) }, "swapped": swapped,
                    }));
                }
            }
        }
        lines(format!("verdicts/questions-{metric}.jsonl"), rows);
    }
    json_file("results.json", &results(&policies));
    json_file(
        "manifest.json",
        &json!({"key": "k", "version": "0.1.0", "seed": 7, "policies": [], "seconds": 1.0,
            "machine": {"system": "linux", "architecture": "x86_64", "instruction_set": "avx2", "threads": 2}}),
    );
    Made { policies, answers, prompts }
}

fn provenance(name: &str, step: &str, from: &Value) -> Value {
    json!({
        "key": "k", "policy": name, "model": format!("{}f00d", name.len()), "made_by": "training", "step": step, "metric": step,
        "objective": "dpo", "temperature": 0.25, "data": format!("data/{step}.jsonl"), "data_hash": "da7a", "pairs": 100,
        "seed": 7, "from": [from],
    })
}

fn results(policies: &[String]) -> Value {
    let chosen = &policies[policies.len() - 2];
    let rows = policies.iter().enumerate().map(|(number, name)| {
        let sweep = name.strip_prefix("safety-").map(|value| value.parse::<f64>().unwrap());
        let accuracy =
            |shift: f64| json!({"pairs": 200, "accuracy": 0.5 + shift * number as f64 / 100.0, "margin": 0.1});
        json!({
            "name": name, "beta_over_lambda": sweep, "q": name.starts_with("merge").then_some(0.5),
            "step": if sweep.is_some() { Some("safety") } else { (number == 1).then_some("helpfulness") },
            "reward": null, "safety": null, "kl": null, "checkpoint": format!("steps/{name}/checkpoint"),
            "validation": {"helpfulness": accuracy(1.0), "harmlessness": accuracy(-1.0)},
        })
    });
    let mean = json!({"value": 0.1, "interval": [0.05, 0.15], "lower_bound": 0.06});
    json!({
        "policies": rows.collect::<Vec<_>>(), "seconds": 75.0, "peak_memory_bytes": 1u64 << 30, "out": "runs/x",
        "constraint": {
            "threshold": 0.05, "lambda": 1.25, "lower_bound": 0.07, "verdict": "met", "confidence": 0.95, "realise": "train",
            "policy": chosen, "beta_over_lambda": 0.25, "reason": null, "unfinished": 0.0, "prompts": [200, 100], "answers": 64,
            "constraints": [{"metric": "harmlessness", "threshold": 0.05, "lambda": 1.25, "safety": 0.1, "lower_bound": 0.07,
                "upper_bound": 0.13, "verdict": "met"}],
            "shots": [{"policy": chosen, "lambda": [1.25], "estimate": [mean], "bias": [-0.01], "effective_sample_size": 40.0,
                "measured": [mean]}],
        },
    })
}
