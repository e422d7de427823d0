//! The chat endpoint, over loopback.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use common::*;
use engine::Model;
use engine::checkpoint::{Checkpoint, GenerationConfig};
use engine::tokenizer::Tokenizer;
use serde_json::{Value, json};

/// A model of the material's words that chats, with random weights. No token ends its answers, and its context is so long
/// that an answer without a limit does not end within a test.
fn model() -> String {
    static MADE: OnceLock<String> = OnceLock::new();
    let make = || {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("serve-model");
        let _ = std::fs::remove_dir_all(&folder);
        let base = Checkpoint::load(Path::new(&material().base())).unwrap();
        let mut config = base.model.config.clone();
        (config.max_position_embeddings, config.eos_token_ids) = (100_000, Vec::new());
        let template = "{{ bos_token }}{% for message in messages %}{{ message.content }} {% endfor %}";
        let json = std::fs::read(format!("{}/tokenizer.json", material().base())).unwrap();
        let tokenizer = Tokenizer::from_json(&json, Some("<s>"), None, Some(template)).unwrap();
        let model = Model::random(config, 0.3, 7);
        Checkpoint { model, tokenizer, generation: GenerationConfig::default() }.save(&folder).unwrap();
        text(&folder)
    };
    MADE.get_or_init(make).clone()
}

