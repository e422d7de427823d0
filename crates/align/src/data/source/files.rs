//! The files that a path of a recipe or a command names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use engine::{Error, Result};

/// The files of a data set: the path itself; or the data files of a folder; or all files whose name matches a pattern, in
/// which `*` stands for any characters. They come in the order of their names.
///
/// Folders in the folder are left out. Which files of a folder are data, and what is an error, says [`choose`].
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let (folder, pattern) = if path.is_dir() {
        (path, None)
    } else if name.contains('*') && !path.exists() {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        (folder.unwrap_or(Path::new(".")), Some(&*name))
    } else {
        return Ok(vec![path.to_owned()]);
    };
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let file = entry.map_err(Error::io("read", folder))?.path();
        if !file.is_dir() {
            files.insert(file.file_name().unwrap_or_default().to_string_lossy().into_owned(), file);
        }
    }
    let chosen = choose(&folder.display().to_string(), pattern, files.keys().map(String::as_str))?;
    Ok(chosen.into_iter().map(|name| files[name].clone()).collect())
}

/// The files of a folder that are a data set, by name and in this order: those that match a pattern, or else all that are
/// neither hidden nor about the data (README, LICENSE, …). `folder` names the folder in messages.
///
/// # Errors
/// If there is none; without a pattern, if the names tell of several splits (see [`patterns_of_splits`]), which would be
/// mixed.
pub fn choose<'a>(
    folder: &str,
    pattern: Option<&str>,
    names: impl IntoIterator<Item = &'a str>,
) -> Result<Vec<&'a str>> {
    let matches = |name: &str| pattern.map_or(!is_about_data(name), |pattern| matches(pattern, name));
    let mut chosen: Vec<&str> = names.into_iter().filter(|name| !name.starts_with('.') && matches(name)).collect();
    chosen.sort_unstable();
    let Some(pattern) = pattern else {
        if chosen.is_empty() {
            return Err(Error::input(format!(
                "The folder {folder} holds no files. Check the path; files in folders inside it are not read."
            )));
        }
        let splits = patterns_of_splits(&chosen);
        if splits.len() > 1 {
            let paths: Vec<String> = splits.iter().map(|pattern| format!("{folder}/{pattern}")).collect();
            return Err(Error::input(format!(
                "The folder {folder} holds several splits, which would be mixed. Give one of them: {}. A pattern such as \
                 {folder}/* takes all.",
                paths.join(", ")
            )));
        }
        return Ok(chosen);
    };
    if chosen.is_empty() {
        return Err(Error::input(format!(
            "No file matches {folder}/{pattern}. Check the folder and the pattern: `*` stands for any characters of a file's \
             name."
        )));
    }
    Ok(chosen)
}

/// Names or patterns that stand for one split each, if the names of files tell of splits; files whose names do not are in
/// none.
///
/// Names are read as the Python package `datasets` reads them: `train`, `validation`, `test` and their like between what
/// is no letter; of shards, `train_prefs-00000-of-00002.parquet`, all before the number is the split.
pub fn patterns_of_splits(names: &[&str]) -> Vec<String> {
    let mut splits: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in names {
        if let Some((split, _)) = split_of(name) {
            splits.entry(split).or_default().push(name);
        }
    }
    splits.values().flat_map(|of_split| pattern_for(of_split, names)).collect()
}

/// What a name says of the split that its file belongs to, and the words for it.
const SPLITS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// The split that a file belongs to, and the word in its name that tells.
fn split_of(name: &str) -> Option<(&str, &str)> {
    let known = |word: &str| SPLITS.iter().find(|(_, words)| words.contains(&&*word.to_lowercase()));
    let mut words = name.split(|c: char| !c.is_alphabetic());
    let (split, word) = words.find_map(|word| Some((known(word)?.0, word)))?;
    Some((shard(name).map_or(split, |shard| shard.of), word))
}

/// What the name of a file says that holds a part of a whole, `NAME-00000-of-00002.parquet`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard<'a> {
    /// NAME.
    pub of: &'a str,
    /// How many parts there are.
    pub count: usize,
}

/// The part of a whole that a file is by its name.
pub fn shard(name: &str) -> Option<Shard<'_>> {
    let (start, end) = name.rsplit_once("-of-")?;
    let (of, number) = start.rsplit_once('-')?;
    let count = &end[..end.find(|c: char| !c.is_ascii_digit()).unwrap_or(end.len())];
    number.parse::<usize>().ok()?;
    Some(Shard { of, count: count.parse().ok()? })
}

/// A pattern for these of all names, or, where there is none, the names themselves.
fn pattern_for(these: &[&str], all: &[&str]) -> Vec<String> {
    let only_these = |pattern: &String| all.iter().filter(|name| matches(pattern, name)).count() == these.len();
    let first = these[0];
    let of_shards = shard(first).map(|shard| format!("{}-*", shard.of));
    let of_word = split_of(first).map(|(_, word)| format!("*{word}*"));
    match of_shards.into_iter().chain(of_word).find(only_these) {
        Some(pattern) if these.len() > 1 => vec![pattern],
        _ => these.iter().map(|&name| name.to_owned()).collect(),
    }
}

