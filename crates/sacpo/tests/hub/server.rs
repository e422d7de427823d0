//! A small Hub on this machine: its interface, its files, and a second server that large files are redirected to.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// A repository: `datasets/OWNER/NAME`, or `OWNER/NAME` of a model.
struct Repo {
    /// Commits by branch or tag; a commit is one of itself.
    refs: BTreeMap<String, String>,
    /// The files of each commit.
    commits: BTreeMap<String, BTreeMap<String, File>>,
    /// The token that it takes, if it takes one only.
    token: Option<String>,
}

#[derive(Clone)]
struct File {
    content: Vec<u8>,
    /// Whether it is redirected to the other server.
    large: bool,
}

/// What goes wrong with a request.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Another status, with these headers.
    Status(u16, Vec<(&'static str, String)>),
    /// The connection ends after so many bytes of the body.
    Break(usize),
    /// After so many bytes of the body nothing more comes for a minute.
    Hang(usize),
    /// Another body, with its own size.
    Body(Vec<u8>),
    /// Another body, said to have the right size.
    Flip,
    /// All of it, although a part was asked for.
    NoRanges,
}

/// A request that was answered.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Request {
    /// Whether it came to the server of large files.
    pub(crate) large: bool,
    /// The path with the query.
    pub(crate) path: String,
    pub(crate) token: Option<String>,
    pub(crate) range: Option<String>,
}

#[derive(Default)]
struct State {
    repos: BTreeMap<String, Repo>,
    /// Part of a path, what goes wrong with it, and how often.
    faults: Vec<(String, Fault, usize)>,
    requests: Vec<Request>,
}

/// The running servers; they end with the test program.
pub(crate) struct Server {
    state: Arc<Mutex<State>>,
    /// The address of the Hub.
    pub(crate) endpoint: String,
}

/// The commit of the so many-th state of a repository.
pub(crate) fn commit(number: usize) -> String {
    format!("{number:040x}")
}

impl Server {
    pub(crate) fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let [hub, other] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let (endpoint, elsewhere) = (address(&hub), address(&other));
        for (listener, large) in [(hub, false), (other, true)] {
            let (state, here, elsewhere) = (Arc::clone(&state), endpoint.clone(), elsewhere.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (state, here, elsewhere) = (Arc::clone(&state), here.clone(), elsewhere.clone());
                    std::thread::spawn(move || answer(stream, &state, large, &here, &elsewhere));
                }
            });
        }
        Self { state, endpoint }
    }

    /// Adds commit `number` of a repository, to which `main` then leads. Files of 1000 bytes and more are large ones.
    pub(crate) fn add(&self, repo: &str, number: usize, files: &[(&str, &[u8])]) {
        let mut state = self.state.lock().unwrap();
        let repo = state.repos.entry(repo.to_owned()).or_insert_with(|| Repo {
            refs: BTreeMap::new(),
            commits: BTreeMap::new(),
            token: None,
        });
        let files = files.iter().map(|(path, content)| {
            ((*path).to_owned(), File { content: content.to_vec(), large: content.len() >= 1000 })
        });
        repo.commits.insert(commit(number), files.collect());
        for name in ["main", "refs/convert/parquet", &commit(number)] {
            repo.refs.insert(name.to_owned(), commit(number));
        }
    }

    /// Lets only those read a repository's files who have a token.
    pub(crate) fn gate(&self, repo: &str, token: &str) {
        self.state.lock().unwrap().repos.get_mut(repo).unwrap().token = Some(token.to_owned());
    }

    /// Lets requests whose path has this part go wrong so many times.
    pub(crate) fn fail(&self, part: &str, times: usize, fault: Fault) {
        self.state.lock().unwrap().faults.push((part.to_owned(), fault, times));
    }

    /// Takes the requests since the last time.
    pub(crate) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl File {
    fn git(&self) -> String {
        let content =
            if self.large { format!("pointer to {}", self.sha256()).into_bytes() } else { self.content.clone() };
        hex(&Sha1::digest([format!("blob {}\0", content.len()).as_bytes(), &content].concat()))
    }

    fn sha256(&self) -> String {
        hex(&Sha256::digest(&self.content))
    }

    fn listed(&self, path: &str) -> Value {
        let mut listed = json!({"type": "file", "path": path, "oid": self.git(), "size": self.content.len()});
        if self.large {
            listed["lfs"] = json!({"oid": self.sha256(), "size": self.content.len(), "pointerSize": 130});
        }
        listed
    }
}

