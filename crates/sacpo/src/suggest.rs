//! "Did you mean …?": the known word nearest to a misspelt one.

/// The candidate that `word` most probably stands for, or `None` when all of them are too far away.
///
/// Far is more than a third of the longer word's letters in insertions, deletions, substitutions and
/// swaps of neighbours, with at least one allowed. Of equally near candidates the first one wins.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // A typed word may be anything; no key is nearly as long as this, and the distance is quadratic.
    if word.len() > 100 {
        return None;
    }
    let word = word.to_lowercase().replace('-', "_");
    candidates
        .into_iter()
        .map(|candidate| (strsim::osa_distance(&word, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= (word.len().max(candidate.len()) / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn finds_the_word_behind_a_slip() {
        let keys = ["beta", "beta_over_lambda", "data", "metric", "max_length"];
        for (typed, meant) in [
            ("betta", Some("beta")),
            ("bta", Some("beta")),
            ("Beta", Some("beta")),
            ("dtaa", Some("data")),
            ("max-lenght", Some("max_length")),
            ("beta_lambda", Some("beta_over_lambda")),
            ("zebra_crossing", None),
            ("", None),
        ] {
            assert_eq!(nearest(typed, keys), meant, "{typed}");
        }
        assert_eq!(nearest(&"beta".repeat(1000), keys), None);
    }

    #[test]
    fn the_nearer_of_two_wins() {
        assert_eq!(nearest("out", ["cut", "out"]), Some("out"));
        assert_eq!(nearest("oot", ["out", "boot"]), Some("out"), "the first of equals");
    }
}
