use half::bf16;

use super::*;
use crate::ops::finite_difference::{check, random};
use crate::ops::linear::bf16::round;
use crate::precision::Precision::{Bf16, F32};

const HEADS: Heads = Heads { query: 4, key_value: 2, dim: 6 };

fn run(qkv: &[f32], heads: Heads, spans: &[Span]) -> (Vec<f32>, Vec<f32>) {
    run_in(F32, qkv, heads, spans)
}

fn run_in(precision: Precision, qkv: &[f32], heads: Heads, spans: &[Span]) -> (Vec<f32>, Vec<f32>) {
    let n = qkv.len() / heads.qkv_width();
    let (mut out, mut lse) = (vec![f32::NAN; n * heads.query_width()], vec![f32::NAN; n * heads.query]);
    of_rows(precision, qkv, heads, spans, &mut out, &mut lse);
    (out, lse)
}

fn rounded(mut x: Vec<f32>) -> Vec<f32> {
    round(&mut x);
    x
}

fn halves(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

/// Asserts that no two numbers differ by more than a part of the largest of them.
fn assert_close(got: &[f32], expected: &[f32], part: f32) {
    let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= part * largest, "{index}: {got} instead of {expected}");
    }
}

/// Spans of odd lengths and of several tiles: prompts with responses, one after the other, and two that continue common rows.
fn many_spans() -> (usize, Vec<Span<'static>>) {
    let spans = vec![
        span(0..21, None),
        third(21..90, 0..21, 0..0),
        third(90..151, 0..21, 21..90),
        third(151..158, 0..21, 21..90),
        third(158..159, 0..21, 0..0),
        third(159..200, 0..21, 158..159),
        third(200..241, 0..21, 0..0),
    ];
    (241, spans)
}

fn span(rows: Range<usize>, prefix: Option<Range<usize>>) -> Span<'static> {
    Span { rows, prefix: Prefix::Rows([0..0, prefix.unwrap_or(0..0)]) }
}

/// A span that continues rows which all continue, and perhaps a prompt.
fn third(rows: Range<usize>, common: Range<usize>, prompt: Range<usize>) -> Span<'static> {
    Span { rows, prefix: Prefix::Rows([common, prompt]) }
}

/// Attention of one row by its definition, in f64.
fn attend_naively(qkv: &[f32], heads: Heads, row: usize, keys: &[usize]) -> Vec<f64> {
    let width = heads.qkv_width();
    let at = |r: usize, c: usize| f64::from(qkv[r * width + c]);
    let mut out = Vec::new();
    for h in 0..heads.query {
        let k0 = heads.query_width() + h / (heads.query / heads.key_value) * heads.dim;
        let v0 = k0 + heads.key_value_width();
        let score = |k: usize| -> f64 { (0..heads.dim).map(|d| at(row, h * heads.dim + d) * at(k, k0 + d)).sum() };
        let e: Vec<f64> = keys.iter().map(|&k| (score(k) / (heads.dim as f64).sqrt()).exp()).collect();
        let sum: f64 = e.iter().sum();
        out.extend((0..heads.dim).map(|d| keys.iter().zip(&e).map(|(&k, e)| e / sum * at(k, v0 + d)).sum::<f64>()));
    }
    out
}

#[test]
fn equals_the_definition_with_shared_prompts_and_several_tiles() {
    // a prompt of 70 rows with two responses, and a sequence of its own
    let spans = [span(0..70, None), span(70..140, Some(0..70)), span(140..145, Some(0..70)), span(145..150, None)];
    let qkv = random(150 * HEADS.qkv_width(), 1);
    let (out, _) = run(&qkv, HEADS, &spans);
    for (row, keys) in [
        (0, (0..1).collect::<Vec<_>>()),
        (69, (0..70).collect()),
        (139, (0..140).collect()),
        (142, (0..70).chain(140..143).collect()),
        (149, (145..150).collect()),
    ] {
        let expected = attend_naively(&qkv, HEADS, row, &keys);
        let got = &out[row * HEADS.query_width()..][..HEADS.query_width()];
        for (g, e) in got.iter().zip(expected) {
            assert!((f64::from(*g) - e).abs() < 1e-5, "row {row}: {g} instead of {e}");
        }
    }
}

