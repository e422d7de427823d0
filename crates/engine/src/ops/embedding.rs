//! Token embedding: a row of a table per token.

use rayon::prelude::*;

use super::elementwise;

/// x[i] = table[tokens[i]]. table `[vocab, width]`, x `[n, width]`.
///
/// # Panics
/// If a token is not in the table.
pub(crate) fn forward(table: &[f32], tokens: &[u32], x: &mut [f32], width: usize) {
    let _span = elementwise(2 * size_of_val(x));
    assert_eq!(x.len(), tokens.len() * width);
    x.par_chunks_mut(width).zip(tokens).with_min_len(64).for_each(|(x, &token)| {
        let start = token as usize * width;
        x.copy_from_slice(&table[start..start + width]);
    });
}

/// d_table[tokens[i]] += dx[i], in the order of the rows.
pub(crate) fn backward(tokens: &[u32], dx: &[f32], d_table: &mut [f32], width: usize) {
    let _span = elementwise(3 * size_of_val(dx));
    for (dx, &token) in dx.chunks_exact(width).zip(tokens) {
        let start = token as usize * width;
        for (d, g) in d_table[start..start + width].iter_mut().zip(dx) {
            *d += g;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::finite_difference::{check, random};

    #[test]
    fn gradient_matches_finite_differences() {
        let (table, tokens, dx) = (random(15, 1), [2, 0, 2, 4], random(12, 2));
        let mut d_table = vec![0.0; 15];
        backward(&tokens, &dx, &mut d_table, 3);
        check(&table, &d_table, &dx, |table| {
            let mut x = vec![0.0; 12];
            forward(table, &tokens, &mut x, 3);
            x
        });
    }
}
