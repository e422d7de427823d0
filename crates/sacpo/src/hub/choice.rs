//! Which files of a repository a data set or a model needs.

use std::collections::{BTreeMap, BTreeSet};

use align::data::{choose, is_about_data, patterns_of_splits};
use engine::{Error, Result};
use serde_json::Value;

use super::address::{Address, Repo};
use sacpo::suggest::nearest;

/// How the names of data files end, compressed or not.
const DATA: [&str; 5] = [".jsonl", ".json", ".parquet", ".csv", ".txt"];

/// Addresses that a message lists at most.
const LISTED: usize = 12;

const INDEX: &str = "model.safetensors.index.json";

/// The files of a data set: one; those that match a pattern; or the data of a folder, if it is of one split.
///
/// # Errors
/// If there are none, or several splits, or a folder has files of another kind. Each says what to write instead.
pub(super) fn data(address: &Address, paths: &[String]) -> Result<Vec<String>> {
    let Address { repo, path } = address;
    if paths.contains(path) {
        return Ok(vec![path.clone()]);
    }
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    let (folder, pattern) = if name.contains('*') { (folder, Some(name)) } else { (&**path, None) };
    let names = names_in(folder, paths);
    if names.is_empty() && !paths.iter().any(|path| below(folder, path).is_some()) {
        return Err(nothing_there(address, folder, paths));
    }
    if pattern.is_none() && !names.iter().any(|name| is_data(name)) {
        let listed = match &*data_sets(repo, folder, paths) {
            [] => format!(
                " nor in those below. Many data sets are there as Parquet too, at hf://{}@refs/convert/parquet.",
                repo.page()
            ),
            sets => format!(", only in folders below it. Give one of these: {}", listed(sets)),
        };
        return Err(Error::input(format!(
            "{address} has no data files ({}) in this very folder{listed}",
            DATA.join(", ")
        )));
    }
    let chosen = choose(&at(repo, folder), pattern, names)?;
    if let Some(other) = chosen.iter().find(|name| pattern.is_none() && !is_data(name)) {
        return Err(Error::input(format!(
            "{address} has files of other kinds among its data, such as {other}. Give a file, or a pattern for those that are data \
             ({}), such as {}/*{}.",
            DATA.join(", "),
            at(repo, folder),
            DATA[0]
        )));
    }
    Ok(chosen.into_iter().map(|name| join(folder, name)).collect())
}

/// The files of a model but for its weights, from which [`weights`] tells those; or one GGUF file.
///
/// # Errors
/// If there is none. It says what to write instead.
pub(super) fn model(address: &Address, paths: &[String]) -> Result<Vec<String>> {
    let Address { repo, path: folder } = address;
    let is_gguf = |path: &str| path.to_lowercase().ends_with(".gguf");
    if paths.contains(folder) {
        if is_gguf(folder) {
            return Ok(vec![folder.clone()]);
        }
        return Err(Error::input(format!(
            "{address} is no model, but one file. Give the repository or the folder that holds config.json, or a .gguf file."
        )));
    }
    let names = names_in(folder, paths);
    if names.contains(&"config.json") || names.contains(&"adapter_config.json") {
        return Ok(names.into_iter().filter(|name| is_beside_weights(name)).map(|name| join(folder, name)).collect());
    }
    let models: Vec<String> = paths
        .iter()
        .filter_map(|path| {
            let name = path.rsplit('/').next().unwrap_or_default();
            let model = if name == "config.json" { path.strip_suffix("/config.json")? } else { path };
            (is_gguf(path) || name == "config.json").then(|| at(repo, model))
        })
        .collect();
    if models.is_empty() && names.is_empty() {
        return Err(nothing_there(address, folder, paths));
    }
    Err(Error::input(match &*models {
        [] => format!("{address} holds neither config.json nor a .gguf file, so there is no model that can be read."),
        models => format!("{address} holds no config.json. Give one of these models: {}", listed(models)),
    }))
}

