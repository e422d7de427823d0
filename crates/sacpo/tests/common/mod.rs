//! Running the command, and the small models and data that its tests share.

// each test file uses a part
#![allow(dead_code, unused_imports, clippy::unwrap_used, clippy::expect_used)]

#[path = "../../../engine/tests/common/shared_data.rs"]
mod shared_data;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use align::world::{BOS, EOS, Metric, World, json_lines};
use engine::Model;
use engine::checkpoint::{Checkpoint, GenerationConfig};
use engine::tokenizer::Tokenizer;
use serde_json::Value;
use tempfile::TempDir;

pub(crate) use shared_data::{shared, smollm2};

/// The program under test.
pub(crate) const SACPO: &str = env!("CARGO_BIN_EXE_sacpo");

/// What a finished command left.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs the command; a panic, a signal or ten minutes of work fail the test.
pub(crate) fn run<A: AsRef<str>>(arguments: &[A]) -> Outcome {
    run_with(arguments, &[])
}

/// The same with these environment variables.
pub(crate) fn run_with<A: AsRef<str>>(arguments: &[A], variables: &[(&str, String)]) -> Outcome {
    let arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
    let mut command = assert_cmd::Command::new(SACPO);
    command.args(&arguments).envs(variables.iter().cloned()).timeout(Duration::from_secs(600));
    let output = command.output().expect("it starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("output is UTF-8");
    let (stdout, stderr) = (text(output.stdout), text(output.stderr));
    assert!(!stderr.contains("panicked"), "{arguments:?} panicked:\n{stderr}");
    let code = output.status.code().unwrap_or_else(|| panic!("{arguments:?} was ended by a signal:\n{stderr}"));
    Outcome { code, stdout, stderr }
}

/// Runs a command that must succeed.
pub(crate) fn done<A: AsRef<str>>(arguments: &[A]) -> Outcome {
    run(arguments).done()
}

/// Runs a command with `--json`, which must print one object on one line and nothing else.
pub(crate) fn json<A: AsRef<str>>(arguments: &[A]) -> Value {
    let mut arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
    arguments.push("--json");
    object(&done(&arguments).stdout)
}

/// The one JSON object that standard output must be.
pub(crate) fn object(stdout: &str) -> Value {
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    let value: Value = serde_json::from_str(stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"));
    assert!(value.is_object(), "{value}");
    value
}

/// Runs a command that must fail with this exit code, print nothing, and end with a one-paragraph message: returned.
pub(crate) fn fails<A: AsRef<str>>(code: i32, arguments: &[A]) -> String {
    run(arguments).failed(code)
}

impl Outcome {
    /// The outcome, which must be success.
    pub(crate) fn done(self) -> Self {
        assert_eq!(self.code, 0, "{}", self.stderr);
        self
    }

    /// The message of a failure, as [`fails`] says.
    pub(crate) fn failed(&self, code: i32) -> String {
        let Self { stdout, stderr, .. } = self;
        assert_eq!((self.code, stdout.as_str()), (code, ""), "{stderr}");
        let (_, message) = stderr.rsplit_once("error: ").unwrap_or_else(|| panic!("no message: {stderr}"));
        assert_eq!(message.trim_end().lines().count(), 1, "more than one paragraph: {message}");
        assert!(message.trim_end().ends_with(['.', '?']), "no sentence: {message}");
        message.trim_end().to_owned()
    }
}

/// A message must contain all of these.
pub(crate) fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is missing: {message}");
    }
}

/// A base model and pairs to align it with.
pub(crate) struct Material {
    folder: PathBuf,
}

impl Material {
    /// The model: the size of the quickstart's, random weights, a context of 64 tokens, a tokenizer of words without a
    /// chat template.
    pub(crate) fn base(&self) -> String {
        text(&self.folder.join("base"))
    }

    /// A file of 400 pairs: `helpfulness` or `safety`.
    pub(crate) fn data(&self, metric: &str) -> String {
        text(&self.folder.join(format!("{metric}.jsonl")))
    }
}

