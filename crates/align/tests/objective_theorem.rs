//! What the objectives say of Theorem 1, against the gradient of their population loss.

#![allow(clippy::unwrap_used)]

use align::objective::{Labelled, NAMES, Objective, Options, Pair, Pairwise, Response, Unpaired};

/// Four responses to one prompt, and a policy that is the reference tilted by their value: what a covered step ends at.
struct Problem {
    responses: [Response; 4],
    value: [f64; 4],
    /// The probability that the data show each response.
    data: [f64; 4],
    beta: f64,
}

impl Problem {
    /// `tilt` is what the reference is tilted by, times β.
    fn new(beta: f64, value: [f64; 4], tilt: [f64; 4]) -> Self {
        let reference = [0.1f64, 0.2, 0.3, 0.4];
        let weights: [f64; 4] = std::array::from_fn(|y| reference[y] * (tilt[y] / beta).exp());
        let total: f64 = weights.iter().sum();
        let responses = std::array::from_fn(|y| Response {
            policy: (weights[y] / total).ln(),
            reference: reference[y].ln(),
            len: y + 1,
            kl: 0.3 * (y + 1) as f64,
        });
        Self { responses, value, data: [0.4, 0.3, 0.1, 0.2], beta }
    }

    /// How far the policy is from a stationary point of the population loss among all policies: the derivative with
    /// respect to log π(y) must be proportional to π(y). `derivatives` adds those of the expected loss.
    fn gradient(&self, derivatives: impl Fn(&mut [f64; 4])) -> f64 {
        let mut slopes = [0.0; 4];
        derivatives(&mut slopes);
        let total: f64 = slopes.iter().sum();
        let residuals = (0..4).map(|y| (slopes[y] - self.responses[y].policy.exp() * total).abs());
        residuals.fold(0.0, f64::max)
    }

    /// Of pairs drawn independently from the data, whose first response wins with probability `wins`.
    fn of_pairs(&self, objective: &Pairwise, margin: [f64; 4], wins: impl Fn(usize, usize) -> f64) -> f64 {
        self.gradient(|slopes| {
            for (c, r) in (0..4).flat_map(|c| (0..4).map(move |r| (c, r))).filter(|(c, r)| c != r) {
                let pair = Pair {
                    chosen: self.responses[c],
                    rejected: self.responses[r],
                    is_unsafe: [c == 1, r == 1],
                    margin: margin[c] - margin[r],
                };
                let weight = self.data[c] * self.data[r] * wins(c, r);
                let got = objective.evaluate(&pair);
                slopes[c] += weight * got.chosen.logp;
                slopes[r] += weight * got.rejected.logp;
            }
        })
    }

    /// Of responses drawn from the data and desirable with probability σ(value − threshold).
    fn of_labels(&self, objective: &Unpaired, threshold: f64, shift: f64) -> f64 {
        self.gradient(|slopes| {
            for (y, response) in self.responses.iter().enumerate() {
                let probability = sigmoid(self.value[y] - threshold);
                for (desirable, weight) in [(true, probability), (false, 1.0 - probability)] {
                    let got = objective.evaluate(&Labelled { response: *response, desirable }, shift);
                    slopes[y] += self.data[y] * weight * got.derivative.logp;
                }
            }
        })
    }

    fn mean(&self, of: impl Fn(usize) -> f64) -> f64 {
        (0..4).map(|y| self.data[y] * of(y)).sum()
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Among all policies, the tilt of the reference is a stationary point of the population loss for exactly the objectives
/// that say so.
#[test]
fn the_tilt_is_stationary_where_theorem_1_covers() {
    let (beta, value) = (0.5, [0.9, -0.4, 0.3, -1.2]);
    let tilted = Problem::new(beta, value, value);
    let wins = |c: usize, r: usize| sigmoid(value[c] - value[r]);
    let sums = Options { sum_logps: Some(true), ..Options::default() }.build("ipo", beta).unwrap();
    let smoothed = Options { label_smoothing: Some(0.1), ..Options::default() }.build("dpo", beta).unwrap();
    let default = NAMES.iter().map(|name| Options::default().build(name, beta).unwrap());
    for objective in default.chain([sums, smoothed]) {
        let gradient = match objective {
            // labels flipped as often as the loss takes them to be
            Objective::Pairwise(robust @ Pairwise::RobustDpo { label_smoothing: e, .. }) => {
                tilted.of_pairs(&robust, [0.0; 4], |c, r| (1.0 - e) * wins(c, r) + e * wins(r, c))
            }
            // the value is the probability to win against the data
            Objective::Pairwise(ipo @ Pairwise::Ipo { .. }) => {
                let against_data = std::array::from_fn(|y| tilted.mean(|other| wins(y, other)));
                Problem::new(beta, value, against_data).of_pairs(&ipo, [0.0; 4], wins)
            }
            // the tilt is by the metrics aligned before, too
            Objective::Pairwise(Pairwise::Modpo { .. }) => {
                let (weight, before) = (0.7, [0.2, 1.0, -0.5, 0.4]);
                let both = std::array::from_fn(|y| weight * value[y] + before[y]);
                Problem::new(beta, value, both).of_pairs(&Pairwise::Modpo { beta, weight }, before, wins)
            }
            Objective::Pairwise(pairwise) => tilted.of_pairs(&pairwise, [0.0; 4], wins),
            // the threshold is the mean value, and the shift the mean reward
            Objective::Unpaired(unpaired) => {
                let rewards = tilted.mean(|y| beta * tilted.responses[y].log_ratio());
                tilted.of_labels(&unpaired, tilted.mean(|y| value[y]), rewards)
            }
        };
        match objective.outside_theorem() {
            None => assert!(gradient < 1e-15, "{objective:?}: {gradient}"),
            Some(_) => assert!(gradient > 1e-3, "{objective:?}: {gradient}"),
        }
    }
}

/// The condition in the documentation of `bco`: with a threshold that is not the data's mean value, the running mean is
/// no longer what normalises the tilt; the δ that does so is.
#[test]
fn bco_needs_the_shift_that_normalises_the_tilt() {
    let value = [0.9, -0.4, 0.3, -1.2];
    let problem = Problem::new(0.5, value, value);
    let bco = Unpaired::Bco { beta: problem.beta };
    let running = problem.mean(|y| problem.beta * problem.responses[y].log_ratio());
    let threshold = problem.mean(|y| value[y]) + 1.0;
    assert!(problem.of_labels(&bco, threshold, running) > 1e-3);
    let normaliser: f64 = (0..4).map(|y| problem.responses[y].reference.exp() * (value[y] / problem.beta).exp()).sum();
    assert!(problem.of_labels(&bco, threshold, threshold - problem.beta * normaliser.ln()) < 1e-15);
}