/// Status, headers and body.
struct Response(u16, Vec<(&'static str, String)>, Vec<u8>);

fn no(status: u16, code: &str, message: &str) -> Response {
    Response(status, vec![("X-Error-Code", code.into()), ("X-Error-Message", message.into())], Vec::new())
}

/// What the Hub answers to a request.
fn respond(state: &State, path: &str, token: Option<&str>, here: &str, elsewhere: &str) -> Response {
    let path = path.strip_prefix("/moved").unwrap_or(path);
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    let path = path.replace("%2F", "/").replace("%20", " ").replace("%C3%A9", "é");
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let (kind, parts) = match &parts[..] {
        ["api", "datasets", rest @ ..] | ["datasets", rest @ ..] => ("datasets/", rest),
        ["api", "models", rest @ ..] => ("", rest),
        rest => ("", rest),
    };
    let [owner, name, what, rest @ ..] = parts else { return no(404, "", "") };
    let Some(repo) = state.repos.get(&format!("{kind}{owner}/{name}")) else {
        return no(401, "RepoNotFound", "Repository not found");
    };
    let rest = rest.join("/");
    let allowed = repo.token.as_deref().is_none_or(|needed| token == Some(needed));
    // the longest revision first, since one may hold slashes
    let revision = repo.refs.keys().rev().find(|name| rest == **name || rest.starts_with(&format!("{name}/")));
    let Some(revision) = revision else { return no(404, "RevisionNotFound", "Invalid rev id") };
    let commit = &repo.refs[revision];
    let files = &repo.commits[commit];
    match *what {
        "revision" => Response(200, Vec::new(), json!({"id": "x", "sha": commit, "siblings": []}).to_string().into()),
        // three files a page
        "tree" => {
            let start = query.split('&').find_map(|part| part.strip_prefix("cursor=")?.parse().ok()).unwrap_or(0);
            let page: Vec<Value> = files.iter().skip(start).take(3).map(|(path, file)| file.listed(path)).collect();
            let next = format!("<{here}{path}?recursive=true&cursor={}>; rel=\"next\"", start + 3);
            let headers = if start + 3 < files.len() { vec![("Link", next)] } else { Vec::new() };
            Response(200, headers, Value::from(page).to_string().into())
        }
        "resolve" if !allowed => {
            no(if token.is_some() { 403 } else { 401 }, "GatedRepo", "Access to this repository is restricted")
        }
        "resolve" => match files.get(&rest[revision.len()..].trim_start_matches('/').to_owned()) {
            None => no(404, "EntryNotFound", "Entry not found"),
            Some(file) if file.large => {
                let location = format!("{elsewhere}/{}?signed=1", file.sha256());
                Response(302, vec![("Location", location)], b"Found. Redirecting".to_vec())
            }
            Some(file) => Response(200, Vec::new(), file.content.clone()),
        },
        _ => no(404, "", ""),
    }
}

/// Answers one request and closes the connection.
fn answer(mut stream: TcpStream, state: &Mutex<State>, large: bool, here: &str, elsewhere: &str) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap().to_owned();
    let (mut token, mut range) = (None, None);
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').unwrap();
        match &*name.to_lowercase() {
            "authorization" => token = value.trim().strip_prefix("Bearer ").map(str::to_owned),
            "range" => range = Some(value.trim().to_owned()),
            _ => {}
        }
    }
    let (mut response, fault) = {
        let mut state = state.lock().unwrap();
        let known = Request { large, path: path.clone(), token: token.clone(), range: range.clone() };
        state.requests.push(known);
        let fault = state.faults.iter_mut().find(|(part, _, times)| path.contains(part.as_str()) && *times > 0);
        let fault = fault.map(|(_, fault, times)| {
            *times -= 1;
            fault.clone()
        });
        let response = if large {
            let hash = path.trim_start_matches('/').split('?').next().unwrap();
            let mut files =
                state.repos.values().flat_map(|repo| repo.commits.values()).flat_map(|files| files.values());
            files
                .find(|file| file.sha256() == hash)
                .map_or_else(|| no(403, "", "expired"), |file| Response(200, Vec::new(), file.content.clone()))
        } else {
            respond(&state, &path, token.as_deref(), here, elsewhere)
        };
        (response, fault)
    };
    let start = range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    if let Some(start) = start.filter(|_| response.0 == 200 && !matches!(fault, Some(Fault::NoRanges))) {
        let all = response.2.len();
        response.0 = 206;
        response.1.push(("Content-Range", format!("bytes {start}-{}/{all}", all - 1)));
        response.2.drain(..start);
    }
    let mut sent = usize::MAX;
    match &fault {
        Some(Fault::Status(status, headers)) => response = Response(*status, headers.clone(), Vec::new()),
        Some(Fault::Break(bytes) | Fault::Hang(bytes)) => sent = *bytes,
        Some(Fault::Body(body)) => response.2.clone_from(body),
        Some(Fault::Flip) => response.2.iter_mut().for_each(|byte| *byte ^= 1),
        Some(Fault::NoRanges) | None => {}
    }
    let Response(status, headers, body) = response;
    let mut head = format!("HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    let body = &body[..body.len().min(sent)];
    // who asked may have gone
    let _ = stream.write_all(format!("{head}\r\n").as_bytes()).and_then(|()| stream.write_all(body));
    let _ = stream.flush();
    if let Some(Fault::Hang(_)) = fault {
        std::thread::sleep(Duration::from_secs(60));
    }
}
