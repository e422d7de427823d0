//! Models and data from a Hub: what is fetched, what is kept, and what goes wrong on the way.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;
mod faults;
mod server;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::*;
use serde_json::{Value, json};
use server::{Fault, Server, commit};
use tempfile::TempDir;

/// A cache of its own, and the Hub that it is for.
struct User<'a> {
    home: TempDir,
    server: &'a Server,
}

impl<'a> User<'a> {
    fn of(server: &'a Server) -> Self {
        Self { home: folder(), server }
    }

    /// The variables of the environment, with others after them.
    fn variables(&self, more: &[(&'static str, &str)]) -> Vec<(&'static str, String)> {
        let mut variables: Vec<(&str, String)> = [
            "HF_TOKEN",
            "HF_TOKEN_PATH",
            "HF_HUB_CACHE",
            "HF_HUB_OFFLINE",
            "HTTP_PROXY",
            "ALL_PROXY",
            "http_proxy",
            "all_proxy",
        ]
        .map(|name| (name, String::new()))
        .into();
        variables.push(("HF_HOME", text(self.home.path())));
        variables.push(("HF_ENDPOINT", format!("{}/", self.server.endpoint)));
        variables.extend(more.iter().map(|(name, value)| (*name, (*value).to_owned())));
        variables
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        run_with(arguments, &self.variables(&[]))
    }

    fn run_with(&self, arguments: &[&str], more: &[(&'static str, &str)]) -> Outcome {
        run_with(arguments, &self.variables(more))
    }

    /// The number of pairs at an address.
    fn pairs(&self, address: &str) -> u64 {
        let stats = object(&self.run(&["data", "stats", address, "--json"]).done().stdout);
        stats["counts"]["rows"].as_u64().unwrap()
    }

    fn fails(&self, code: i32, arguments: &[&str]) -> String {
        self.run(arguments).failed(code)
    }

    /// A folder of the cache.
    fn cached(&self, path: &str) -> PathBuf {
        self.home.path().join("hub").join(path)
    }

    /// Starts a command that is not waited for.
    fn start(&self, arguments: &[&str]) -> Child {
        let mut command = Command::new(SACPO);
        command.args(arguments).envs(self.variables(&[])).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }
}

/// Pairs of the world as JSON lines.
fn rows(count: usize) -> Vec<u8> {
    let all = fs::read_to_string(material().data("helpfulness")).unwrap();
    all.lines().take(count).map(|line| format!("{line}\n")).collect::<String>().into()
}

/// The files below a folder of a snapshot, links followed.
fn snapshot(user: &User<'_>, repo: &str, number: usize) -> Vec<String> {
    let folder = user.cached(&format!("{repo}/snapshots/{}", commit(number)));
    if !folder.exists() {
        return Vec::new();
    }
    files(&folder).keys().map(|path| text(path)).collect()
}

const DATA: &str = "datasets/o/n";
const CACHED: &str = "datasets--o--n";

/// A Hub with one data set of two splits and a few other files.
fn server() -> Server {
    let server = Server::start();
    let all: Vec<(&str, Vec<u8>)> = vec![
        ("README.md", b"about".to_vec()),
        (".gitattributes", b"x".to_vec()),
        ("data/train-00000-of-00002.jsonl", rows(30)),
        ("data/train-00001-of-00002.jsonl", rows(12)),
        ("data/test-00000-of-00001.jsonl", rows(2)),
        ("more/é a.json", b"[{\"prompt\": \"p\", \"chosen\": \"a\", \"rejected\": \"b\"}]".to_vec()),
    ];
    add(&server, DATA, 1, &all);
    server
}

fn add(server: &Server, repo: &str, number: usize, files: &[(&str, Vec<u8>)]) {
    let files: Vec<(&str, &[u8])> = files.iter().map(|(path, content)| (*path, content.as_slice())).collect();
    server.add(repo, number, &files);
}

#[test]
fn data_sets_are_fetched_once_and_kept_as_huggingface_hub_keeps_them() {
    let server = server();
    let user = User::of(&server);
    let train = "hf://datasets/o/n/data/train-*";
    let outcome = user.run(&["data", "stats", train, "--json"]).done();
    assert_eq!(object(&outcome.stdout)["counts"]["rows"], 42);
    says(&outcome.stderr, &["hf://datasets/o/n is at commit 0000", "Fetching 2 files of hf://datasets/o/n: "]);
    assert_eq!(
        snapshot(&user, CACHED, 1),
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
        "only what is asked for"
    );
    let cached = user.cached(CACHED);
    assert_eq!(fs::read_to_string(cached.join("refs/main")).unwrap(), commit(1));
    let tree = read_json(cached.join(format!("trees/{}.json", commit(1))));
    assert_eq!((&tree["format_version"], tree["files"].as_object().unwrap().len()), (&json!(1), 6), "pages go on");
    let link = cached.join(format!("snapshots/{}/data/train-00000-of-00002.jsonl", commit(1)));
    let blob = fs::read_link(&link).unwrap();
    let hash = tree["files"]["data/train-00000-of-00002.jsonl"]["lfs_sha256"].as_str().unwrap();
    assert_eq!(blob, Path::new("../../../blobs").join(hash));
    assert_eq!(fs::read(&link).unwrap(), rows(30));

    // the list is known, the contents too
    let contents = |requests: &[server::Request]| requests.iter().filter(|r| r.path.contains("resolve")).count();
    assert_eq!(contents(&server.requests()), 2);
    assert_eq!(user.pairs(train), 42);
    let requests = server.requests();
    assert_eq!((contents(&requests), requests.len()), (0, 1), "{requests:?}");

    // a file, one with a name that must be written otherwise, and another revision
    assert_eq!(user.pairs("hf://datasets/o/n/data/test-00000-of-00001.jsonl"), 2);
    assert_eq!(user.pairs("hf://datasets/o/n/more/é a.json"), 1);
    assert_eq!(user.pairs("hf://datasets/o/n@refs/convert/parquet/more"), 1);
    assert_eq!(fs::read_to_string(cached.join("refs/refs/convert/parquet")).unwrap(), commit(1));
    // a dataset's files may be in a model's repository
    server.add("o/m", 1, &[("p.jsonl", &rows(3))]);
    assert_eq!(user.pairs("hf://o/m/p.jsonl"), 3);
    // prompts too
    let base = material().base();
    let prompts = "hf://datasets/o/n/more/é a.json";
    user.run(&["generate", "--model", &base, "--prompts", prompts, "--max-new-tokens", "2"]).done();
}

#[test]
fn a_revision_is_the_commit_that_it_is_now_and_a_commit_needs_no_network() {
    let server = server();
    let user = User::of(&server);
    assert_eq!(user.pairs("hf://datasets/o/n/data/test-*"), 2);
    add(&server, DATA, 2, &[("data/test.jsonl", rows(4))]);
    assert_eq!(user.pairs("hf://datasets/o/n/data/test*"), 4);
    let pinned = format!("hf://datasets/o/n@{}/data/train-*", commit(1));
    assert_eq!(user.pairs(&pinned), 42);
    assert_eq!(fs::read_to_string(user.cached(CACHED).join("refs/main")).unwrap(), commit(2));
    server.requests();
    assert_eq!(user.pairs(&pinned), 42);
    assert_eq!(server.requests(), []);
    // nor the list of files, where it is one file
    fs::remove_dir_all(user.cached(CACHED).join("trees")).unwrap();
    assert_eq!(user.pairs(&format!("hf://datasets/o/n@{}/data/train-00001-of-00002.jsonl", commit(1))), 12);
    assert_eq!(server.requests(), []);
}

#[test]
fn splits_are_not_mixed_and_what_is_there_is_said() {
    let server = server();
    let user = User::of(&server);
    let fails = |address: &str| user.fails(2, &["data", "stats", address]);
    says(
        &fails("hf://datasets/o/n/data"),
        &[
            "several splits",
            "hf://datasets/o/n/data/test-00000-of-00001.jsonl, hf://datasets/o/n/data/train-*.",
            "data/* takes all",
        ],
    );
    says(
        &fails("hf://datasets/o/n"),
        &["in this very folder, only in folders", "hf://datasets/o/n/data/train-*", "hf://datasets/o/n/more."],
    );
    assert_eq!(user.pairs("hf://datasets/o/n/data/*"), 44);
    assert_eq!(user.pairs("hf://datasets/o/n/more"), 1);
    says(&fails("hf://datasets/o/n/data/dev-*"), &["No file matches hf://datasets/o/n/data/dev-*"]);
    says(
        &fails("hf://datasets/o/n/data/train-00000-of-0002.jsonl"),
        &[
            "nothing at the path",
            "Did you mean hf://datasets/o/n/data/train-00000-of-00002.jsonl?",
            "Data are at hf://",
        ],
    );
    says(&fails("hf://datasets/o/n/dat"), &["nothing at the path dat", "Did you mean hf://datasets/o/n/data?"]);
    says(&fails("hf://datasets/o"), &["owner and repository", "hf://datasets/OWNER/NAME"]);
    server.add("datasets/o/p", 1, &[("README.md", b""), ("a.arrow", b"x"), ("dataset_infos.json", b"{}")]);
    says(&fails("hf://datasets/o/p"), &["no data files", "refs/convert/parquet"]);
    server.add("datasets/o/q", 1, &[("a.jsonl", &rows(1)), ("b.zip", b"")]);
    says(&fails("hf://datasets/o/q"), &["other kinds", "b.zip", "hf://datasets/o/q/*.jsonl"]);
    assert_eq!(user.pairs("hf://datasets/o/q/*.jsonl"), 1);
}

#[test]
fn of_a_model_only_what_is_read_is_fetched() {
    let server = Server::start();
    let base: Vec<(String, Vec<u8>)> =
        files(material().base()).into_iter().map(|(path, content)| (text(&path), content)).collect();
    let mut all: Vec<(&str, Vec<u8>)> = base.iter().map(|(path, content)| (path.as_str(), content.clone())).collect();
    for path in ["pytorch_model.bin", "README.md", "onnx/model.onnx", "consolidated.safetensors", "sub/config.json"] {
        all.push((path, b"no".to_vec()));
    }
    add(&server, "o/m", 1, &all);
    let user = User::of(&server);
    let to = folder();
    let rows = file(&to, "rows.jsonl", rows(3));
    user.run(&["data", "inspect", &rows, "--model", "hf://o/m"]).done();
    let mut needed: Vec<&str> = base.iter().map(|(path, _)| path.as_str()).collect();
    needed.retain(|path| *path != "model.safetensors");
    assert_eq!(snapshot(&user, "models--o--m", 1), needed, "a tokenizer needs no weights");
    user.run(&["model", "convert", "hf://o/m", &at(&to, "copy")]).done();
    needed = base.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(snapshot(&user, "models--o--m", 1), needed);
    assert_eq!(weights(to.path().join("copy")), weights(material().base()));
    // the same in a folder of the repository, its weights cut in two
    let mut parts: Vec<(String, Vec<u8>)> =
        base.iter().map(|(path, content)| (format!("a/{path}"), content.clone())).collect();
    parts.retain(|(path, _)| path != "a/model.safetensors");
    let whole = base.iter().find(|(path, _)| path == "model.safetensors").unwrap().1.clone();
    let index = json!({"weight_map": {"x": "part-1.safetensors", "y": "part-1.safetensors"}});
    parts.push(("a/model.safetensors.index.json".into(), index.to_string().into()));
    parts.push(("a/part-1.safetensors".into(), whole));
    parts.push(("a/other.safetensors".into(), b"no".to_vec()));
    let parts: Vec<(&str, Vec<u8>)> = parts.iter().map(|(path, content)| (path.as_str(), content.clone())).collect();
    add(&server, "o/m", 2, &parts);
    user.run(&["model", "inspect", "hf://o/m/a"]).done();
    assert!(snapshot(&user, "models--o--m", 2).contains(&"a/part-1.safetensors".to_owned()));
    assert!(!snapshot(&user, "models--o--m", 2).contains(&"a/other.safetensors".to_owned()));
    let mixed = format!("mix(hf://o/m/a, hf://o/m@{}, 0.5)", commit(1));
    user.run(&["generate", "--model", &mixed, "--prompt", "how do i", "--max-new-tokens", "2"]).done();

    let fails = |address: &str| user.fails(2, &["model", "inspect", address]);
    says(&fails("hf://o/m"), &["no config.json", "hf://o/m/a."]);
    says(&fails("hf://o/m/a/config.json"), &["no model, but one file"]);
    says(&fails("hf://o/m/b"), &["hf://o/m"]);
    server.add("o/g", 1, &[("q4.gguf", b"GGUF"), ("README.md", b"")]);
    says(&fails("hf://o/g"), &["Give one of these models: hf://o/g/q4.gguf"]);
    says(&fails("hf://o/g/q4.gguf"), &["q4.gguf", "GGUF"]);
    server.add("o/b", 1, &[("config.json", b"{}"), ("pytorch_model.bin", b"x")]);
    says(&fails("hf://o/b"), &["no weights in .safetensors", "pytorch_model.bin", "save_pretrained"]);
    says(&fails("hf://datasets/o/b"), &["is a data set"]);
    says(&fails("o/m"), &["no model at o/m", "hf://o/m"]);
}

#[test]
fn a_token_goes_to_the_hub_and_nowhere_else() {
    let server = server();
    server.gate(DATA, "secret");
    let user = User::of(&server);
    let stats = ["data", "stats", "hf://datasets/o/n/data/train-*"];
    let page = format!("{}/datasets/o/n", server.endpoint);
    says(
        &user.fails(2, &stats),
        &["hf://datasets/o/n", "train-00000-of-00002.jsonl", "401", "set HF_TOKEN", &page, "is restricted"],
    );
    says(&user.run_with(&stats, &[("HF_TOKEN", "wrong")]).failed(2), &["403", "is not valid or may not read", &page]);
    assert_eq!(snapshot(&user, CACHED, 1), [""; 0]);
    server.requests();
    user.run_with(&stats, &[("HF_TOKEN", "secret")]).done();
    let requests = server.requests();
    assert!(requests.iter().any(|request| request.large));
    for request in requests {
        assert_eq!(request.token.is_some(), !request.large, "{request:?}");
    }
    // from the file of `hf auth login`, through a redirect of a repository that has moved
    let other = User::of(&server);
    fs::write(other.home.path().join("token"), "secret\n").unwrap();
    for part in ["/api/datasets/o/n/revision", "/datasets/o/n/resolve"] {
        let location = match part.contains("api") {
            true => format!("/moved{part}/main"),
            false => format!("{}/moved{part}/{}/data/train-00001-of-00002.jsonl", server.endpoint, commit(1)),
        };
        server.fail(part, 1, Fault::Status(307, vec![("Location", location)]));
    }
    assert_eq!(other.pairs("hf://datasets/o/n/data/train-00001-of-00002.jsonl"), 12);
    let requests = server.requests();
    let moved = requests.iter().filter(|request| request.path.starts_with("/moved"));
    assert_eq!(
        moved.map(|request| request.token.clone()).collect::<Vec<_>>(),
        [Some("secret".to_owned()), Some("secret".to_owned())]
    );
}

#[test]
fn a_recipe_keeps_the_address_and_the_commit_and_depends_on_the_content() {
    let server = Server::start();
    let base: Vec<(String, Vec<u8>)> =
        files(material().base()).into_iter().map(|(path, content)| (text(&path), content)).collect();
    let model: Vec<(&str, Vec<u8>)> = base.iter().map(|(path, content)| (path.as_str(), content.clone())).collect();
    add(&server, "o/m", 1, &model);
    let mut data = vec![
        ("train.jsonl", rows(40)),
        ("test.jsonl", b"{\"prompt\": \"hello !\", \"chosen\": \"bake bread\", \"rejected\": \"sorry\"}".to_vec()),
        ("prompts.txt", b"how do i\n".to_vec()),
    ];
    add(&server, DATA, 1, &data);
    let user = User::of(&server);
    let folder = folder();
    let recipe = format!(
        "[model]\nbase = \"hf://o/m\"\n[run]\nout = {:?}\n[data]\nmax_length = 64\nexclude_prompts = [\"hf://datasets/o/n/prompts.txt\"]\n\
         [train]\nbatch_size = 5\n[[step]]\nmetric = \"helpfulness\"\nbeta = 0.5\ndata = \"hf://datasets/o/n/train.jsonl\"\n\
         validation_data = \"hf://datasets/o/n/test.jsonl\"\n",
        out(&folder)
    );
    let recipe = file(&folder, "recipe.toml", recipe);
    let run = ["run", &recipe];
    says(&user.run(&run).done().stderr, &["40 pairs to train on, 1 held out, from hf://datasets/o/n/train.jsonl."]);
    let written = fs::read_to_string(folder.path().join("run/recipe.toml")).unwrap();
    says(
        &written,
        &[
            "\"hf://o/m\"",
            "\"hf://datasets/o/n/train.jsonl\"",
            "\"hf://datasets/o/n/test.jsonl\"",
            "\"hf://datasets/o/n/prompts.txt\"",
        ],
    );
    let made: Value = read_json(folder.path().join("run/steps/helpfulness/checkpoint/provenance.json"));
    assert_eq!((&made["data"], &made["data_commit"]), (&json!("hf://datasets/o/n/train.jsonl"), &json!(commit(1))));
    let from = &made["from"][0];
    assert_eq!((&from["path"], &from["commit"]), (&json!("hf://o/m"), &json!(commit(1))));

    // another commit with the same data
    data.push(("README.md", b"new".to_vec()));
    add(&server, DATA, 2, &data);
    says(&user.run(&run).done().stderr, &[&commit(2), "is finished. Nothing is done"]);
    says(&user.run_with(&run, &[("HF_HUB_OFFLINE", "1")]).done().stderr, &["is finished"]);
    // and with other data
    add(&server, DATA, 3, &[("train.jsonl", rows(30)), data[1].clone(), data[2].clone()]);
    says(&user.fails(2, &run), &["made with other data"]);
    let pinned = format!("step.1.data=hf://datasets/o/n@{}/train.jsonl", commit(1));
    let pinned = user.run(&["run", &recipe, "--set", &pinned, "--dry-run", "--json"]).done();
    assert_eq!(object(&pinned.stdout)["stages"][0]["state"], "complete", "{}", pinned.stdout);
}