/// What the tests of a file train with; made once, and never changed.
pub(crate) fn material() -> &'static Material {
    static MADE: OnceLock<Material> = OnceLock::new();
    MADE.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-material", env!("CARGO_CRATE_NAME")));
        let _ = fs::remove_dir_all(&folder);
        let world = World::new(0);
        let tokenizer = Tokenizer::from_json(&world.tokenizer_json(), Some("<s>"), Some("</s>"), None).unwrap();
        let generation =
            GenerationConfig { bos_token_id: Some(BOS), eos_token_ids: vec![EOS], ..GenerationConfig::default() };
        let base = Checkpoint { model: Model::random(world.model_config(), 0.1, 0), tokenizer, generation };
        base.save(&folder.join("base")).unwrap();
        for (name, metric) in [("helpfulness", Metric::Reward), ("safety", Metric::Safety)] {
            let pairs = json_lines(&world.preference_pairs(metric, 400, 0)).unwrap();
            fs::write(folder.join(format!("{name}.jsonl")), pairs).unwrap();
        }
        Material { folder }
    })
}

/// A recipe of two short steps, about a second of training.
pub(crate) fn recipe(folder: &TempDir) -> String {
    let made = material();
    let text = format!(
        "[model]\nbase = {:?}\n[run]\nout = {:?}\n[data]\nmax_length = 64\nmax_pairs = 120\n[train]\n\
         learning_rate = 1e-3\nbatch_size = 5\nsave_every = 4\n[[step]]\nmetric = \"helpfulness\"\nbeta = 0.5\n\
         data = {:?}\n[[step]]\nmetric = \"safety\"\nbeta_over_lambda = 0.25\ndata = {:?}\n",
        made.base(),
        out(folder),
        made.data("helpfulness"),
        made.data("safety"),
    );
    let path = folder.path().join("recipe.toml");
    fs::write(&path, text).unwrap();
    self::text(&path)
}

/// Where [`recipe`] puts its run.
pub(crate) fn out(folder: &TempDir) -> String {
    at(folder, "run")
}

/// A path in a folder.
pub(crate) fn at(folder: &TempDir, name: &str) -> String {
    text(&folder.path().join(name))
}

/// A file in a folder; its path.
pub(crate) fn file(folder: &TempDir, name: &str, contents: impl AsRef<[u8]>) -> String {
    let path = folder.path().join(name);
    fs::write(&path, contents).unwrap();
    text(&path)
}

pub(crate) fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

pub(crate) fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// A JSON file.
pub(crate) fn read_json(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The rows of a JSON lines file.
pub(crate) fn read_lines(path: impl AsRef<Path>) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Every file below a folder and its bytes, by path, but for TensorBoard's, which hold times, one for each part of a training.
pub(crate) fn files(folder: impl AsRef<Path>) -> BTreeMap<PathBuf, Vec<u8>> {
    fn visit(root: &Path, folder: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                visit(root, &path, files);
            } else if !path.file_name().is_some_and(|name| name.to_string_lossy().contains("tfevents")) {
                files.insert(path.strip_prefix(root).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    let mut all = BTreeMap::new();
    visit(folder.as_ref(), folder.as_ref(), &mut all);
    all
}

/// The weights of every checkpoint below a folder.
pub(crate) fn weights(folder: impl AsRef<Path>) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = files(folder);
    files.retain(|path, _| path.file_name().is_some_and(|name| name == "model.safetensors"));
    assert!(!files.is_empty());
    files
}

/// A copy of the base model, to damage.
pub(crate) fn copy_of_base(folder: &TempDir) -> String {
    let copy = folder.path().join("model");
    fs::create_dir(&copy).unwrap();
    for (name, bytes) in files(material().base()) {
        fs::write(copy.join(name), bytes).unwrap();
    }
    text(&copy)
}

/// Waits until a condition holds.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