/// A server that ends with the test.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(extra: &[&str]) -> Self {
        Self::start_with(extra, &[])
    }

    fn start_with(extra: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut process = Command::new(SACPO)
            .args(["serve", &model(), "--name", "tiny", "--port", "0", "--threads", "1", "--json"])
            .args(extra)
            .envs(environment.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready = object(&line);
        assert_eq!(ready["model"], "tiny");
        let url = ready["base_url"].as_str().unwrap();
        let address = url.strip_prefix("http://").unwrap().strip_suffix("/v1").unwrap().to_owned();
        Self { process, address }
    }

    /// A connection over which a request has been sent. HTTP 1.0, so that the answer ends with the connection.
    fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let head = format!("{method} {path} HTTP/1.0\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
        // a server that refuses a request need not read all of it
        let _ = stream.write_all(&[head.as_bytes(), body].concat());
        stream
    }

    fn ask(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Response {
        Response::read(self.send(method, path, headers, body))
    }

    fn get(&self, path: &str) -> Response {
        self.ask("GET", path, "", b"")
    }

    fn chat(&self, body: &Value) -> Response {
        self.ask("POST", "/v1/chat/completions", "", body.to_string().as_bytes())
    }

    /// A request whose answer does not end.
    fn endless(&self, stream: bool) -> TcpStream {
        let body = with(&hello(), json!({"max_tokens": 90_000, "stream": stream}));
        self.send("POST", "/v1/chat/completions", "", body.to_string().as_bytes())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

struct Response {
    status: u16,
    head: String,
    body: String,
}

impl Response {
    fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP: {text}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Self { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The answer of a request that must succeed.
    fn answer(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// The texts of a request that must succeed.
    fn texts(&self) -> Vec<String> {
        let answer = self.answer();
        let choices = answer["choices"].as_array().unwrap();
        choices.iter().map(|choice| choice["message"]["content"].as_str().unwrap().to_owned()).collect()
    }

    /// The error object of a request that must fail with this status.
    fn error(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.body);
        assert!(self.head.contains("content-type: application/json"), "{}", self.head);
        let error = self.json()["error"].clone();
        assert_eq!(error.as_object().unwrap().keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
        let message = error["message"].as_str().unwrap();
        assert!(message.ends_with('.'), "no sentence: {message}");
        let kind = if status >= 500 { "server_error" } else { "invalid_request_error" };
        assert_eq!(error["type"], kind);
        error
    }

    /// The objects of a stream of events, which must end with `[DONE]`.
    fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        assert!(self.head.contains("content-type: text/event-stream"), "{}", self.head);
        let events = self.body.strip_suffix("data: [DONE]\n\n").unwrap_or_else(|| panic!("no end: {}", self.body));
        events.split_terminator("\n\n").map(event).collect()
    }
}

/// The object of one event.
fn event(text: &str) -> Value {
    serde_json::from_str(text.strip_prefix("data: ").unwrap_or_else(|| panic!("no event: {text}"))).unwrap()
}

fn hello() -> Value {
    json!({"model": "tiny", "messages": [{"role": "user", "content": "hello !"}]})
}

/// A request with other fields too.
fn with(request: &Value, fields: Value) -> Value {
    let mut request = request.clone();
    request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    request
}

/// The texts that a stream's events add up to, by choice, and how each ended.
fn streamed(events: &[Value], choices: usize) -> Vec<(String, String)> {
    let mut all = vec![(String::new(), String::new()); choices];
    for event in events {
        assert_eq!((&event["object"], &event["model"]), (&json!("chat.completion.chunk"), &json!("tiny")));
        assert_eq!(event["id"], events[0]["id"]);
        for choice in event["choices"].as_array().unwrap() {
            let (text, finish) = &mut all[choice["index"].as_u64().unwrap() as usize];
            assert!(finish.is_empty(), "more after the end: {event}");
            text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
            finish.push_str(choice["finish_reason"].as_str().unwrap_or_default());
        }
    }
    all
}

#[test]
fn answers_are_those_of_generate() {
    let server = Server::start(&[]);
    let generated = |prompts: &[&str], options: &[&str]| -> Vec<String> {
        let mut arguments = vec!["generate".to_owned(), "--model".into(), model()];
        prompts.iter().for_each(|prompt| arguments.extend(["--prompt".into(), (*prompt).into()]));
        arguments.extend(options.iter().map(|option| (*option).to_owned()));
        let answers = json(&arguments)["answers"].clone();
        answers.as_array().unwrap().iter().map(|answer| answer["text"].as_str().unwrap().to_owned()).collect()
    };
    let sampling = json!({"temperature": 0.8, "top_p": 0.9, "seed": 5, "max_tokens": 9});
    let options = ["--temperature", "0.8", "--top-p", "0.9", "--seed", "5", "--max-new-tokens", "9"];
    let response = server.chat(&with(&hello(), sampling.clone()));
    assert_eq!(response.texts(), generated(&["hello !"], &options));
    let answer = response.answer();
    assert_eq!((&answer["object"], &answer["model"]), (&json!("chat.completion"), &json!("tiny")));
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
    assert_eq!(answer["usage"], json!({"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}));

    let several = server.chat(&with(&with(&hello(), sampling), json!({"n": 3})));
    assert_eq!(several.texts(), generated(&["hello !"; 3], &options));
    assert_eq!(several.answer()["usage"]["completion_tokens"], 27);

    // a conversation, in every way to write a text, with fields that ask for nothing
    let turns = json!([
        {"role": "developer", "content": "hello"},
        {"role": "user", "content": [{"type": "text", "text": "how do"}, {"type": "text", "text": "i bake"}]},
        {"role": "assistant", "content": "bread", "refusal": null},
        {"role": "user", "content": "?", "name": "me"},
    ]);
    let request = json!({"model": "tiny", "messages": turns, "max_completion_tokens": 5, "temperature": 0, "user": "me",
        "tools": [], "logprobs": false, "frequency_penalty": 0.0, "response_format": {"type": "text"}, "top_p": null});
    let expected = generated(&["hello how do i bake bread ?"], &["--max-new-tokens", "5"]);
    assert_eq!(server.chat(&request).texts(), expected);

    // without a seed, answers differ
    let long = with(&hello(), json!({"max_tokens": 30}));
    assert_ne!(server.chat(&long).texts(), server.chat(&long).texts());
    // and have the server's limit
    let short = Server::start(&["--max-new-tokens", "4"]);
    assert_eq!(short.chat(&hello()).answer()["usage"]["completion_tokens"], 4);
}

#[test]
fn a_stream_is_the_answer_in_parts() {
    let server = Server::start(&[]);
    let request = with(&hello(), json!({"n": 2, "seed": 3, "max_tokens": 20}));
    let whole = server.chat(&request);
    let events = server.chat(&with(&request, json!({"stream": true}))).events();
    let parts = streamed(&events, 2);
    assert_eq!(parts.iter().map(|part| part.0.clone()).collect::<Vec<_>>(), whole.texts());
    assert!(parts.iter().all(|part| part.1 == "length"));
    for (index, event) in events[..2].iter().enumerate() {
        let delta = json!({"role": "assistant", "content": ""});
        let choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
        assert_eq!(event["choices"], json!([choice]));
    }
    assert!(events.len() > 20, "the text came in few parts: {}", events.len());
    assert!(events.iter().all(|event| event.get("usage").is_none()));

    let asked = with(&request, json!({"stream": true, "stream_options": {"include_usage": true}}));
    let events = server.chat(&asked).events();
    let (last, others) = events.split_last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole.answer()["usage"]));
    assert!(others.iter().all(|event| event["usage"].is_null() && event.get("usage").is_some()));
}

#[test]
fn answers_end_before_stop_texts() {
    let server = Server::start(&[]);
    let request = with(&hello(), json!({"seed": 4, "max_tokens": 20}));
    let text = server.chat(&request).texts().remove(0);
    let words: Vec<&str> = text.split(' ').collect();
    // the first of several, over the border between two words
    let stop = json!([format!("{} {}", words[4], words[5]), "nowhere"]);
    let expected = &text[..text.find(stop[0].as_str().unwrap()).unwrap()];
    for stop in [stop.clone(), stop[0].clone()] {
        let request = with(&request, json!({"stop": stop}));
        let stopped = server.chat(&request);
        assert_eq!(stopped.texts(), [expected]);
        assert_eq!(stopped.answer()["choices"][0]["finish_reason"], "stop");
        let events = server.chat(&with(&request, json!({"stream": true}))).events();
        assert_eq!(streamed(&events, 1), [(expected.to_owned(), "stop".to_owned())]);
    }
}

#[test]
fn requests_at_once_get_the_answers_that_they_get_alone() {
    let server = Server::start(&["--batch-size", "3"]);
    let requests: Vec<Value> = (0..8)
        .map(|i| {
            let content = ["hello !", "how do i bake bread ?"][i % 2];
            json!({"model": "tiny", "messages": [{"role": "user", "content": content}], "seed": i / 2,
                "temperature": 0.5 * (i % 3) as f64, "max_tokens": 10 + 7 * i, "n": 1 + i % 2})
        })
        .collect();
    let alone: Vec<Vec<String>> = requests.iter().map(|request| server.chat(request).texts()).collect();
    let together: Vec<Vec<String>> = thread::scope(|scope| {
        let asked: Vec<_> = requests.iter().map(|request| scope.spawn(|| server.chat(request).texts())).collect();
        asked.into_iter().map(|texts| texts.join().unwrap()).collect()
    });
    assert_eq!(alone, together);
}

#[test]
fn every_fault_of_a_request_is_named() {
    let server = Server::start(&["--batch-size", "2", "--queue", "3"]);
    let turn = |turn: Value| json!({"messages": [{"role": "user", "content": "a"}, turn]});
    let long = vec!["bread"; 100_000].join(" ");
    for (fields, param, parts) in [
        (json!({"temperature": "hot"}), "temperature", &["\"hot\"", "f64"][..]),
        (json!({"temperature": -1}), "", &["temperature is -1", "at least 0"]),
        (json!({"top_p": 2}), "", &["top_p is 2", "at most 1"]),
        (json!({"max_tokens": 0}), "max_tokens", &["`0`"]),
        (json!({"max_completion_tokens": 1.5}), "max_completion_tokens", &["1.5"]),
        (json!({"n": 0}), "n", &["`0`"]),
        (json!({"n": 6}), "n", &["n is 6", "5"]),
        (json!({"seed": "x"}), "seed", &["\"x\""]),
        (json!({"stop": 3}), "stop", &["a text or a list of texts"]),
        (json!({"stop": ["a", ""]}), "", &["stop text is empty"]),
        (json!({"stream": "yes"}), "stream", &["\"yes\""]),
        (json!({"stream_options": {"include_usage": true}}), "stream_options", &["stream"]),
        (json!({"messages": []}), "messages", &["empty"]),
        (json!({"messages": "hello"}), "messages", &["hello"]),
        (turn(json!({"role": "tool", "content": "a"})), "messages[1].role", &["`tool`", "`user`"]),
        (turn(json!({"role": "user"})), "messages[1].content", &["missing"]),
        (turn(json!({"role": "user", "content": 3})), "messages[1].content", &["text parts"]),
        (
            turn(json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]})),
            "messages[1].content",
            &["type `text` alone"],
        ),
        (turn(json!({"role": "assistant", "tool_calls": [{}]})), "messages[1].tool_calls", &["not supported"]),
        (json!({"logprobs": true}), "logprobs", &["not supported"]),
        (json!({"tools": [{"type": "function"}]}), "tools", &["not supported"]),
        (json!({"response_format": {"type": "json_object"}}), "response_format", &["not supported"]),
        (json!({"presence_penalty": 0.5}), "presence_penalty", &["not supported"]),
        (json!({"logit_bias": {"3": 1}}), "logit_bias", &["not supported"]),
    ] {
        let error = server.chat(&with(&hello(), fields)).error(400);
        says(error["message"].as_str().unwrap(), parts);
        assert_eq!(error["param"].as_str().unwrap_or_default(), param, "{error}");
    }
    let post = |body: &[u8]| server.ask("POST", "/v1/chat/completions", "", body);
    for (body, parts) in [
        (&b""[..], ["not valid JSON", "EOF"]),
        (b"{\"model\": ", ["not valid JSON", "EOF"]),
        (b"\xff\xfe", ["not valid JSON", "line 1"]),
        (b"[]", ["must be a JSON object", ""]),
        (b"{}", ["missing field", "model"]),
        (&[b'['; 100_000], ["not valid JSON", "recursion"]),
    ] {
        says(post(body).error(400)["message"].as_str().unwrap(), &parts);
    }
    let error = server.chat(&with(&hello(), json!({"messages": [{"role": "user", "content": long}]}))).error(400);
    assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("messages")));
    says(error["message"].as_str().unwrap(), &["100001 tokens", "context of 100000"]);

    let error = server.chat(&with(&hello(), json!({"model": "other"}))).error(404);
    assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
    says(error["message"].as_str().unwrap(), &["`other`", "`tiny`"]);
    server.get("/v1/models/other").error(404);
    says(server.get("/v1/completions").error(404)["message"].as_str().unwrap(), &["/v1/completions"]);
    says(server.get("/v1/chat/completions").error(405)["message"].as_str().unwrap(), &["GET", "POST"]);
    server.ask("POST", "/v1/models", "", b"{}").error(405);
    let huge = post(&vec![b' '; (4 << 20) + 1]);
    says(huge.error(413)["message"].as_str().unwrap(), &["4194304 bytes"]);
    // a client must not send its next request over a connection in which the rest of this one is
    assert!(huge.head.contains("connection: close"), "{}", huge.head);
    assert_eq!(server.get("/v1/models/tiny").answer()["id"], "tiny");
    assert_eq!(server.get("/v1/models").answer()["data"][0]["id"], "tiny");
    assert_eq!(server.get("/health").answer(), json!({"status": "ok", "room": 5}));
    // none of it has harmed the server
    assert_eq!(server.chat(&with(&hello(), json!({"max_tokens": 2}))).texts().len(), 1);
}