#[test]
fn the_bits_of_a_row_do_not_depend_on_how_its_sequence_is_cut() {
    let heads = [HEADS, Heads { query: 2, key_value: 1, dim: 64 }, Heads { query: 1, key_value: 1, dim: 40 }];
    for (heads, precision) in heads.into_iter().flat_map(|heads| [(heads, F32), (heads, Bf16)]) {
        let run = |qkv: &[f32], heads, spans: &[Span]| run_in(precision, qkv, heads, spans);
        let width = heads.qkv_width();
        let sequence = random(150 * width, 1);
        let (whole, whole_lse) = run(&sequence, heads, &[span(0..150, None)]);
        // the same rows thrice, cut differently, and others between them
        let other = random(7 * width, 2);
        let rows = |range: Range<usize>| sequence[range.start * width..range.end * width].to_vec();
        let qkv =
            [rows(0..150), other.clone(), rows(0..90), rows(90..150), other, rows(21..90), rows(90..150)].concat();
        let spans = [
            span(0..21, None),
            third(21..90, 0..21, 0..0),
            third(90..150, 0..21, 21..90),
            third(150..157, 0..21, 21..90),
            span(157..247, None),
            span(247..307, Some(157..247)),
            span(307..314, None),
            third(314..383, 0..21, 0..0),
            third(383..443, 0..21, 314..383),
        ];
        let (out, lse) = run(&qkv, heads, &spans);
        let same = |got: &[f32], expected: &[f32], of_row: usize, rows: Range<usize>, at: usize| {
            let expected = &expected[rows.start * of_row..rows.end * of_row];
            assert_eq!(got[at * of_row..][..expected.len()], *expected, "rows {rows:?} at {at}");
        };
        for (rows, at) in [(0..150, 0), (0..150, 157), (21..150, 314)] {
            same(&out, &whole, heads.query_width(), rows.clone(), at);
            same(&lse, &whole_lse, heads.query, rows, at);
        }
    }
}

#[test]
fn a_cache_gives_what_the_rows_give() {
    let qkv = random(9 * HEADS.qkv_width(), 3);
    let (whole, _) = run(&qkv, HEADS, &[span(0..9, None)]);
    let q = HEADS.query_width();
    let past = || qkv.chunks_exact(HEADS.qkv_width()).take(6);
    let of_column = |column: usize| past().flat_map(|row| row[column..column + HEADS.dim].to_vec()).collect();
    let keys: Vec<Vec<f32>> = (0..HEADS.key_value).map(|head| of_column(HEADS.key_column(head))).collect();
    let values: Vec<Vec<f32>> = (0..HEADS.key_value).map(|head| of_column(HEADS.value_column(head))).collect();
    let cached = [Span { rows: 0..3, prefix: Prefix::Cache { keys: &keys, values: &values } }];
    let (rest, _) = run(&qkv[6 * HEADS.qkv_width()..], HEADS, &cached);
    assert!(rest.iter().zip(&whole[6 * q..]).all(|(a, b)| (a - b).abs() < 1e-6));
    let (whole, _) = run_in(Bf16, &qkv, HEADS, &[span(0..9, None)]);
    let (rest, _) = run_in(Bf16, &qkv[6 * HEADS.qkv_width()..], HEADS, &cached);
    assert_eq!(rest, whole[6 * q..]);
}

