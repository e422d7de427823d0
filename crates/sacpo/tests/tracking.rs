//! What becomes of trainings when a tracking server is not there or refuses. With real ones it is `scripts/check_tracking.py`.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use common::{folder, out, read_json, read_lines, recipe, run_with, says};
use serde_json::{Value, json};

/// An MLflow server as far as trainings need it; it takes metrics while `open` holds.
struct Server {
    address: String,
    open: Arc<AtomicBool>,
    /// Paths and bodies of the requests.
    log: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (open, log) = (Arc::new(AtomicBool::new(true)), Arc::new(Mutex::new(Vec::new())));
        let (is_open, written) = (open.clone(), log.clone());
        // ends with the tests
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.unwrap());
                let (mut head, mut length) = (Vec::new(), 0);
                for line in stream.by_ref().lines().map(Result::unwrap).take_while(|line| !line.is_empty()) {
                    if let Some(number) = line.to_lowercase().strip_prefix("content-length: ") {
                        length = number.parse().unwrap();
                    }
                    head.push(line);
                }
                let mut body = vec![0; length];
                stream.read_exact(&mut body).unwrap();
                let body: Value = serde_json::from_slice(&body).unwrap_or_default();
                let path = head[0].split(' ').nth(1).unwrap().trim_start_matches("/api/2.0/mlflow/").to_owned();
                let refused = !is_open.load(Ordering::SeqCst) && body.get("metrics").is_some();
                let missing = path.starts_with("experiments/get-by-name");
                let (status, answer) = match path.as_str() {
                    _ if refused => ("500 Oh", json!({"error_code": "INTERNAL_ERROR", "message": "the disk is full"})),
                    _ if missing => ("404 No", json!({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"})),
                    "experiments/create" => ("200 OK", json!({"experiment_id": "7"})),
                    "runs/create" => ("200 OK", json!({"run": {"info": {"run_id": "abc"}}})),
                    _ => ("200 OK", json!({})),
                };
                written.lock().unwrap().push((path, body));
                let answer = answer.to_string();
                let head =
                    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", answer.len());
                stream.get_mut().write_all((head + &answer).as_bytes()).unwrap();
            }
        });
        Self { address, open, log }
    }

    /// The bodies of all requests to a path.
    fn sent(&self, path: &str) -> Vec<Value> {
        let log = self.log.lock().unwrap();
        log.iter().filter(|(of, _)| of == path).map(|(_, body)| body.clone()).collect()
    }
}

fn tracked_to(address: &str) -> [(&'static str, String); 1] {
    [("MLFLOW_TRACKING_URI", address.to_owned())]
}

/// A server of something else, which answers everything with a page.
fn web_server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let _ = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).count();
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>");
        }
    });
    address
}

#[test]
fn every_number_reaches_the_server() {
    let (server, folder) = (Server::start(), folder());
    run_with(&["run", &recipe(&folder), "--set", "train.validate_every=10"], &tracked_to(&server.address)).done();
    let experiment = &server.sent("experiments/create")[0];
    assert_eq!(experiment["name"], "Default");
    let created = server.sent("runs/create");
    assert_eq!(created.iter().map(|run| &run["run_name"]).collect::<Vec<_>>(), ["helpfulness", "safety-0.25"]);
    let batches = server.sent("runs/log-batch");
    let parameters = batches.iter().find_map(|batch| batch["params"].as_array()).unwrap();
    assert!(parameters.contains(&json!({"key": "temperature", "value": "0.5"})), "{parameters:?}");
    let metrics: Vec<&Value> = batches.iter().filter_map(|batch| batch["metrics"].as_array()).flatten().collect();
    let mut numbers = 0;
    for name in ["helpfulness", "safety-0.25"] {
        for record in read_lines(format!("{}/steps/{name}/metrics.jsonl", out(&folder))) {
            for (key, value) in record.as_object().unwrap().iter().filter(|(key, _)| *key != "step") {
                let value = value.as_f64().unwrap();
                let same = |metric: &&&Value| {
                    metric["key"] == **key
                        && metric["step"] == record["step"]
                        && metric["value"].as_f64() == Some(value)
                };
                assert!(metrics.iter().any(|metric| same(&metric)), "{name}: {key} of step {}", record["step"]);
                numbers += 1;
            }
        }
    }
    assert_eq!(metrics.len(), numbers);
    let ends: Vec<Value> = server.sent("runs/update").iter().map(|run| run["status"].clone()).collect();
    assert_eq!(ends, ["FINISHED", "FINISHED"]);
    assert_eq!(read_json(format!("{}/steps/helpfulness/mlflow.json", out(&folder)))["run_id"], "abc");
}

#[test]
fn a_training_outlives_its_server() {
    let (server, folder) = (Server::start(), folder());
    server.open.store(false, Ordering::SeqCst);
    let outcome = run_with(&["run", &recipe(&folder)], &tracked_to(&server.address)).done();
    says(&outcome.stderr, &["does not take what is sent: status 500", "the disk is full", "Training goes on"]);
    let steps = read_lines(format!("{}/steps/helpfulness/metrics.jsonl", out(&folder))).len();
    says(&outcome.stderr, &[&format!("The metrics of {steps} steps did not reach"), "metrics.jsonl"]);
}

#[test]
fn a_server_that_cannot_be_used_is_named_before_training() {
    let folder = folder();
    let recipe = recipe(&folder);
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (uri, parts) in [
        (format!("http://{free}"), &["MLFLOW_TRACKING_URI", "cannot be used", "unset"][..]),
        ("file:./mlruns".into(), &["MLFLOW_TRACKING_URI", "`file`", "mlflow server"]),
        ("postgresql://user:secret@host/db".into(), &["MLFLOW_TRACKING_URI", "`postgresql`", "mlflow server"]),
        (format!("http://user:secret@{free}"), &["MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD"]),
        (web_server(), &["MLFLOW_TRACKING_URI", "does not answer as MLflow does"]),
    ] {
        let message = run_with(&["run", &recipe], &tracked_to(&uri)).failed(2);
        says(&message, parts);
        assert!(!message.contains("secret"), "{message}");
        assert!(!std::path::Path::new(&out(&folder)).join("steps/helpfulness/metrics.jsonl").exists());
    }
}