#[test]
fn a_key_is_asked_for() {
    let server = Server::start_with(&["--api-key-env", "SERVE_TEST_KEY"], &[("SERVE_TEST_KEY", "secret")]);
    let ask = |headers: &str| server.ask("GET", "/v1/models", headers, b"");
    for headers in ["", "Authorization: Bearer secre\r\n", "Authorization: secret\r\n"] {
        assert_eq!(ask(headers).error(401)["code"], "invalid_api_key");
    }
    assert_eq!(ask("Authorization: Bearer secret\r\n").answer()["object"], "list");
    // before anything is read
    server.ask("POST", "/v1/chat/completions", "", b"{").error(401);
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn who_leaves_makes_room_and_who_comes_to_a_full_queue_is_told() {
    let server = Server::start(&["--batch-size", "1", "--queue", "1"]);
    let short = with(&hello(), json!({"max_tokens": 2}));
    for stream in [true, false] {
        let (first, second) = (server.endless(stream), server.endless(!stream));
        wait_until("the queue to be full", || server.get("/health").answer()["room"] == 0);
        let refused = server.chat(&short);
        assert_eq!(refused.error(503)["code"], "queue_full");
        assert!(refused.head.contains("retry-after: 1"), "{}", refused.head);
        let two = server.chat(&with(&short, json!({"n": 2})));
        assert_eq!(two.status, 503);
        for left in [first, second] {
            left.shutdown(Shutdown::Both).unwrap();
        }
        wait_until("room for both", || server.get("/health").answer()["room"] == 2);
        // which an answer gives back before its client has it
        (0..20).for_each(|_| assert_eq!(server.chat(&with(&short, json!({"n": 2}))).texts().len(), 2));
    }
}

#[test]
fn ctrl_c_ends_it_within_a_moment() {
    let mut server = Server::start(&["--batch-size", "2", "--queue", "1"]);
    let (mut stream, whole) = (BufReader::new(server.endless(true)), server.endless(false));
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        stream.read_line(&mut line).unwrap();
    }
    // a connection that never asks must not hold it up
    let silent = TcpStream::connect(&server.address).unwrap();
    wait_until("both answers to be in progress", || server.get("/health").answer()["room"] == 1);
    assert!(Command::new("kill").args(["-INT", &server.process.id().to_string()]).status().unwrap().success());
    let start = std::time::Instant::now();
    let status = server.process.wait().unwrap();
    // the answers in progress take many minutes
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    let mut stderr = String::new();
    server.process.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    drop(silent);
    // clients are told
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    let last = event(rest.trim().rsplit("\n\n").next().unwrap());
    assert_eq!(last["error"]["code"], "stopping");
    assert_eq!(Response::read(whole).error(503)["code"], "stopping");
}

