//! A chat endpoint in the form of OpenAI's API, for one policy.
//!
//! Connections are the business of one thread, which reads requests and writes answers. Another generates: whatever is
//! asked at the same time shares the passes over the weights.

mod answer;
mod error;
mod growing;
mod request;
mod worker;

use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use align::data;
use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use engine::generate::{Dtype, SamplingOptions};
use engine::{Error, Result, Tokenizer};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::interrupt;
use crate::policy::Policy;
use answer::Completion;
use error::ApiError;
use request::ChatRequest;
use worker::Job;

/// The largest body of a request.
const MAX_BODY_BYTES: usize = 4 << 20;

/// How long connections have to end by themselves when the server stops.
const GRACE: Duration = Duration::from_millis(500);

/// Between two looks at whether Ctrl-C was pressed.
const POLL: Duration = Duration::from_millis(50);

/// What a server offers.
pub(crate) struct Options {
    /// The model's name in requests.
    pub(crate) name: String,
    /// What clients must send as their bearer token, if anything.
    pub(crate) key: Option<String>,
    /// The longest answer in tokens, where a request sets no limit.
    pub(crate) max_new_tokens: usize,
    /// Answers in progress at once.
    pub(crate) batch_size: usize,
    /// What the policy's matrices are read in.
    pub(crate) dtype: Dtype,
    /// Answers that may wait for their turn.
    pub(crate) queue: usize,
}

/// Serves until Ctrl-C, generating on the thread that calls.
///
/// # Errors
/// If the policy cannot be used, or the system refuses threads or sockets.
pub(crate) fn serve(policy: &Policy, listener: TcpListener, options: Options) -> Result<()> {
    let (jobs, received) = mpsc::unbounded_channel();
    let capacity = u32::try_from(options.batch_size.saturating_add(options.queue)).unwrap_or(u32::MAX);
    let app = App {
        context: policy.mixture()?.context(),
        tokenizer: policy.first.tokenizer.clone(),
        defaults: SamplingOptions {
            max_new_tokens: options.max_new_tokens,
            temperature: 1.0,
            end_tokens: policy.first.generation.eos_token_ids.clone(),
            ..SamplingOptions::default()
        },
        key: options.key.map(|key| blake3::hash(key.as_bytes())),
        name: options.name,
        created: seconds_since_1970(),
        jobs,
        room: Arc::new(Semaphore::new(capacity as usize)),
        capacity,
    };
    std::thread::scope(|scope| {
        let connections = scope.spawn(|| serve_connections(listener, Arc::new(app)));
        worker::work(policy, options.batch_size, options.dtype, received)?;
        connections.join().map_err(|_| Error::Failed("The server's thread ended by a fault of the program.".into()))?
    })
}

/// Accepts connections until Ctrl-C, or until nobody takes jobs any more.
fn serve_connections(listener: TcpListener, app: Arc<App>) -> Result<()> {
    let failed = |error: std::io::Error| Error::Failed(format!("The server could not be started: {error}."));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().map_err(failed)?;
    let served = runtime.block_on(async {
        listener.set_nonblocking(true).map_err(failed)?;
        let listener = tokio::net::TcpListener::from_std(listener).map_err(failed)?;
        let jobs = app.jobs.clone();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = axum::serve(listener, router(app)).with_graceful_shutdown(async {
            let _ = stopped.await;
        });
        tokio::select! {
            served = server.into_future() => served.map_err(failed),
            () = async {
                while !interrupt::requested() && !jobs.is_closed() {
                    tokio::time::sleep(POLL).await;
                }
                drop((stop, jobs));
                tokio::time::sleep(GRACE).await;
            } => Ok(()),
        }
    });
    runtime.shutdown_background();
    served
}

/// What handlers share.
struct App {
    name: String,
    /// Of the key, so that a comparison takes the same time whatever is sent.
    key: Option<blake3::Hash>,
    created: u64,
    tokenizer: Tokenizer,
    context: usize,
    defaults: SamplingOptions,
    jobs: mpsc::UnboundedSender<Job>,
    /// One permit for each answer in progress or waiting.
    room: Arc<Semaphore>,
    capacity: u32,
}

fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/chat/completions", post(chat))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .route_layer(middleware::from_fn_with_state(app.clone(), authorise))
        .route("/health", get(health))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(not_found)
        .with_state(app)
}

async fn authorise(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let header = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let token = header.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    if app.key.is_some_and(|key| key != blake3::hash(token.as_bytes())) {
        let message = "The key is wrong or missing. Send it as `Authorization: Bearer KEY`.";
        return ApiError::new(StatusCode::UNAUTHORIZED, message).code("invalid_api_key").into_response();
    }
    next.run(request).await
}

async fn health(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"status": "ok", "room": app.room.available_permits()}))
}

async fn not_found(uri: Uri) -> ApiError {
    let message =
        format!("There is nothing at {}. There are /v1/chat/completions, /v1/models and /health.", uri.path());
    ApiError::new(StatusCode::NOT_FOUND, message)
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    let message =
        format!("{} does not take {method}. /v1/chat/completions takes POST, and everything else GET.", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [app.model()]}))
}

async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> std::result::Result<Json<Value>, ApiError> {
    request::check_model(&name, &app.name)?;
    Ok(Json(app.model()))
}

async fn chat(
    State(app): State<Arc<App>>,
    body: std::result::Result<Bytes, BytesRejection>,
) -> std::result::Result<Response, ApiError> {
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            let message = format!("The body has more than {MAX_BODY_BYTES} bytes. Shorten the messages.");
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
        }
        _ => ApiError::bad_request(format!("The body could not be read: {}.", rejection.body_text())),
    })?;
    // long conversations take a while to tokenise, during which others are to be served
    let reader = app.clone();
    let read = tokio::task::spawn_blocking(move || reader.read(&body));
    let (request, prompt) = read.await.map_err(|_| ApiError::fault())??;
    let mut room = app.take_room(request.choices)?;
    let (replies, received) = mpsc::unbounded_channel();
    let options = Arc::new(request.options);
    for choice in 0..request.choices {
        let job = Job {
            prompt: prompt.clone(),
            options: options.clone(),
            choice,
            stream: request.stream,
            replies: replies.clone(),
            room: room.split(1),
        };
        app.jobs.send(job).map_err(|_| ApiError::stopping())?;
    }
    // the channel ends with the last job
    drop(replies);
    let completion = Completion::new(app.name.clone(), prompt.len(), request.choices, received);
    if request.stream {
        return Ok(completion.stream(request.include_usage).into_response());
    }
    completion.whole().await.map(|answer| Json(answer).into_response())
}

impl App {
    fn model(&self) -> Value {
        json!({"id": self.name, "object": "model", "created": self.created, "owned_by": "sacpo"})
    }

    /// Room for so many answers.
    fn take_room(&self, choices: usize) -> std::result::Result<OwnedSemaphorePermit, ApiError> {
        let Some(permits) = u32::try_from(choices).ok().filter(|permits| *permits <= self.capacity) else {
            let message = format!("n is {choices}, but may be {} at most here.", self.capacity);
            return Err(ApiError::bad_request(message).param("n"));
        };
        self.room.clone().try_acquire_many_owned(permits).map_err(|_| ApiError::queue_full())
    }

    /// A request, and the tokens of its conversation.
    fn read(&self, body: &[u8]) -> std::result::Result<(ChatRequest, Vec<u32>), ApiError> {
        let request = ChatRequest::parse(body, &self.name, &self.defaults)?;
        let tokens = data::tokenize_messages(&request.messages, &self.tokenizer)
            .map_err(|error| ApiError::from(error).param("messages"))?;
        if tokens.len() >= self.context {
            let message = format!(
                "The messages have {} tokens, which leaves no room for an answer in the model's context of {} tokens. \
                 Shorten them.",
                tokens.len(),
                self.context
            );
            return Err(ApiError::bad_request(message).param("messages").code("context_length_exceeded"));
        }
        Ok((request, tokens))
    }
}

fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
