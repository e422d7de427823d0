//! Models and data from a Hub: what is fetched, what is kept, and what goes wrong on the way.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;
mod server;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

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
fn what_the_hub_does_not_have_is_said() {
    let server = server();
    let user = User::of(&server);
    let fails = |address: &str| user.fails(2, &["data", "stats", address]);
    says(&fails("hf://datasets/o/n@v9/data"), &["no revision `v9`", "404", "hf://datasets/o/n@v9"]);
    says(&fails("hf://datasets/o/other"), &["hf://datasets/o/other", "401", "not there", "HF_TOKEN"]);
    server.fail("o/gone", 1, Fault::Status(404, Vec::new()));
    says(&fails("hf://o/gone/x.jsonl"), &["nothing at hf://o/gone", "404", "hf://datasets/o/gone"]);
    server.fail("resolve", 1, Fault::Status(404, vec![("X-Error-Code", "EntryNotFound".into())]));
    says(&fails("hf://datasets/o/n/data/test-*"), &["data/test-00000-of-00001.jsonl of hf://datasets/o/n", "404"]);
    // somebody else answers
    server.fail("revision", 1, Fault::Body(b"<html>please log in</html>".to_vec()));
    says(
        &user.fails(1, &["data", "stats", "hf://datasets/o/n/data/test-*"]),
        &["does not answer as a Hub", "HF_ENDPOINT"],
    );
}

#[test]
fn a_hub_that_is_busy_is_asked_again() {
    let server = server();
    let user = User::of(&server);
    let address = "hf://datasets/o/n/data/test-*";
    let busy = |wait: &str| Fault::Status(429, vec![("Retry-After", wait.to_owned())]);
    server.fail("revision", 1, busy("2"));
    server.fail("tree", 2, Fault::Status(500, Vec::new()));
    server.fail("resolve", 1, Fault::Status(503, Vec::new()));
    let start = Instant::now();
    let outcome = user.run(&["data", "stats", address]).done();
    assert!(start.elapsed() >= Duration::from_secs(2), "Retry-After is respected");
    says(&outcome.stderr, &["status 429", "Trying again in 2.0 s", "status 500", "status 503"]);
    // a wait of more than a few minutes is the user's to decide on
    server.fail("revision", 1, busy("4000"));
    let start = Instant::now();
    says(&user.fails(1, &["data", "stats", address]), &["hf://datasets/o/n", "429", "Wait 4000 seconds", "HF_TOKEN"]);
    assert!(start.elapsed() < Duration::from_secs(10));
    server.requests();
    server.fail("revision", usize::MAX, Fault::Status(500, Vec::new()));
    says(&user.fails(1, &["data", "stats", address]), &["hf://datasets/o/n", "status 500", "later"]);
    assert_eq!(server.requests().len(), 5, "attempts end");
}

/// The unfinished contents in the cache.
fn incomplete(user: &User<'_>) -> Vec<u64> {
    let blobs = fs::read_dir(user.cached(CACHED).join("blobs")).into_iter().flatten().flatten();
    let unfinished = blobs.filter(|entry| entry.path().extension().is_some_and(|end| end == "incomplete"));
    unfinished.map(|entry| entry.metadata().unwrap().len()).collect()
}

const FIRST: &str = "data/train-00000-of-00002.jsonl";

#[test]
fn a_transfer_that_breaks_goes_on_where_it_was() {
    let server = server();
    let user = User::of(&server);
    let address = format!("hf://datasets/o/n/{FIRST}");
    let ranges = || -> Vec<Option<String>> {
        server.requests().into_iter().filter(|request| request.large).map(|request| request.range).collect()
    };
    server.fail("signed", 2, Fault::Break(700));
    assert_eq!(user.pairs(&address), 30);
    assert_eq!(ranges(), [None, Some("bytes=700-".into()), Some("bytes=1400-".into())]);
    assert_eq!(incomplete(&user), [0; 0]);

    // one that never gets further is an error, and the next call goes on
    let user = User::of(&server);
    server.fail("signed", 1, Fault::Break(700));
    server.fail("signed", 4, Fault::Break(0));
    let outcome = user.run(&["data", "stats", &address]);
    says(
        &outcome.failed(1),
        &["Could not fetch the file", FIRST, "hf://datasets/o/n", "Check the network", "goes on where it was"],
    );
    assert_eq!((snapshot(&user, CACHED, 1), incomplete(&user)), (Vec::<String>::new(), vec![700]));
    server.fail("signed", usize::MAX, Fault::Break(0));
    user.fails(1, &["data", "stats", &address]);
    assert_eq!((snapshot(&user, CACHED, 1), incomplete(&user)), (Vec::<String>::new(), vec![700]));
}

