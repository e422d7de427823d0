//! Metrics to an MLflow tracking server, over its REST interface (version 2.0).

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use engine::checkpoint::atomic;
use engine::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::header;

use super::{About, numbers_of};
use crate::ui;

const URI: &str = "MLFLOW_TRACKING_URI";

/// A server that takes longer is not waited for.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Between two deliveries.
const PAUSE: Duration = Duration::from_secs(2);

/// The most metrics that a request may have.
const MOST_METRICS: usize = 1000;

/// The longest value of a parameter, in characters.
const LONGEST_VALUE: usize = 6000;

/// Names the run of a training in its folder, so that a training that goes on goes on in the same run.
const FILE: &str = "mlflow.json";

/// A tracking server.
pub(super) struct Server {
    agent: Agent,
    /// Its address without a slash at the end.
    address: String,
    authorization: Option<String>,
    /// The name of the experiment that runs belong to.
    experiment: String,
}

/// Why a request was not fulfilled.
struct Refusal {
    /// MLflow's own name of the error, if it sent one.
    code: String,
    message: String,
}

impl Server {
    /// The server that `MLFLOW_TRACKING_URI` names, if it is set.
    ///
    /// # Errors
    /// A URI of another kind.
    pub(super) fn from_environment() -> Result<Option<Self>> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let Some(uri) = variable(URI) else { return Ok(None) };
        let address = uri.trim().trim_end_matches('/').to_owned();
        // of what is refused only the scheme is shown, for there may be a password in it
        let (scheme, rest) = address.split_once(':').unwrap_or((&address, ""));
        if !["http", "https"].contains(&scheme) || !rest.starts_with("//") {
            return Err(Error::input(format!(
                "{URI} names no server at http:// or https://, but something of the kind `{scheme}`, and only servers can be tracked \
                 to. Start one with `mlflow server` and set the variable to its address, or unset it."
            )));
        }
        if rest.contains('@') {
            return Err(Error::input(format!(
                "{URI} has a user in it. Put user and password into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead."
            )));
        }
        let basic = |name: String| {
            let password = variable("MLFLOW_TRACKING_PASSWORD").unwrap_or_default();
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{name}:{password}")))
        };
        let token = variable("MLFLOW_TRACKING_TOKEN").map(|token| format!("Bearer {token}"));
        Ok(Some(Self {
            agent: Agent::config_builder().timeout_global(Some(TIMEOUT)).http_status_as_error(false).build().into(),
            address,
            authorization: variable("MLFLOW_TRACKING_USERNAME").map(basic).or(token),
            experiment: variable("MLFLOW_EXPERIMENT_NAME").unwrap_or_else(|| "Default".into()),
        }))
    }

    /// Makes a request: GET without a body, POST with one.
    fn call(&self, path: &str, body: Option<&Value>) -> std::result::Result<Value, Refusal> {
        let url = format!("{}/api/2.0/mlflow/{path}", self.address);
        let failed = |error: ureq::Error| Refusal { code: String::new(), message: error.to_string() };
        let mut request = match body {
            None => ureq::http::Request::get(url),
            Some(_) => ureq::http::Request::post(url).header(header::CONTENT_TYPE, "application/json"),
        };
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        let request = request.body(body.map(Value::to_string).unwrap_or_default());
        let mut response = self.agent.run(request.map_err(|error| failed(error.into()))?).map_err(failed)?;
        let text = response.body_mut().read_to_string().map_err(failed)?;
        let answer: Value = serde_json::from_str(&text).unwrap_or_default();
        if response.status().is_success() {
            let other = || Refusal { code: String::new(), message: "it does not answer as MLflow does".into() };
            return answer.is_object().then_some(answer).ok_or_else(other);
        }
        let field = |name: &str| answer.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let message = format!("status {} {}", response.status(), field("message"));
        Err(Refusal { code: field("error_code"), message: message.trim_end().to_owned() })
    }

    fn post(&self, path: &str, body: &Value) -> std::result::Result<Value, Refusal> {
        self.call(path, Some(body))
    }

    /// The experiment's id; it is created unless it is there.
    fn experiment(&self) -> std::result::Result<Value, Refusal> {
        let encoded = percent_encoding::utf8_percent_encode(&self.experiment, percent_encoding::NON_ALPHANUMERIC);
        match self.call(&format!("experiments/get-by-name?experiment_name={encoded}"), None) {
            Ok(answer) => Ok(answer["experiment"]["experiment_id"].clone()),
            Err(refusal) if refusal.code == "RESOURCE_DOES_NOT_EXIST" => {
                Ok(self.post("experiments/create", &json!({"name": self.experiment}))?["experiment_id"].clone())
            }
            Err(refusal) => Err(refusal),
        }
    }

    fn create(&self, about: &About) -> std::result::Result<String, Refusal> {
        let body = json!({
            "experiment_id": self.experiment()?,
            "run_name": about.name,
            "start_time": milliseconds(),
            "tags": [{"key": "mlflow.source.name", "value": "sacpo"}, {"key": "mlflow.source.type", "value": "LOCAL"}],
        });
        let answer = self.post("runs/create", &body)?;
        let Some(id) = answer["run"]["info"]["run_id"].as_str().map(str::to_owned) else {
            return Err(Refusal { code: String::new(), message: "it has created a run without an id".into() });
        };
        let parameters: Vec<Value> = about
            .parameters
            .iter()
            .map(|(key, value)| json!({"key": key, "value": value.chars().take(LONGEST_VALUE).collect::<String>()}))
            .collect();
        self.post("runs/log-batch", &json!({"run_id": id, "params": parameters}))?;
        Ok(id)
    }

    /// The last step that a run knows; nothing if there is no such run.
    fn go_on(&self, id: &str) -> std::result::Result<Option<u64>, Refusal> {
        match self.post("runs/update", &json!({"run_id": id, "status": "RUNNING"})) {
            Ok(_) => {}
            Err(refusal) if refusal.code == "RESOURCE_DOES_NOT_EXIST" => return Ok(None),
            Err(refusal) => return Err(refusal),
        }
        let run = self.call(&format!("runs/get?run_id={id}"), None)?;
        let metrics = run["run"]["data"]["metrics"].as_array();
        let steps = metrics.into_iter().flatten().filter_map(|metric| metric["step"].as_u64());
        Ok(Some(steps.max().unwrap_or(0)))
    }
}