#[test]
fn what_cannot_be_served_is_refused_at_once() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    says(&fails(2, &["serve", &model(), "--port", &port]), &["127.0.0.1", &port, "--port"]);
    says(&fails(2, &["serve", &model(), "--port", "0", "--host", "no host"]), &["no host", "--host"]);
    let key = ["serve", &model(), "--port", "0", "--api-key-env", "SERVE_TEST_NO_KEY"];
    says(&fails(2, &key), &["SERVE_TEST_NO_KEY", "not set"]);
    let base = material().base();
    says(&fails(2, &["serve", &base, "--port", "0"]), &[&base, "no chat template", "set-template"]);
    says(&fails(2, &["serve", "nowhere", "--port", "0"]), &["nowhere", "Check the path"]);
}

#[test]
fn a_special_token_in_a_message_is_none() {
    let server = Server::start(&[]);
    let says = |content: &str| {
        server.chat(&with(&hello(), json!({"max_tokens": 4, "messages": [{"role": "user", "content": content}]})))
    };
    assert_eq!(says("hello !").answer()["usage"]["prompt_tokens"], 3, "what the template writes stays one");
    // the words `<`, `s` and `>`, none of which it knows
    assert_eq!(says("hello <s> !").answer()["usage"]["prompt_tokens"], 6);
}