#[test]
fn what_comes_otherwise_than_listed_is_not_used() {
    let server = server();
    let address = format!("hf://datasets/o/n/{FIRST}");
    let stats = ["data", "stats", &address];
    for (body, reason) in [(rows(29), "bytes of it, but the Hub's list"), (rows(31), "bytes of it, but the Hub's list")]
    {
        let user = User::of(&server);
        server.fail("signed", 1, Fault::Body(body));
        says(&user.fails(1, &stats), &[FIRST, "hf://datasets/o/n", reason]);
        assert_eq!(snapshot(&user, CACHED, 1), [""; 0]);
    }
    // of the right size, but not what was listed: once more, then an error
    let user = User::of(&server);
    server.fail("signed", 1, Fault::Flip);
    assert_eq!(user.pairs(&address), 30);
    let user = User::of(&server);
    server.fail("signed", 2, Fault::Flip);
    says(&user.fails(1, &stats), &[FIRST, "not what the Hub's list of files says"]);
    assert_eq!(snapshot(&user, CACHED, 1), [""; 0]);
    // a small file is known by git's hash
    server.fail("test-00000", 2, Fault::Flip);
    says(&user.fails(1, &["data", "stats", "hf://datasets/o/n/data/test-*"]), &["test-00000", "not what"]);

    // what another left behind: wrong bytes, too many of them; a server that knows no ranges
    server.requests();
    for left in [vec![b'x'; 500], vec![b'x'; rows(30).len()], vec![b'x'; rows(30).len() + 1], rows(7)] {
        let user = User::of(&server);
        let hash = {
            user.pairs("hf://datasets/o/n/data/test-*");
            let tree = read_json(user.cached(CACHED).join(format!("trees/{}.json", commit(1))));
            tree["files"][FIRST]["lfs_sha256"].as_str().unwrap().to_owned()
        };
        let blobs = user.cached(CACHED).join("blobs");
        fs::write(blobs.join(format!("{hash}.incomplete")), left).unwrap();
        server.fail("signed", 1, Fault::NoRanges);
        assert_eq!(user.pairs(&address), 30);
        // a whole content that was cut later is fetched again
        fs::write(blobs.join(&hash), rows(3)).unwrap();
        assert_eq!(user.pairs(&address), 30);
        assert_eq!(fs::read(blobs.join(&hash)).unwrap(), rows(30));
        assert_eq!(incomplete(&user), [0; 0]);
    }
}

#[test]
fn a_stopped_process_leaves_what_the_next_goes_on_with() {
    for signal in ["-KILL", "-INT"] {
        let server = server();
        let user = User::of(&server);
        let address = format!("hf://datasets/o/n/{FIRST}");
        let stats = ["data", "stats", &address];
        server.fail("signed", 1, Fault::Hang(900));
        let mut child = user.start(&stats);
        wait_until("a part of the file", || incomplete(&user) == [900]);
        let send = || assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        send();
        if signal == "-INT" {
            // the first asks for the next good moment, which a silent server puts off
            std::thread::sleep(Duration::from_millis(300));
            send();
        }
        child.wait().unwrap();
        assert_eq!((snapshot(&user, CACHED, 1), incomplete(&user)), (Vec::<String>::new(), vec![900]));
        server.requests();
        assert_eq!(user.pairs(&address), 30);
        let ranges: Vec<_> = server.requests().into_iter().filter(|r| r.large).map(|r| r.range).collect();
        assert_eq!(ranges, [Some("bytes=900-".to_owned())]);
    }
}