/// The files of a model's weights, or of an adapter's; `read` gives the content of one that is fetched.
///
/// # Errors
/// If there are none that can be read.
pub(super) fn weights(
    address: &Address,
    paths: &[String],
    read: impl FnOnce(&str) -> Result<Vec<u8>>,
) -> Result<Vec<String>> {
    let folder = &*address.path;
    let names = names_in(folder, paths);
    let single = |name: &&str| names.contains(name);
    // in the order in which they are looked for when they are read
    if let Some(name) = ["model.safetensors"].into_iter().find(single) {
        return Ok(vec![join(folder, name)]);
    }
    if names.contains(&INDEX) {
        let index: Option<Value> = serde_json::from_slice(&read(&join(folder, INDEX))?).ok();
        let map = index.as_ref().and_then(|index| index["weight_map"].as_object());
        let shards: BTreeSet<&str> = map.into_iter().flat_map(|map| map.values()).filter_map(Value::as_str).collect();
        let lacking = shards.iter().find(|shard| !names.contains(shard));
        if let (false, None) = (shards.is_empty(), lacking) {
            return Ok(shards.into_iter().map(|shard| join(folder, shard)).collect());
        }
        return Err(Error::input(format!(
            "The index {INDEX} of {address} {}. The repository is not complete; ask its owner, or take another one.",
            lacking.map_or("names no files".to_owned(), |shard| format!("names {shard}, which is not there"))
        )));
    }
    if let Some(name) = ["adapter_model.safetensors"].into_iter().find(single) {
        return Ok(vec![join(folder, name)]);
    }
    let other =
        names.iter().find(|name| [".bin", ".pt", ".pth", ".h5", ".msgpack"].iter().any(|end| name.ends_with(end)));
    Err(Error::input(format!(
        "{address} has no weights in .safetensors files{}. Load it by `from_pretrained` of the Python package transformers and save \
         it by `save_pretrained`, which writes them; or look for such files in its pull requests, hf://{}@refs/pr/NUMBER.",
        other.map_or(String::new(), |other| format!(", only such as {other}, which are not read")),
        address.repo.page()
    )))
}

/// Whether a file, by its name, belongs to a model, and is none of its weights.
fn is_beside_weights(name: &str) -> bool {
    const NAMES: [&str; 5] =
        ["config.json", "generation_config.json", "adapter_config.json", "special_tokens_map.json", INDEX];
    NAMES.contains(&name) || name.starts_with("tokenizer") || name.starts_with("chat_template")
}

/// Whether a file, by its name, may be one of a data set.
fn is_data(name: &str) -> bool {
    let lower = name.to_lowercase();
    let plain = [".gz", ".zst"].iter().find_map(|end| lower.strip_suffix(end)).unwrap_or(&lower);
    !name.starts_with('.') && !is_about_data(name) && DATA.iter().any(|end| plain.ends_with(end))
}

/// The files directly in a folder.
fn names_in<'a>(folder: &str, paths: &'a [String]) -> Vec<&'a str> {
    paths.iter().filter_map(|path| below(folder, path)).filter(|name| !name.contains('/')).collect()
}

/// A path as it is seen from a folder above it.
fn below<'a>(folder: &str, path: &'a str) -> Option<&'a str> {
    if folder.is_empty() { Some(path) } else { path.strip_prefix(folder)?.strip_prefix('/') }
}

fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}

fn at(repo: &Repo, path: &str) -> String {
    Address { repo: repo.clone(), path: path.to_owned() }.to_string()
}

/// Addresses of data below a folder: a folder each, or a split of one.
fn data_sets(repo: &Repo, folder: &str, paths: &[String]) -> Vec<String> {
    let mut folders: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for path in paths.iter().filter(|path| below(folder, path).is_some()) {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        if is_data(name) {
            folders.entry(folder).or_default().push(name);
        }
    }
    let sets = folders.into_iter().flat_map(|(folder, names)| match patterns_of_splits(&names) {
        splits if splits.is_empty() => vec![folder.to_owned()],
        splits => splits.iter().map(|split| join(folder, split)).collect(),
    });
    sets.map(|path| at(repo, &path)).collect()
}

/// Says that an address leads nowhere, and what is like it.
fn nothing_there(address: &Address, path: &str, paths: &[String]) -> Error {
    let repo = &address.repo;
    let folders: BTreeSet<&str> = paths.iter().filter_map(|path| Some(path.rsplit_once('/')?.0)).collect();
    let like = nearest(path, paths.iter().map(String::as_str).chain(folders));
    let like = like.map_or(String::new(), |path| format!(" Did you mean {}?", at(repo, path)));
    let sets = match &*data_sets(repo, "", paths) {
        [] => String::new(),
        sets => format!(" Data are at {}", listed(sets)),
    };
    Error::input(format!("{repo} has nothing at the path {path}.{like} Check the path.{sets}"))
}

/// Some addresses as the end of a sentence.
fn listed(addresses: &[String]) -> String {
    let first = addresses[..addresses.len().min(LISTED)].join(", ");
    match addresses.len().saturating_sub(LISTED) {
        0 => format!("{first}."),
        more => format!("{first} (and {more} more)."),
    }
}
