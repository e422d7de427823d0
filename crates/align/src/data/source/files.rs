//! The files that a path of a recipe or a command names.

use std::path::{Path, PathBuf};

use engine::{Error, Result};

/// The files of a data set: the path itself; or all files of a folder; or all files whose name matches a pattern, in which
/// `*` stands for any characters. They come in the order of their names.
///
/// Hidden files and folders in the folder are left out. A folder or a pattern without a file is an error.
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let (folder, pattern) = if path.is_dir() {
        (path, "*")
    } else if name.contains('*') && !path.exists() {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        (folder.unwrap_or(Path::new(".")), &*name)
    } else {
        return Ok(vec![path.to_owned()]);
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let file = entry.map_err(Error::io("read", folder))?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with('.') && matches(pattern, &name) && !file.is_dir() {
            files.push(file);
        }
    }
    files.sort_unstable();
    if files.is_empty() {
        return Err(Error::input(if path.is_dir() {
            format!(
                "The folder {} holds no files. Check the path; files in folders inside it are not read.",
                path.display()
            )
        } else {
            format!(
                "No file matches {}. Check the folder and the pattern: `*` stands for any characters of a file's name.",
                path.display()
            )
        }));
    }
    Ok(files)
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
    use super::matches;

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
}