/// What is kept in the training's folder.
#[derive(Serialize, Deserialize)]
struct Kept {
    server: String,
    run_id: String,
    /// A hash of the training's parameters: by others it is another training.
    parameters: String,
}

/// A training as a run of a server, to which a thread sends what there is to send.
pub(super) struct Run {
    metrics: Sender<Vec<Value>>,
    thread: JoinHandle<Delivery>,
    /// The `metrics.jsonl` of the training.
    log: PathBuf,
    /// The last step that was handed on or that the server had.
    last: u64,
    /// Whether the steps before the first were looked for.
    caught_up: bool,
}

impl Run {
    /// Begins a run, or goes on with that of the training in `folder`.
    ///
    /// # Errors
    /// A server that cannot be reached or refuses.
    pub(super) fn begin(server: Server, folder: &Path, about: &About) -> Result<Self> {
        let unusable = |refusal: Refusal| {
            Error::input(format!(
                "The MLflow server at {} ({URI}) cannot be used: {}. Start it or correct the address, or unset the variable to \
                 train without it.",
                server.address, refusal.message
            ))
        };
        let file = folder.join(FILE);
        let kept = std::fs::read(&file).ok().and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok());
        let parameters = blake3::hash(format!("{:?}", about.parameters).as_bytes()).to_hex().to_string();
        let kept = kept.filter(|kept| kept.server == server.address && kept.parameters == parameters);
        let known = match &kept {
            Some(kept) => server.go_on(&kept.run_id).map_err(unusable)?.map(|last| (kept.run_id.clone(), last)),
            None => None,
        };
        let (run_id, last) = match known {
            Some(known) => known,
            None => (server.create(about).map_err(unusable)?, 0),
        };
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let kept = Kept { server: server.address.clone(), run_id: run_id.clone(), parameters };
        atomic::write_file(&file, |out| Ok(serde_json::to_writer_pretty(out, &kept)?))?;
        let (metrics, received) = channel();
        let delivery = Delivery { server, run_id, waiting: VecDeque::new(), warned: false };
        let thread = std::thread::spawn(move || delivery.work(&received));
        Ok(Self { metrics, thread, log: folder.join("metrics.jsonl"), last, caught_up: false })
    }

    /// Hands on the numbers of a step. Those of a step that the server knows, since the training was killed after it, are the same.
    pub(super) fn log(&mut self, step: u64, numbers: &[(String, f64)]) {
        if !std::mem::replace(&mut self.caught_up, true) {
            // of a part of the training during which the server was away
            let lines = std::fs::read_to_string(&self.log).unwrap_or_default();
            for record in lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
                let before = record["step"].as_u64().unwrap_or(0);
                if before < step {
                    self.send(before, &numbers_of(&record));
                }
            }
        }
        self.send(step, numbers);
    }

    fn send(&mut self, step: u64, numbers: &[(String, f64)]) {
        if step <= self.last {
            return;
        }
        self.last = step;
        let timestamp = milliseconds();
        let metric =
            |(key, value): &(String, f64)| json!({"key": key, "value": value, "timestamp": timestamp, "step": step});
        // the thread ends after the channel
        let _ = self.metrics.send(numbers.iter().map(metric).collect());
    }

    /// Sends what is left, and how the training ended.
    pub(super) fn end(self, status: &str) {
        drop(self.metrics);
        // it does not panic; if it did, its messages would be the loss
        let Ok(mut delivery) = self.thread.join() else { return };
        let left = delivery.waiting.len();
        if left > 0 {
            ui::say(format!(
                "The metrics of {left} steps did not reach the MLflow server. They are in {}.",
                self.log.display()
            ));
        }
        let end = json!({"run_id": delivery.run_id, "status": status, "end_time": milliseconds()});
        if let Err(refusal) = delivery.server.post("runs/update", &end) {
            delivery.warn(&refusal);
        }
    }
}

