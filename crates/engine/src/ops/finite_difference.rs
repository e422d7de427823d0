//! Checks gradients against central differences, accumulated in f64.

use rand::distr::{Distribution, Uniform};
use rand::{SeedableRng, rngs::StdRng};

/// Numbers in (−1, 1).
pub(crate) fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let uniform = Uniform::new(-1.0f32, 1.0).unwrap();
    (0..n).map(|_| uniform.sample(&mut rng)).collect()
}

/// Asserts that `gradient` is the derivative of Σ weightsᵢ·f(x)ᵢ at `x`, within 1e-3 of the largest component.
pub(crate) fn check<Y: Into<f64>>(x: &[f32], gradient: &[f32], weights: &[f32], f: impl Fn(&[f32]) -> Vec<Y>) {
    assert_eq!(x.len(), gradient.len());
    let objective = |x: &[f32]| -> f64 {
        let y = f(x);
        assert_eq!(y.len(), weights.len());
        y.into_iter().zip(weights).map(|(y, &w)| y.into() * f64::from(w)).sum()
    };
    let scale = gradient.iter().fold(0f32, |m, g| m.max(g.abs()));
    assert!(scale > 0.0, "a gradient of zeros proves nothing");
    let mut moved = x.to_vec();
    for i in 0..x.len() {
        let mut difference = |step: f32| {
            moved[i] = x[i] + step;
            let (up, high) = (objective(&moved), moved[i]);
            moved[i] = x[i] - step;
            let (down, low) = (objective(&moved), moved[i]);
            moved[i] = x[i];
            (up - down) / f64::from(high - low)
        };
        // two steps together cancel the error of second order (five-point formula)
        let expected = (4.0 * difference(1e-2) - difference(2e-2)) / 3.0;
        let error = (f64::from(gradient[i]) - expected).abs() / f64::from(scale);
        assert!(error < 1e-3, "component {i}: gradient {}, difference {expected}, error {error:e}", gradient[i]);
    }
}