/// Whether a file, by its name, says something about the data beside it.
pub fn is_about_data(name: &str) -> bool {
    let name = name.to_lowercase();
    ["readme", "license", "licence"].iter().any(|start| name.starts_with(start))
        || [".md", ".py"].iter().any(|end| name.ends_with(end))
        || ["dataset_info.json", "dataset_infos.json", "dataset_dict.json"].contains(&&*name)
}

/// Bytes of all files of a data set.
pub(in super::super) fn all_bytes(path: &Path) -> Result<u64> {
    let length = |file: &PathBuf| Ok(std::fs::metadata(file).map_err(Error::io("read", file))?.len());
    files(path)?.iter().map(length).sum()
}

/// Whether a name is the pattern with any characters for each `*`.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|name| {
            name.char_indices().map(|(at, _)| at).chain([name.len()]).any(|at| matches(rest, &name[at..]))
        }),
    }
}

/// Where the rows of a data set stand: its files, and which of its rows each holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    files: Vec<File>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct File {
    path: PathBuf,
    unit: &'static str,
    /// The number of the last row in the files before.
    before: usize,
}

impl Places {
    pub(super) fn push(&mut self, path: &Path, unit: &'static str, before: usize) {
        self.files.push(File { path: path.to_owned(), unit, before });
    }

    /// Where a row stands, from its number in the data set, as "Line 3 of train.jsonl".
    ///
    /// # Panics
    /// If the data set has no row of this number.
    pub fn of(&self, row: usize) -> String {
        let file = &self.files[self.files.partition_point(|file| file.before < row) - 1];
        place(&file.path, file.unit, row - file.before)
    }
}

/// A row as messages name it.
pub(super) fn place(path: &Path, unit: &str, number: usize) -> String {
    format!("{unit} {number} of {}", path.display())
}

#[cfg(test)]
mod tests {
    use super::{choose, matches, patterns_of_splits};

    #[test]
    fn stars_stand_for_any_characters() {
        for (pattern, name, expected) in [
            ("*", "", true),
            ("*", "a.json", true),
            ("train-*.parquet", "train-00000-of-00002.parquet", true),
            ("train-*.parquet", "train-.parquet", true),
            ("train-*.parquet", "test-0.parquet", false),
            ("train-*.parquet", "train-0.parquet.part", false),
            ("*a*a", "aa", true),
            ("*a*a", "a", false),
            ("*ab*ba*", "aba", false),
            ("é*ß", "éüß", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn a_folder_of_several_splits_is_named_by_their_patterns() {
        for (names, expected) in [
            (&["a.jsonl", "b.jsonl"][..], &[][..]),
            (&["train.jsonl.gz", "test.jsonl.gz"], &["test.jsonl.gz", "train.jsonl.gz"]),
            (&["train-1.json", "training-2.json", "3.train.json", "other.json"], &["*train*"]),
            (&["train-1.json", "train-2.json", "constrained.json"], &["train-1.json", "train-2.json"]),
            (&["train-1.json", "train-2.json", "train-3-dev.json", "dev.json"], &["*train*", "dev.json"]),
            (
                &[
                    "train_sft-00000-of-00001.parquet",
                    "train_prefs-00000-of-00002.parquet",
                    "train_prefs-00001-of-00002.parquet",
                    "test_sft-00000-of-00001.parquet",
                ],
                &["test_sft-00000-of-00001.parquet", "train_prefs-*", "train_sft-00000-of-00001.parquet"],
            ),
            // parts of what is no split
            (&["helpful-00000-of-00001.parquet", "safe-00000-of-00001.parquet"], &[]),
            (&["2023-test.jsonl", "Validation.jsonl", "latest.jsonl"], &["2023-test.jsonl", "Validation.jsonl"]),
        ] {
            assert_eq!(patterns_of_splits(names), expected, "{names:?}");
        }
        let names = ["train.jsonl", "README.md", "LICENSE", ".gitattributes", "dataset_infos.json", "more.jsonl"];
        assert_eq!(choose("d", None, names).unwrap(), ["more.jsonl", "train.jsonl"]);
        assert_eq!(choose("d", Some("*.md"), names).unwrap(), ["README.md"]);
        let mixed = ["train.jsonl", "test.jsonl"];
        let error = choose("d", None, mixed).unwrap_err().to_string();
        assert!(
            error.contains("Give one of them: d/test.jsonl, d/train.jsonl. A pattern such as d/* takes all"),
            "{error}"
        );
        assert_eq!(choose("d", Some("*"), mixed).unwrap().len(), 2, "a pattern says which");
    }
}
