//! Unconstrained minimisation of smooth functions of a few numbers.

use std::collections::VecDeque;

/// Pairs of step and change of gradient that the approximate Hessian is made of.
const MEMORY: usize = 20;

/// A gradient this small beside the terms that it is the sum of is rounding.
const ROUNDING: f64 = 1e-15;

/// A function at a point.
pub(super) struct Evaluated {
    pub(super) value: f64,
    pub(super) gradient: Vec<f64>,
    /// The size of the terms that cancel in the gradient.
    pub(super) scale: f64,
}

impl Evaluated {
    /// The largest component of the gradient, relative to the terms that it is the sum of.
    pub(super) fn relative_gradient(&self) -> f64 {
        self.gradient.iter().map(|g| g.abs()).fold(0.0, f64::max) / self.scale.max(f64::MIN_POSITIVE)
    }
}

/// The point where limited-memory BFGS from `start` finds no lower value or gradient any more, and the function there
/// (J. Nocedal and S. Wright, "Numerical Optimization", algorithm 7.5).
pub(super) fn minimised(start: Vec<f64>, mut f: impl FnMut(&[f64]) -> Evaluated) -> (Vec<f64>, Evaluated) {
    let (mut x, mut at) = (start.clone(), f(&start));
    let mut history: VecDeque<(Vec<f64>, Vec<f64>)> = VecDeque::new();
    for _ in 0..5000 {
        if at.relative_gradient() <= ROUNDING {
            break;
        }
        let direction = quasi_newton(&history, &at.gradient);
        let Some((step, next)) = line_search(&x, &at, &direction, &mut f) else {
            if history.is_empty() {
                break;
            }
            history.clear();
            continue;
        };
        let change: Vec<f64> = next.gradient.iter().zip(&at.gradient).map(|(new, old)| new - old).collect();
        x.iter_mut().zip(&step).for_each(|(x, s)| *x += s);
        at = next;
        if dot(&step, &change) > 0.0 {
            history.push_back((step, change));
            if history.len() > MEMORY {
                history.pop_front();
            }
        }
    }
    (x, at)
}

/// −H·gradient with the inverse Hessian H that the history implies.
fn quasi_newton(history: &VecDeque<(Vec<f64>, Vec<f64>)>, gradient: &[f64]) -> Vec<f64> {
    let mut direction: Vec<f64> = gradient.iter().map(|g| -g).collect();
    let mut coefficients = Vec::new();
    for (step, change) in history.iter().rev() {
        let a = dot(step, &direction) / dot(step, change);
        add(&mut direction, -a, change);
        coefficients.push(a);
    }
    // without a history the first step moves the largest component by 1
    let scale = history.back().map_or_else(
        || 1.0 / gradient.iter().map(|g| g.abs()).fold(f64::MIN_POSITIVE, f64::max),
        |(step, change)| dot(step, change) / dot(change, change),
    );
    direction.iter_mut().for_each(|d| *d *= scale);
    for ((step, change), a) in history.iter().zip(coefficients.iter().rev()) {
        let b = dot(change, &direction) / dot(step, change);
        add(&mut direction, a - b, step);
    }
    direction
}

/// A multiple of the direction that lowers the value, or where only rounding is left of that the gradient, and after
/// which the slope is less steep (the weak Wolfe conditions, by bisection).
fn line_search(
    x: &[f64],
    at: &Evaluated,
    direction: &[f64],
    f: &mut impl FnMut(&[f64]) -> Evaluated,
) -> Option<(Vec<f64>, Evaluated)> {
    let slope = dot(&at.gradient, direction);
    if slope >= 0.0 {
        return None;
    }
    let rounding = 1e-13 * at.value.abs();
    let (mut low, mut high, mut length) = (0.0, f64::INFINITY, 1.0);
    for _ in 0..60 {
        let step: Vec<f64> = direction.iter().map(|d| length * d).collect();
        let next = f(&x.iter().zip(&step).map(|(x, s)| x + s).collect::<Vec<_>>());
        let new_slope = dot(&next.gradient, direction);
        let lower = next.value <= at.value + 1e-4 * length * slope;
        let flat = next.value <= at.value + rounding && new_slope.abs() <= -slope;
        if !(lower || flat) {
            high = length;
        } else if new_slope < 0.9 * slope {
            low = length;
        } else {
            return Some((step, next));
        }
        length = if high.is_finite() { 0.5 * (low + high) } else { 2.0 * low };
    }
    None
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], factor: f64, of: &[f64]) {
    to.iter_mut().zip(of).for_each(|(t, o)| *t += factor * o);
}
