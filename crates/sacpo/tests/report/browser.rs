//! A headless Chromium, driven through its DevTools protocol over two pipes.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

/// Longer than any answer of a loaded machine takes: a test that waits for so long has found a fault.
const PATIENCE: Duration = Duration::from_secs(120);

/// The browser to test with, or nothing, and a loud line that says so.
pub(crate) fn find() -> Option<PathBuf> {
    let named = std::env::var_os("SACPO_CHROMIUM").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let installed =
        || std::env::split_paths(&path).flat_map(|folder| names.map(|name| folder.join(name))).find(|p| p.exists());
    let found = named.or_else(installed);
    if found.is_none() {
        // not `eprintln!`, which a passing test hides
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: the report is not tested in a browser, for there is none; install chromium, or name one in SACPO_CHROMIUM."
        );
    }
    found
}

/// A browser with one tab.
pub(crate) struct Browser {
    process: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    number: u64,
    tab: String,
    /// What the browser has reported, in order.
    pub(crate) events: Vec<Value>,
    folder: TempDir,
}

impl Browser {
    pub(crate) fn start(program: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // the protocol is on descriptors 3 and 4, which the shell makes of standard input and output
        let mut process = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>/dev/null"])
            .arg(program)
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
            .args(["--remote-debugging-pipe", "--window-size=1200,900"])
            .arg(format!("--user-data-dir={}", folder.path().join("profile").display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let to = process.stdin.take().unwrap();
        let stdout = process.stdout.take().unwrap();
        let (sender, from) = channel();
        std::thread::spawn(move || {
            for message in BufReader::new(stdout).split(0) {
                let message = serde_json::from_slice(&message.unwrap()).unwrap();
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser = Self { process, to, from, number: 0, tab: String::new(), events: Vec::new(), folder };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}))["targetId"].clone();
        let attached = browser.call("Target.attachToTarget", json!({"targetId": target, "flatten": true}));
        browser.tab = attached["sessionId"].as_str().unwrap().to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// A call of the protocol, and its result.
    pub(crate) fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.number += 1;
        let mut message = json!({"id": self.number, "method": method, "params": parameters});
        if !self.tab.is_empty() && !method.starts_with("Browser.") {
            message["sessionId"] = json!(self.tab);
        }
        self.to.write_all(format!("{message}\0").as_bytes()).unwrap();
        loop {
            let answer = self.receive();
            if answer["id"] == self.number {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
            self.events.push(answer);
        }
    }

    fn receive(&self) -> Value {
        let message = self.from.recv_timeout(PATIENCE).expect("the browser answers");
        assert_ne!(message["method"], "Runtime.exceptionThrown", "{message}");
        message
    }

    /// Waits for an event.
    fn event(&mut self, is_it: impl Fn(&Value) -> bool) -> Value {
        if let Some(place) = self.events.iter().position(&is_it) {
            return self.events.remove(place);
        }
        loop {
            let event = self.receive();
            if is_it(&event) {
                return event;
            }
            self.events.push(event);
        }
    }

    /// Opens a file, in a theme of the system, and waits until its script has run.
    pub(crate) fn open(&mut self, file: &Path, theme: &str) {
        self.events.clear();
        let features = json!([{"name": "prefers-color-scheme", "value": theme}]);
        self.call("Emulation.setEmulatedMedia", json!({"features": features}));
        self.call("Page.navigate", json!({"url": format!("file://{}", file.display())}));
        self.event(|event| event["method"] == "Page.loadEventFired");
        // the script says so where it cannot show the answers
        self.wait("!document.getElementById('filter') || document.getElementById('found').textContent");
    }

    /// The value of an expression, awaited.
    pub(crate) fn value(&mut self, expression: &str) -> Value {
        let result = self
            .call("Runtime.evaluate", json!({"expression": expression, "awaitPromise": true, "returnByValue": true}));
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    /// Waits until a condition holds.
    pub(crate) fn wait(&mut self, condition: &str) {
        let look = format!(
            "new Promise((done) => {{ const look = () => ({condition}) ? done(true) : setTimeout(look, 10); look(); }})"
        );
        self.value(&look);
    }

    /// Presses a key; one of a character types it.
    pub(crate) fn press(&mut self, key: &str) {
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            " " => 32,
            "/" => 191,
            _ => u32::from(key.to_uppercase().as_bytes()[0]),
        };
        let mut down = json!({"type": "keyDown", "key": key, "windowsVirtualKeyCode": code});
        match key {
            "Tab" => {}
            "Enter" => down["text"] = json!("\r"),
            _ => down["text"] = json!(key),
        }
        self.call("Input.dispatchKeyEvent", down);
        self.call("Input.dispatchKeyEvent", json!({"type": "keyUp", "key": key, "windowsVirtualKeyCode": code}));
    }

    /// Types a text where the focus is.
    pub(crate) fn insert(&mut self, text: &str) {
        self.call("Input.insertText", json!({"text": text}));
    }

    /// Clicks an element by a selector and returns the file that is saved by it.
    pub(crate) fn download(&mut self, selector: &str) -> (String, Vec<u8>) {
        let folder = self.folder.path().join("downloads");
        let behaviour = json!({"behavior": "allow", "downloadPath": folder, "eventsEnabled": true});
        self.call("Browser.setDownloadBehavior", behaviour);
        self.value(&format!("document.querySelector({selector:?}).click()"));
        let begun = self.event(|event| event["method"] == "Browser.downloadWillBegin");
        self.event(|event| event["method"] == "Browser.downloadProgress" && event["params"]["state"] == "completed");
        let name = begun["params"]["suggestedFilename"].as_str().unwrap().to_owned();
        let bytes = std::fs::read(folder.join(&name)).unwrap();
        (name, bytes)
    }

    /// Sets the size of the window in pixels.
    pub(crate) fn resize(&mut self, width: u32, height: u32) {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", size);
    }

    /// Fails on any error in the console (an exception fails whatever is waited for), and on any request but for the file itself and what is in it.
    pub(crate) fn assert_quiet(&mut self) {
        // a call lets what is on its way arrive
        self.value("0");
        for event in &self.events {
            let parameters = &event["params"];
            match event["method"].as_str().unwrap_or_default() {
                "Runtime.consoleAPICalled" => assert_ne!(parameters["type"], "error", "{parameters}"),
                "Log.entryAdded" => assert_ne!(parameters["entry"]["level"], "error", "{parameters}"),
                "Network.requestWillBeSent" => {
                    let url = parameters["request"]["url"].as_str().unwrap();
                    let own = parameters["type"] == "Document" && url.starts_with("file:");
                    assert!(own || url.starts_with("data:"), "a request for {url}");
                }
                _ => {}
            }
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.to.write_all(b"{\"id\": 0, \"method\": \"Browser.close\"}\0");
        if self.process.try_wait().is_ok_and(|ended| ended.is_none()) {
            let _ = self.process.kill();
        }
        let _ = self.process.wait();
    }
}
