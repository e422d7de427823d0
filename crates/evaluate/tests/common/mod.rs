//! An OpenAI-compatible endpoint on loopback that judges by a fixed rule, and misbehaves as it is told to.

// each test file uses a part
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};

/// What the endpoint does with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Act {
    /// Replies with two scores.
    Judge,
    /// Replies with a text instead, served like any other reply.
    Say(String),
    /// Answers a status, with a `Retry-After` header and a body.
    Status(u16, Option<String>, String),
    /// Does not answer until the client goes away.
    Hang,
    /// Answers what is no JSON, with status 200.
    Garbage,
    /// Answers a whole body that is half of the JSON.
    HalfJson,
    /// Closes the connection in the middle of the body.
    HalfBody,
    /// Closes the connection without an answer.
    Close,
}

impl Act {
    pub(crate) fn status(code: u16) -> Self {
        Self::Status(code, None, json!({"error": {"message": "No."}}).to_string())
    }
}

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
    /// How many requests with this body there were before.
    pub(crate) before: usize,
    /// How many requests there were before.
    pub(crate) number: usize,
}

/// What it saw and did.
#[derive(Debug, Default)]
pub(crate) struct Log {
    /// All requests, in the order in which they came.
    pub(crate) requests: Vec<Request>,
    /// The bodies of those whose reply was written completely.
    pub(crate) served: Vec<String>,
}

impl Log {
    /// How often every body was served.
    pub(crate) fn counts(&self) -> HashMap<&str, usize> {
        let mut counts = HashMap::new();
        for body in &self.served {
            *counts.entry(body.as_str()).or_default() += 1;
        }
        counts
    }
}

type Rule = dyn Fn(&Request) -> Act + Send + Sync;

/// The endpoint; its threads end with the test.
pub(crate) struct FakeEndpoint {
    pub(crate) url: String,
    log: Arc<Mutex<Log>>,
}

impl FakeEndpoint {
    /// Starts an endpoint that does with every request what the rule says.
    pub(crate) fn start(rule: impl Fn(&Request) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Log::default()));
        let (rule, shared): (Arc<Rule>, _) = (Arc::new(rule), log.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (rule, log) = (rule.clone(), shared.clone());
                // a client that was killed is no failure
                std::thread::spawn(move || while serve(&stream, &*rule, &log).is_some() {});
            }
        });
        Self { url, log }
    }

    pub(crate) fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap()
    }
}

/// Serves one request; nothing when the connection ends with it.
fn serve(mut stream: &TcpStream, rule: &Rule, log: &Mutex<Log>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|count| *count > 0)?;
    let path = line.split(' ').nth(1)?.to_owned();
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let mut body = vec![0; headers.get("content-length")?.parse().ok()?];
    reader.read_exact(&mut body).ok()?;
    let body = String::from_utf8(body).unwrap();
    let request = {
        let mut log = log.lock().unwrap();
        let before = log.requests.iter().filter(|request| request.body == body).count();
        let request = Request { headers, body, before, number: log.requests.len() };
        log.requests.push(request.clone());
        request
    };
    let mut respond = |status: u16, headers: &str, declared: usize, body: &str| {
        let head = format!(
            "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {declared}\r\n{headers}\r\n"
        );
        stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).ok()
    };
    if path != "/v1/chat/completions" {
        return respond(404, "", 9, "not found");
    }
    let reply = |text: &str| {
        let tokens = json!({"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110});
        let message = json!({"role": "assistant", "content": text});
        json!({"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": message}], "usage": tokens})
            .to_string()
    };
    let judged = reply(&judge(&request.body));
    match rule(&request) {
        act @ (Act::Judge | Act::Say(_)) => {
            let body = if let Act::Say(text) = act { reply(&text) } else { judged };
            // the lock keeps what is counted and what is written together
            let mut log = log.lock().unwrap();
            respond(200, "", body.len(), &body)?;
            log.served.push(request.body);
        }
        Act::Status(code, retry_after, body) => {
            let header = retry_after.map(|wait| format!("Retry-After: {wait}\r\n")).unwrap_or_default();
            respond(code, &header, body.len(), &body)?;
        }
        Act::Hang => {
            let _ = reader.read(&mut [0]);
            return None;
        }
        Act::Garbage => respond(200, "", 15, "<html>oh</html>")?,
        Act::HalfJson => respond(200, "", judged.len() / 2, &judged[..judged.len() / 2])?,
        Act::HalfBody => {
            respond(200, "", judged.len(), &judged[..judged.len() / 2])?;
            let _ = stream.shutdown(Shutdown::Both);
            return None;
        }
        Act::Close => {
            let _ = stream.shutdown(Shutdown::Both);
            return None;
        }
    }
    Some(())
}

/// The judge's rule: every answer has the score of its own text, as it stands between the markers of the request.
fn judge(body: &str) -> String {
    let body: Value = serde_json::from_str(body).unwrap();
    let text = body["messages"][0]["content"].as_str().unwrap();
    let (_, rest) = text.split_once("The code of the marker lines is ").unwrap();
    let code = rest.split('.').next().unwrap();
    let [first, second] = ["answer A", "answer B"].map(|name| {
        let lines: Vec<&str> = text.split('\n').collect();
        let place = |what: &str| {
            let marker = format!("[{code} {what} {name}]");
            let mut places = lines.iter().enumerate().filter(|(_, line)| **line == marker).map(|(place, _)| place);
            let place = places.next().unwrap();
            assert_eq!(places.next(), None, "two markers of {name}");
            place
        };
        score(&lines[place("begin") + 1..place("end")].join("\n"))
    });
    format!("{first} {second}\nThe scores of the texts, not those that they ask for.")
}

/// What the judge gives to a text: 0, 0.5, …, 10.
pub(crate) fn score(text: &str) -> f64 {
    let hash = text.bytes().fold(17u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    f64::from(hash % 21) / 2.0
}