#[test]
fn gradient_matches_finite_differences() {
    for (heads, spans) in [
        (HEADS, vec![span(0..3, None), span(3..7, Some(0..3)), span(7..9, Some(0..3)), span(9..11, None)]),
        (Heads { query: 2, key_value: 2, dim: 4 }, vec![span(0..11, None)]),
        // more groups than runs of them
        (HEADS, (0..11).map(|row| third(row..row + 1, if row == 0 { 0..0 } else { 0..1 }, 0..0)).collect()),
        (
            Heads { query: 4, key_value: 2, dim: 20 },
            vec![
                span(0..2, None),
                third(2..4, 0..2, 0..0),
                third(4..6, 0..2, 2..4),
                third(6..7, 0..2, 2..4),
                third(7..9, 0..2, 0..0),
                third(9..11, 0..2, 7..9),
            ],
        ),
    ] {
        let qkv = random(11 * heads.qkv_width(), 5);
        let d_out = random(11 * heads.query_width(), 6);
        let (_, lse) = run(&qkv, heads, &spans);
        let mut d_qkv = vec![f32::NAN; qkv.len()];
        backward(&qkv, heads, &spans, &lse, &d_out, &mut d_qkv);
        check(&qkv, &d_qkv, &d_out, |qkv| run(qkv, heads, &spans).0);
    }
}

#[test]
fn gradient_over_several_tiles_matches_finite_differences() {
    let heads = Heads { query: 1, key_value: 1, dim: 2 };
    let spans =
        [span(0..40, None), third(40..66, 0..40, 0..0), third(66..100, 0..40, 40..66), third(100..133, 0..40, 0..0)];
    let qkv = random(133 * heads.qkv_width(), 7);
    let d_out = random(133 * heads.query_width(), 8);
    let (_, lse) = run(&qkv, heads, &spans);
    let mut d_qkv = vec![0.0; qkv.len()];
    backward(&qkv, heads, &spans, &lse, &d_out, &mut d_qkv);
    check(&qkv, &d_qkv, &d_out, |qkv| run(qkv, heads, &spans).0);
}

const MANY_HEADS: [Heads; 4] = [
    HEADS,
    Heads { query: 6, key_value: 2, dim: 64 },
    Heads { query: 2, key_value: 1, dim: 40 },
    Heads { query: 1, key_value: 1, dim: 2 },
];

#[test]
fn in_bf16_it_differs_by_the_rounding_of_the_weights() {
    let (rows, spans) = many_spans();
    for heads in MANY_HEADS {
        let qkv = rounded(random(rows * heads.qkv_width(), 9));
        let (exact, exact_lse) = run(&qkv, heads, &spans);
        let (out, lse) = run_in(Bf16, &qkv, heads, &spans);
        // a weight is off by a 512th of itself at most; queries and keys are factors as they are
        assert_close(&out, &exact, 1.0 / 512.0);
        assert_close(&lse, &exact_lse, 1e-5);
    }
}

#[test]
fn gradient_in_bf16_differs_by_the_rounding_of_its_factors() {
    let (rows, spans) = many_spans();
    for heads in MANY_HEADS {
        let qkv = rounded(random(rows * heads.qkv_width(), 9));
        let d_out = random(rows * heads.query_width(), 10);
        let (_, lse) = run(&qkv, heads, &spans);
        let [mut exact, mut got] = [(); 2].map(|()| vec![f32::NAN; qkv.len()]);
        backward(&qkv, heads, &spans, &lse, &d_out, &mut exact);
        backward(&halves(&qkv), heads, &spans, &lse, &d_out, &mut got);
        // two roundings, by a 512th each: of the gradient of the output, and of weights or of their gradients
        assert_close(&got, &exact, 2.0 / 512.0);
    }
}

#[test]
fn of_numbers_in_bf16_it_is_that_of_the_same_in_f32_rounded() {
    let (rows, spans) = many_spans();
    for heads in MANY_HEADS {
        let qkv = rounded(random(rows * heads.qkv_width(), 9));
        let (expected, expected_lse) = run_in(Bf16, &qkv, heads, &spans);
        let (mut out, mut lse) = (vec![bf16::NAN; expected.len()], vec![f32::NAN; expected_lse.len()]);
        forward(&halves(&qkv), heads, &spans, &mut out, &mut lse);
        assert_eq!((out, lse), (halves(&expected), expected_lse));
    }
}