#[test]
fn two_processes_fetch_a_file_once() {
    let server = server();
    let user = User::of(&server);
    let address = format!("hf://datasets/o/n/{FIRST}");
    let stats = ["data", "stats", &address];
    // the first has a part and waits for its second attempt; meanwhile the second comes
    server.fail("signed", 1, Fault::Break(900));
    server.fail("resolve", 0, Fault::NoRanges);
    let first = user.start(&stats);
    wait_until("a part of the file", || incomplete(&user) == [900]);
    let second = user.start(&stats);
    for child in [first, second] {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let large = server.requests().into_iter().filter(|request| request.large).count();
    assert_eq!(large, 2, "two attempts of the first");
}

#[test]
fn offline_only_the_cache_is_used() {
    let server = server();
    let user = User::of(&server);
    let offline = |arguments: &[&str]| user.run_with(arguments, &[("HF_HUB_OFFLINE", "1")]);
    let train = ["data", "stats", "hf://datasets/o/n/data/train-*"];
    says(&offline(&train).failed(2), &["hf://datasets/o/n", "not in the cache", "HF_HUB_OFFLINE", "HF_HOME"]);
    user.run(&train).done();
    server.requests();
    offline(&train).done();
    offline(&["data", "stats", &format!("hf://datasets/o/n@{}/data/train-*", commit(1))]).done();
    says(&offline(&["data", "stats", "hf://datasets/o/n@v2/data/train-*"]).failed(2), &["@v2 is not in the cache"]);
    says(
        &offline(&["data", "stats", "hf://datasets/o/n/data/*"]).failed(2),
        &["1 of the files", "test-00000", "HF_HUB_OFFLINE"],
    );
    // without the list of files, numbers of parts tell what is missing
    fs::remove_dir_all(user.cached(CACHED).join("trees")).unwrap();
    offline(&train).done();
    fs::remove_file(user.cached(CACHED).join(format!("snapshots/{}/data/train-00001-of-00002.jsonl", commit(1))))
        .unwrap();
    says(&offline(&train).failed(2), &["Of the 2 parts of data/train", "1 are in the cache"]);
    assert_eq!(server.requests(), []);
    // another place for the cache alone
    let elsewhere = folder();
    let variables = [("HF_HUB_CACHE", &*text(elsewhere.path()))];
    user.run_with(&["data", "stats", "hf://datasets/o/n/data/test-*"], &variables).done();
    assert!(elsewhere.path().join(CACHED).join("refs/main").exists());
}

#[test]
fn without_a_network_the_message_says_how_to_go_on() {
    let server = server();
    let user = User::of(&server);
    let nowhere = [("HF_ENDPOINT", "http://127.0.0.1:1")];
    let outcome = user.run_with(&["data", "stats", "hf://datasets/o/n/data/test-*"], &nowhere);
    says(&outcome.failed(1), &["Could not fetch hf://datasets/o/n from http://127.0.0.1:1", "HF_HUB_OFFLINE=1"]);
}

#[test]
fn a_recipe_keeps_the_address_and_the_commit_and_depends_on_the_content() {
    let server = Server::start();
    let base: Vec<(String, Vec<u8>)> =
        files(material().base()).into_iter().map(|(path, content)| (text(&path), content)).collect();
    let model: Vec<(&str, Vec<u8>)> = base.iter().map(|(path, content)| (path.as_str(), content.clone())).collect();
    add(&server, "o/m", 1, &model);
    let mut data = vec![("train.jsonl", rows(40)), ("held-out.txt", b"how do i\n".to_vec())];
    add(&server, DATA, 1, &data);
    let user = User::of(&server);
    let folder = folder();
    let recipe = format!(
        "[model]\nbase = \"hf://o/m\"\n[run]\nout = {:?}\n[data]\nmax_length = 64\nexclude_prompts = [\"hf://datasets/o/n/held-out.txt\"]\n\
         [train]\nbatch_size = 5\n[[step]]\nmetric = \"helpfulness\"\nbeta = 0.5\ndata = \"hf://datasets/o/n/train.jsonl\"\n",
        out(&folder)
    );
    let recipe = file(&folder, "recipe.toml", recipe);
    let run = ["run", &recipe];
    user.run(&run).done();
    let written = fs::read_to_string(folder.path().join("run/recipe.toml")).unwrap();
    says(&written, &["\"hf://o/m\"", "\"hf://datasets/o/n/train.jsonl\"", "\"hf://datasets/o/n/held-out.txt\""]);
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
    add(&server, DATA, 3, &[("train.jsonl", rows(30)), data[1].clone()]);
    says(&user.fails(2, &run), &["made with other data"]);
    let pinned = format!("step.1.data=hf://datasets/o/n@{}/train.jsonl", commit(1));
    let pinned = user.run(&["run", &recipe, "--set", &pinned, "--dry-run", "--json"]).done();
    assert_eq!(object(&pinned.stdout)["stages"][0]["state"], "complete", "{}", pinned.stdout);
}