/// What a run's thread has to send.
struct Delivery {
    server: Server,
    run_id: String,
    /// The metrics of steps.
    waiting: VecDeque<Vec<Value>>,
    /// Whether it was said that the server does not answer.
    warned: bool,
}

impl Delivery {
    /// Sends metrics as they come, a few seconds' together, until no more can come.
    fn work(mut self, received: &Receiver<Vec<Value>>) -> Self {
        let mut last = Instant::now();
        loop {
            let ended = match received.recv_timeout(PAUSE) {
                Ok(step) => {
                    self.waiting.push_back(step);
                    false
                }
                Err(RecvTimeoutError::Timeout) => false,
                Err(RecvTimeoutError::Disconnected) => true,
            };
            if ended || last.elapsed() >= PAUSE {
                self.deliver();
                last = Instant::now();
            }
            if ended {
                return self;
            }
        }
    }

    /// Sends what is waiting, of each step all or nothing; what is refused waits on.
    fn deliver(&mut self) {
        while !self.waiting.is_empty() {
            let mut metrics = 0;
            let fits = |step: &&Vec<Value>| {
                metrics += step.len();
                metrics <= MOST_METRICS
            };
            // one step alone never has so many
            let steps = self.waiting.iter().take_while(fits).count().max(1);
            let batch: Vec<&Value> = self.waiting.iter().take(steps).flatten().collect();
            if let Err(refusal) = self.server.post("runs/log-batch", &json!({"run_id": self.run_id, "metrics": batch}))
            {
                self.warn(&refusal);
                return;
            }
            self.waiting.drain(..steps);
        }
    }

    fn warn(&mut self, refusal: &Refusal) {
        if !std::mem::replace(&mut self.warned, true) {
            ui::say(format!(
                "The MLflow server at {} does not take what is sent: {}. Training goes on, and sends it again later.",
                self.server.address, refusal.message
            ));
        }
    }
}

fn milliseconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}
