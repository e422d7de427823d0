//! What goes wrong on the way from a Hub, and that no half of a file is ever used.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::common::*;
use crate::server::{Fault, commit};
use crate::{CACHED, User, rows, server, snapshot};

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
    server.requests();
    says(&user.fails(1, &["data", "stats", address]), &["hf://datasets/o/n", "429", "Wait 4000 seconds", "HF_TOKEN"]);
    assert_eq!(server.requests().len(), 1, "not tried again");
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
    // a server that does not speak TLS, and what is no address at all
    let plain = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("https://{}", plain.local_addr().unwrap());
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    std::thread::spawn(move || {
        for mut stream in plain.incoming().flatten() {
            counted.fetch_add(1, Ordering::SeqCst);
            let _ = stream.write_all(b"HTTP/1.1 400 no\r\n\r\n");
        }
    });
    for (endpoint, reason) in [(address, "SSL_CERT_FILE"), ("huggingface".into(), "HF_ENDPOINT")] {
        let outcome = user.run_with(&["data", "stats", "hf://datasets/o/n/data/test-*"], &[("HF_ENDPOINT", &endpoint)]);
        says(&outcome.failed(1), &["Could not fetch hf://datasets/o/n", reason]);
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1, "not tried again");
}

#[test]
fn what_does_not_fit_on_the_disk_is_said() {
    let server = server();
    let user = User::of(&server);
    let address = format!("hf://datasets/o/n/{FIRST}");
    // files of two blocks at most, and no signal but an error
    let script = "trap '' XFSZ; ulimit -f 2; exec \"$0\" data stats \"$1\"";
    let limited = || {
        let mut command = Command::new("bash");
        let output = command.args(["-c", script, SACPO, &address]).envs(user.variables(&[])).output().unwrap();
        Outcome {
            code: output.status.code().unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    };
    says(&limited().failed(1), &["no room", "incomplete", "HF_HOME"]);
    assert_eq!((snapshot(&user, CACHED, 1), incomplete(&user)), (Vec::<String>::new(), vec![2048]));
    assert_eq!(user.pairs(&address), 30);
}
