//! The formulas against mergekit's numbers (`scripts/make_merge_fixture.py`).

use serde::Deserialize;

use super::arithmetic::{Angle, TaskVectors, linear};
use super::trim::{Select, Trim};
use super::{Method, Options};

#[derive(Deserialize)]
struct Fixture {
    base: Vec<f32>,
    models: Vec<Vec<f32>>,
    other: Vec<f32>,
    near: Vec<f32>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    method: String,
    #[serde(default)]
    weights: Vec<f64>,
    #[serde(default)]
    normalise: bool,
    density: Option<f64>,
    /// Of slerp.
    second: Option<String>,
    q: Option<f64>,
    /// Of DARE: which entries mergekit kept.
    #[serde(default)]
    masks: Vec<Vec<u8>>,
    merged: Vec<f64>,
}

/// The entries whose magnitudes are largest, as the driver finds them.
fn largest(base: &[f32], model: &[f32], density: f64) -> Trim {
    let mut select = Select::new(base.len(), density);
    for pass in 0..2 {
        if pass == 1 {
            select.next_pass();
        }
        select.count(model.iter().zip(base).map(|(model, base)| model - base));
    }
    Trim::Smallest(select.finish())
}

fn merged(fixture: &Fixture, case: &Case) -> Vec<f32> {
    let method = Method::ALL.into_iter().find(|method| method.name() == case.method).unwrap();
    let Fixture { base, models, .. } = fixture;
    let mut out = vec![f32::NAN; base.len()];
    if method == Method::Slerp {
        let (q, second) = (case.q.unwrap(), case.second.as_deref().unwrap());
        let ends = [base.clone(), if second == "near" { fixture.near.clone() } else { fixture.other.clone() }];
        let mut angle = Angle::default();
        angle.add(&ends[0], &ends[1]);
        linear(&angle.coefficients([1.0 - q, q]), &ends, &mut out);
        return out;
    }
    let density = case.density.unwrap_or(1.0);
    let (weights, normalise) = (case.weights.clone(), case.normalise);
    let options = Options { method, weights, normalise, density, seed: 0, extrapolate: true };
    options.validate(models.len(), method.needs_base()).unwrap();
    if method == Method::Linear {
        linear(&options.coefficients(), models, &mut out);
        return out;
    }
    // what mergekit dropped at random is as if the model had never left the base there
    let mut models = models.clone();
    for (model, mask) in models.iter_mut().zip(&case.masks) {
        model.iter_mut().zip(base).zip(mask).filter(|(_, kept)| **kept == 0).for_each(|((x, &base), _)| *x = base);
    }
    let trim = |model: &Vec<f32>| match method {
        Method::Ties if density < 1.0 => largest(base, model, density),
        _ => Trim::Nothing,
    };
    let mut trims: Vec<Trim> = models.iter().map(trim).collect();
    let vectors = TaskVectors {
        weights: &options.weights,
        rescale: if method.is_random() { 1.0 / density } else { 1.0 },
        elect: method.elects(),
        normalise,
    };
    vectors.merge(&mut trims, base, &models, &mut out);
    out
}

#[test]
fn merges_are_mergekits() {
    let text = include_str!("../../tests/fixtures/merge.json");
    let fixture: Fixture = serde_json::from_str(text).unwrap();
    assert_eq!(fixture.cases.len(), 52);
    let (mut rounding, mut dropping) = (0.0_f64, 0.0_f64);
    for (index, case) in fixture.cases.iter().enumerate() {
        for (i, (&ours, &theirs)) in merged(&fixture, case).iter().zip(&case.merged).enumerate() {
            let difference = (f64::from(ours) - theirs).abs();
            // the fixture is float64 of nine digits, so only the last rounding to f32 may differ; but what mergekit keeps
            // at random it rounds to f32 before it is summed
            let (largest, deviation, bar) = match case.masks.is_empty() {
                true => (&mut rounding, difference / theirs.abs().max(1e-2), 7e-8),
                false => (&mut dropping, difference, 2.5e-7),
            };
            assert!(deviation < bar, "case {index} ({}), entry {i}: {ours} against {theirs}", case.method);
            *largest = largest.max(deviation);
        }
    }
    println!("largest deviation {rounding:.1e} relative, {dropping:.1e} absolute where entries are dropped at random");
}