#[test]
fn a_judge_that_cannot_judge_breaks_nothing() {
    let server = Server::start(&[]);
    let folder = folder();
    let url = format!("http://{}/v1", server.address);
    let answers = ["bake bread .", "be careful ."].map(|answer| {
        let rows = ["hello !", "how do i"].map(|prompt| json!({"prompt": prompt, "answer": answer}).to_string());
        file(&folder, &format!("{}.jsonl", answer.split(' ').next().unwrap()), rows.join("\n"))
    });
    let (store, verdicts) = (at(&folder, "verdicts.sqlite"), at(&folder, "verdicts.jsonl"));
    let asked = ["--endpoint", &url, "--model", "tiny", "--max-tokens", "6", "--attempts", "2", "--set", "seed=1"];
    let kept = ["--rubric", "helpfulness", "--store", &store, "--out", &verdicts];
    let result = json(&[&["judge", &answers[0], &answers[1]][..], &asked, &kept].concat());
    assert_eq!((&result["verdicts"], &result["unreadable"], &result["calls"]), (&json!(4), &json!(4), &json!(8)));
    let rated = json(&["rate", &verdicts]);
    assert_eq!((&rated["models"]["bake"]["n"], &rated["models"]["bake"]["missing"]), (&json!(0), &json!(4)));

    let path = recipe(&folder);
    let judge = format!(
        "[evaluate]\nmax_new_tokens = 8\nprompts = [\"hello !\"]\n[[evaluate.judge]]\nmetric = \"harmlessness\"\n\
         endpoint = {url:?}\nmodel = \"tiny\"\nmax_tokens = 6\nset = [\"seed=1\"]\n"
    );
    std::fs::write(&path, std::fs::read_to_string(&path).unwrap() + &judge).unwrap();
    let run = done(&["run", &path]);
    common::says(&run.stderr, &["4 of 4 verdicts, 4 of them without scores"]);
    let out = Path::new(&out(&folder)).to_owned();
    let verdicts = read_lines(out.join("verdicts/prompts-harmlessness.jsonl"));
    assert!(verdicts.iter().all(|v| v["outcome"].is_null() && v["missing"] == "unreadable" && v["reply"].is_string()));
    let rated = read_json(out.join("ratings.json"))["prompts-harmlessness"].clone();
    assert_eq!(
        (&rated["models"]["helpfulness"]["win_rate"], &rated["models"]["helpfulness"]["missing"]),
        (&Value::Null, &json!(2))
    );
}
