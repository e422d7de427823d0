//! Text that is sent while it grows.

/// How much of a growing text has been sent.
pub(super) struct GrowingText {
    /// Texts that end it and are not part of it.
    stop: Vec<String>,
    /// Bytes.
    sent: usize,
}

impl GrowingText {
    pub(super) fn new(stop: Vec<String>) -> Self {
        Self { stop, sent: 0 }
    }

    /// What can be sent of the text so far: all but an end that may become a stop text, or a character whose bytes have not
    /// all come, which decoders write as U+FFFD.
    pub(super) fn next<'t>(&mut self, text: &'t str) -> &'t str {
        let whole = text.trim_end_matches('\u{FFFD}');
        let held = self.stop.iter().map(|stop| overlap(whole, stop)).max().unwrap_or(0);
        self.up_to(&text[..whole.len() - held])
    }

    /// What has not been sent of a text that is complete.
    pub(super) fn up_to<'t>(&mut self, text: &'t str) -> &'t str {
        let next = text.get(self.sent..).unwrap_or_default();
        self.sent += next.len();
        next
    }
}

/// Length in bytes of the longest end of `text` with which `stop` begins, but for the whole of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let starts = stop.char_indices().map(|(length, _)| &stop[..length]);
    starts.filter(|start| text.ends_with(start)).map(str::len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::GrowingText;

    /// The parts that are sent of texts that follow each other, and of the whole.
    fn sent<'t>(stop: &[&str], texts: &[&'t str], whole: &'t str) -> Vec<&'t str> {
        let mut growing = GrowingText::new(stop.iter().map(|stop| (*stop).to_owned()).collect());
        let mut parts: Vec<&str> = texts.iter().map(|text| growing.next(text)).collect();
        parts.push(growing.up_to(whole));
        parts
    }

    #[test]
    fn what_may_be_a_stop_text_is_held_back_until_it_is_none() {
        assert_eq!(sent(&[], &["a", "ab", "abc"], "abc"), ["a", "b", "c", ""]);
        assert_eq!(sent(&["END"], &["aE", "aEN", "aENt"], "aENt!"), ["a", "", "ENt", "!"]);
        assert_eq!(sent(&["END"], &["aE", "aEN"], "a"), ["a", "", ""]);
        // an answer may end where a stop text could have gone on
        assert_eq!(sent(&["END"], &["aE", "aEN"], "aEN"), ["a", "", "EN"]);
        assert_eq!(sent(&["\n\n", "x\n"], &["a\n", "a\nx", "a\nxy"], "a\nxy"), ["a", "\n", "xy", ""]);
        assert_eq!(sent(&["aab"], &["a", "aa", "aaa", "aaac"], "aaac"), ["", "", "a", "aac", ""]);
        assert_eq!(sent(&["é!"], &["é", "éa"], "éa"), ["", "éa", ""]);
    }

    #[test]
    fn characters_are_sent_when_they_are_complete() {
        assert_eq!(sent(&[], &["a\u{FFFD}", "a\u{FFFD}\u{FFFD}", "aé"], "aé"), ["a", "", "é", ""]);
        assert_eq!(sent(&["é!"], &["a\u{FFFD}", "aé", "aéb"], "aéb"), ["a", "", "éb", ""]);
        // of an answer that ends in the middle of one
        assert_eq!(sent(&[], &["a\u{FFFD}"], "a\u{FFFD}"), ["a", "\u{FFFD}"]);
    }
}
