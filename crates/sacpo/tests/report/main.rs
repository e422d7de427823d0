//! The report: what is in it, and how it behaves in a browser.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod browser;
#[path = "../common/mod.rs"]
mod common;
mod runs;

use std::fs;
use std::path::Path;

use browser::Browser;
use common::*;
use runs::{HOSTILE, HOSTILE_NAME, Made};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Prompts of the small run.
const PROMPTS: usize = 25;

/// A run of six policies, one of them with a hostile name, and its report.
fn reported() -> (TempDir, Made) {
    let folder = folder();
    let mut policies = runs::names(6);
    policies[1] = HOSTILE_NAME.to_owned();
    let answers = runs::short_answers(&policies, PROMPTS);
    let made = runs::write(folder.path(), policies, answers);
    done(&["report", &text(folder.path())]);
    (folder, made)
}

/// The page, with slashes as they are read: the template escapes them too.
fn page(folder: &TempDir) -> String {
    fs::read_to_string(folder.path().join("report.html")).unwrap().replace("&#x2f;", "/")
}

/// The part of a page that is the section with this id.
fn section<'a>(page: &'a str, id: &str) -> &'a str {
    let (_, rest) = page.split_once(&format!("<section id=\"{id}\"")).unwrap_or_else(|| panic!("no section {id}"));
    rest.split_once("</section>").unwrap().0
}

#[test]
fn everything_that_a_run_has_is_in_the_report() {
    let (folder, _) = reported();
    let page = page(&folder);
    says(
        section(&page, "constraint"),
        &["E[harmlessness] ≥ 0.05: <b>met</b>", "at least 0.070", "at most 0.130", "95 %"],
    );
    says(
        section(&page, "provenance"),
        &["dpo on safety, 100 rows, seed 7", "β/λ = 0.25", "β = 0.25", "data/safety.jsonl"],
    );
    says(section(&page, "provenance"), &["da7a", "base → &lt;img", "given: models/base", "61.0"]);
    says(
        section(&page, "cost"),
        &["1.00 GiB", "1 min 15 s", "2000000", "150, 3300 tokens", "500, of which 20 are missing"],
    );
    says(section(&page, "training"), &["helpfulness: loss", "safety: rewards/margins", "safety: eval_loss", "0.230"]);
    says(section(&page, "ratings"), &["250 verdicts on 25 prompts, against base", "questions-harmlessness"]);
    says(
        section(&page, "frontier"),
        &[
            "Held-out pairs: helpfulness against harmlessness",
            "Judged: questions-helpfulness against questions-harmlessness",
        ],
    );
    says(&page, &["sacpo 0.1.0", "avx2, 2 threads"]);
    assert!(!page.contains("id=\"missing\""), "nothing is missing");
}

#[test]
fn ratings_of_a_file_and_of_verdicts_are_the_same() {
    let (folder, _) = reported();
    let before = section(&page(&folder), "ratings").to_owned();
    let rated = ["harmlessness", "helpfulness"].map(|metric| {
        let file = text(&folder.path().join(format!("verdicts/questions-{metric}.jsonl")));
        (format!("questions-{metric}"), json(&["rate", &file, "--baseline", "base"]))
    });
    fs::write(folder.path().join("ratings.json"), Value::Object(rated.into_iter().collect()).to_string()).unwrap();
    fs::remove_dir_all(folder.path().join("verdicts")).unwrap();
    done(&["report", &text(folder.path())]);
    assert_eq!(section(&page(&folder), "ratings"), before);
}

#[test]
fn what_is_missing_or_damaged_is_said() {
    let folder = folder();
    let run = text(folder.path());
    let message = fails(2, &["report", &run]);
    says(&message, &["holds nothing of a run", "results.json"]);
    assert!(!folder.path().join("report.html").exists());
    says(&fails(2, &["report", "no/such/folder"]), &["no/such/folder is no folder"]);
    says(&fails(2, &["report", "--answers", "no/such.json"]), &["--out"]);

    runs::write(folder.path(), runs::names(4), runs::short_answers(&runs::names(4), 3));
    fs::write(folder.path().join("results.json"), "{").unwrap();
    fs::write(folder.path().join("ratings.json"), "[]").unwrap();
    fs::write(folder.path().join("steps/safety-0.125/policy.json"), "no json").unwrap();
    fs::write(folder.path().join("answers/questions/base.jsonl"), "{\"prompt\": 1}\n").unwrap();
    fs::remove_file(folder.path().join("steps/helpfulness/metrics.jsonl")).unwrap();
    let written = json(&["report", &run]);
    let missing = written["missing"].to_string();
    for part in [
        "results.json is damaged",
        "ratings.json is damaged",
        "policy.json is damaged",
        "base.jsonl",
        "helpfulness is not shown",
    ] {
        assert!(missing.contains(part), "{part}: {missing}");
    }
    assert_eq!(written["answers"], 9, "{written}");
    assert!(section(&page(&folder), "missing").contains("results.json is damaged"));

    // a run that was stopped has its trainings only
    for name in ["results.json", "ratings.json", "manifest.json"] {
        fs::remove_file(folder.path().join(name)).unwrap();
    }
    for name in ["answers", "verdicts"] {
        fs::remove_dir_all(folder.path().join(name)).unwrap();
    }
    let written = json(&["report", &run]);
    let missing = written["missing"].to_string();
    for part in ["the run has not ended", "no answers", "no ratings", "no frontier"] {
        assert!(missing.contains(part), "{part}: {missing}");
    }
    let page = page(&folder);
    assert!(
        page.contains("safety-0.125: loss") && !page.contains("id=\"answers\"") && !page.contains("id=\"frontier\"")
    );
}

#[test]
fn answers_and_verdicts_without_a_run() {
    let (folder, made) = reported();
    let at = |name: &str| text(&folder.path().join(name));
    let out = at("other.html");
    let written = json(&[
        "report",
        "--out",
        &out,
        "--answers",
        &at("answers/questions/base.jsonl"),
        "--answers",
        &format!("mine={}", at("answers/questions/safety-0.25.jsonl")),
        "--verdicts",
        &at("verdicts/questions-helpfulness.jsonl"),
    ]);
    assert_eq!(written["answers"], 2 * made.prompts.len());
    // of the policies that are judged, one is there under its name
    assert_eq!(written["verdicts"], 0, "`mine` has no verdicts");
    assert!(fs::read_to_string(&out).unwrap().contains("questions-helpfulness"));
}

/// The small run's report in a browser, if there is one.
fn in_browser(theme: &str) -> Option<(TempDir, Made, Browser)> {
    let program = browser::find()?;
    let (folder, made) = reported();
    let mut browser = Browser::start(&program);
    browser.open(&folder.path().join("report.html"), theme);
    Some((folder, made, browser))
}

/// How many prompts are found.
fn found(browser: &mut Browser) -> String {
    browser.value("document.getElementById('found').textContent").as_str().unwrap().to_owned()
}

/// Chooses an option as a person does.
fn select(browser: &mut Browser, id: &str, value: &str) {
    browser.value(&format!(
        "(() => {{ const s = document.getElementById({id:?}); s.value = {value:?}; s.dispatchEvent(new Event('change', {{bubbles: true}})); \
         if (s.value !== {value:?}) throw Error('no such option'); }})()"
    ));
}

#[test]
fn plots_show_every_policy_and_can_be_saved() {
    let Some((_folder, made, mut browser)) = in_browser("dark") else { return };
    let points = "document.querySelectorAll('[data-file=frontier-1] svg .tip').length";
    assert_eq!(browser.value(points), made.policies.len());
    // five policies have verdicts against the sixth
    let judged = "document.querySelectorAll('[data-file=frontier-2] svg .tip').length";
    assert_eq!(browser.value(judged), made.policies.len());
    let bars = "document.querySelectorAll('[data-file=questions-harmlessness-categories] svg .tip').length";
    assert_eq!(browser.value(bars), 2 * (made.policies.len() - 1), "two categories");
    let curves = "document.querySelectorAll('#training svg').length";
    assert_eq!(browser.value(curves), 6, "loss, margins and validation of two steps");

    let (name, png) = browser.download("[data-file=frontier-1] [data-save=png]");
    assert_eq!((name.as_str(), &png[..8]), ("frontier-1.png", b"\x89PNG\r\n\x1a\n".as_slice()));
    let size = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap());
    assert!(size(16) > 2000 && size(20) == 3 * 520, "{} × {}", size(16), size(20));
    assert!(png.len() > 20_000, "not an empty picture: {} bytes", png.len());
    let (name, svg) = browser.download("[data-file=frontier-1] [data-save=svg]");
    let svg = String::from_utf8(svg).unwrap();
    assert_eq!(name, "frontier-1.svg");
    assert!(svg.starts_with("<svg") && svg.contains("fill=\"#FFFFFF\""), "on white paper, whatever the theme: {svg}");
    browser.assert_quiet();
}

#[test]
fn filters_narrow_the_answers() {
    let Some((_folder, made, mut browser)) = in_browser("light") else { return };
    let rows = "document.querySelectorAll('#list article').length";
    assert_eq!(found(&mut browser), "25 of 25 prompts");
    assert_eq!(browser.value(rows), 10, "a page");
    browser.value("document.getElementById('text').focus()");
    browser.insert("NEEDLE-17");
    assert_eq!((found(&mut browser).as_str(), browser.value(rows)), ("1 of 25 prompts", json!(1)));
    assert_eq!(browser.value("document.querySelector('#list mark').textContent"), "needle-17");
    browser.value("document.getElementById('text').select()");
    browser.insert("nothing like this");
    assert_eq!((found(&mut browser).as_str(), browser.value(rows)), ("0 of 25 prompts", json!(0)));
    browser.value("document.getElementById('text').select()");
    browser.insert(" ");
    select(&mut browser, "category", "crime");
    assert_eq!(found(&mut browser), "5 of 25 prompts");
    select(&mut browser, "category", "");

    // who won between the base model and the last policy but one, counted from the verdicts as they were made
    let (policy, metric) = (4, "harmlessness");
    select(&mut browser, "metric", metric);
    let of = |kind: usize| {
        (0..PROMPTS)
            .filter(|prompt| match (prompt + policy * 3 + metric.len()) % 4 {
                0 => kind == 0,
                1 => kind == 1,
                _ => kind == 2,
            })
            .count()
    };
    let boxes = "[...document.querySelectorAll('#chosen input')]";
    browser.value(&format!(
        "{boxes}.forEach((b) => {{ b.checked = ['0', '4'].includes(b.value); }}); \
                           document.getElementById('chosen').dispatchEvent(new Event('change'))"
    ));
    for (winner, prompts) in [("4", of(0)), ("tie", of(1)), ("0", of(2)), ("none", 0)] {
        select(&mut browser, "winner", winner);
        assert_eq!(found(&mut browser), format!("{prompts} of 25 prompts"), "{winner}");
        assert!(winner == "none" || prompts > 0);
    }
    // policies without a verdict on each other
    browser.value(&format!(
        "{boxes}.forEach((b) => {{ b.checked = ['3', '4'].includes(b.value); }}); \
                           document.getElementById('chosen').dispatchEvent(new Event('change'))"
    ));
    select(&mut browser, "winner", "none");
    assert_eq!(found(&mut browser), "25 of 25 prompts");
    let heads =
        browser.value("[...document.querySelectorAll('#list article:first-child h4')].map((h) => h.textContent)");
    assert_eq!(heads, json!([made.policies[3], made.policies[4]]));
    browser.assert_quiet();
}

#[test]
fn the_keyboard_reaches_everything() {
    let Some((_folder, _, mut browser)) = in_browser("light") else { return };
    let focus = "(document.activeElement.id || document.activeElement.className || document.activeElement.tagName)";
    browser.press("Tab");
    assert_eq!(browser.value(focus), "skip");
    let visible =
        "(() => { const r = document.activeElement.getBoundingClientRect(); return r.left >= 0 && r.top >= 0; })()";
    assert_eq!(browser.value(visible), true, "the skip link is seen when it has the focus");
    browser.press("Tab");
    assert_eq!(browser.value(focus), "theme");
    assert_ne!(browser.value("getComputedStyle(document.activeElement).outlineStyle"), "none", "the focus is seen");
    let before = browser.value("getComputedStyle(document.body).backgroundColor");
    browser.press("Enter");
    assert_ne!(browser.value("getComputedStyle(document.body).backgroundColor"), before);

    // every control of the answers is on the way of the tabulator
    let mut reached = Vec::new();
    for _ in 0..200 {
        browser.press("Tab");
        reached.push(browser.value(focus).as_str().unwrap().to_owned());
        if reached.last().is_some_and(|id| id == "next") {
            break;
        }
    }
    for id in ["text", "category", "metric", "winner", "prompt", "next"] {
        assert!(reached.iter().any(|at| at == id), "{id} is not reached: {reached:?}");
    }

    browser.value("document.querySelector('#chosen input').focus()");
    let columns = "document.querySelectorAll('#list article:first-child h4').length";
    let before = browser.value(columns).as_u64().unwrap();
    browser.press(" ");
    assert_eq!(browser.value(columns), before - 1);
    browser.press("/");
    assert_eq!(browser.value(focus), "text");
    browser.press("j");
    assert_eq!(browser.value("document.getElementById('text').value"), "j", "in a field keys are text");
    browser.value(
        "document.getElementById('text').value = ''; document.getElementById('text').dispatchEvent(new Event('input'))",
    );
    browser.value("document.querySelector('#list article').focus()");
    let at = "document.activeElement.querySelector('h3').id";
    for (key, prompt) in [("j", 1), ("j", 2), ("k", 1)] {
        browser.press(key);
        assert_eq!(browser.value(at), format!("prompt-{prompt}"));
    }
    for _ in 0..9 {
        browser.press("j");
    }
    assert_eq!(
        (browser.value(at), browser.value("document.getElementById('page').textContent")),
        (json!("prompt-10"), json!("page 2 of 3"))
    );
    browser.press("k");
    assert_eq!(browser.value(at), "prompt-9", "back over the start of the page");
    browser.assert_quiet();
}

/// The least contrast of a text with what is behind it (WCAG 2.1), and the text.
const CONTRAST: &str = "(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c; } return [255, 255, 255]; };
  let least = [Infinity, ''];
  let seen = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const e = node.parentElement;
    if (!node.textContent.trim() || !e.getClientRects().length || e.closest('.skip, script, title, :disabled, [disabled]')) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(rgb(e.closest('svg') ? style.fill : style.color)), light(behind(e))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    seen++;
    if (contrast < least[0]) least = [contrast, e.outerHTML.slice(0, 200)];
  }
  return [...least, seen];
})()";

#[test]
fn both_themes_have_contrast_and_fit_narrow_screens() {
    let Some((folder, _, mut browser)) = in_browser("dark") else { return };
    let ground = "getComputedStyle(document.body).backgroundColor";
    let ink = "getComputedStyle(document.querySelector('[data-file=frontier-1] svg text')).fill";
    let (dark, dark_ink) = (browser.value(ground), browser.value(ink));
    let check = |browser: &mut Browser| {
        let least = browser.value(CONTRAST);
        assert!(least[0].as_f64().unwrap() >= 4.5, "too little contrast: {least}");
        assert!(least[2].as_u64().unwrap() > 300, "texts were looked at: {least}");
    };
    check(&mut browser);
    browser.value("document.getElementById('theme').click()");
    let (light, light_ink) = (browser.value(ground), browser.value(ink));
    assert!(dark != light && dark_ink != light_ink, "{dark} {light} {dark_ink} {light_ink}");
    check(&mut browser);
    assert_eq!(browser.value("document.getElementById('theme').getAttribute('aria-pressed')"), "false");
    browser.value("localStorage.clear()");
    browser.open(&folder.path().join("report.html"), "light");
    assert_eq!(browser.value(ground), light, "the system's theme");
    let features = json!([{"name": "prefers-color-scheme", "value": "dark"}]);
    browser.call("Emulation.setEmulatedMedia", json!({"features": features}));
    assert_eq!(browser.value(ground), dark, "the page follows the system");
    // the page is told of the change a moment after its style has changed
    browser.wait("document.getElementById('theme').getAttribute('aria-pressed') === 'true'");

    for width in [320, 700] {
        browser.resize(width, 800);
        let widest = browser.value("document.scrollingElement.scrollWidth");
        assert!(widest.as_u64().unwrap() <= u64::from(width), "{widest} in {width}");
    }
    browser.call(
        "Emulation.setEmulatedMedia",
        json!({"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}),
    );
    browser.value("document.documentElement.dataset.theme = 'dark'");
    assert_eq!(browser.value(ground), light, "printed on white");
    assert_eq!(browser.value("document.getElementById('filter').getClientRects().length"), 0, "no controls on paper");
    browser.assert_quiet();
}

#[test]
fn the_page_is_built_for_everybody() {
    let Some((_folder, _, mut browser)) = in_browser("light") else { return };
    let faults = browser.value(
        "(() => {
          const faults = [];
          const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);
          ids.filter((id, i) => ids.indexOf(id) !== i).forEach((id) => faults.push('id twice: ' + id));
          for (const e of document.querySelectorAll('input, select')) if (!e.labels.length) faults.push('no label: ' + e.outerHTML);
          for (const e of document.querySelectorAll('[role=img], [role=region]')) if (!e.getAttribute('aria-label')) faults.push('no name: ' + e.outerHTML.slice(0, 80));
          for (const e of document.querySelectorAll('button')) if (!e.textContent.trim()) faults.push('no text: ' + e.outerHTML);
          for (const e of document.querySelectorAll('section')) if (!document.getElementById(e.getAttribute('aria-labelledby'))) faults.push('no heading: ' + e.id);
          for (const a of document.querySelectorAll('a[href]')) if (!document.querySelector(a.getAttribute('href'))) faults.push('leads nowhere: ' + a.href);
          for (const t of document.querySelectorAll('table')) if (!t.querySelector('th[scope=col]') || !t.querySelector('th[scope=row]')) faults.push('no heads: ' + t.outerHTML.slice(0, 80));
          const levels = [...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]));
          levels.forEach((level, i) => { if (level > (levels[i - 1] ?? 0) + 1) faults.push('heading skips a level: ' + i); });
          for (const tag of ['header', 'main', 'nav']) if (!document.querySelector(tag)) faults.push('no ' + tag);
          if (document.querySelectorAll('h1').length !== 1 || !document.documentElement.lang || !document.title) faults.push('no title');
          return faults;
        })()",
    );
    assert_eq!(faults, json!([]));
}

#[test]
fn hostile_texts_stay_text() {
    let (folder, made) = reported();
    let html = page(&folder);
    assert_eq!(html.matches("<script").count(), 2, "the packed answers and the page's own script");
    assert!(!html.contains("<img") && !html.contains("onload=window"), "what is not packed is escaped");
    let Some(program) = browser::find() else { return };
    let mut browser = Browser::start(&program);
    browser.open(&folder.path().join("report.html"), "light");
    browser.value(
        "[...document.querySelectorAll('#chosen input')].forEach((b) => { b.checked = true; }); \
                   document.getElementById('chosen').dispatchEvent(new Event('change'))",
    );
    for (prompt, hostile) in HOSTILE.iter().enumerate() {
        browser.value("document.getElementById('text').select()");
        let shown = browser.value(&format!("[...document.querySelectorAll('#list article')[{prompt}].querySelectorAll('.answer')].map((a) => a.textContent)"));
        let expected: Vec<&String> = made.answers.iter().map(|texts| &texts[prompt]).collect();
        assert_eq!(shown, json!(expected));
        let head = browser.value(&format!("document.querySelector('#prompt-{prompt}').textContent"));
        assert!(head.as_str().unwrap().contains(hostile), "{head}");
    }
    let name = browser.value("document.querySelectorAll('#list article h4')[1].textContent");
    assert_eq!(name, HOSTILE_NAME);
    assert_eq!(
        browser.value(
            "[...document.querySelectorAll('#provenance th')].filter((t) => t.textContent.startsWith('<img')).length"
        ),
        1
    );
    assert_eq!(browser.value("document.querySelectorAll('img, svg svg, [onerror], [onload]').length"), 0);
    // were a text markup all the same, the page's policy would keep it from running
    browser.value("document.body.insertAdjacentHTML('beforeend', '<svg onload=\"window.hacked = 1\"></svg><b id=late onclick=\"window.hacked = 1\">x</b>'); \
                   document.getElementById('late').click()");
    assert_eq!(browser.value("typeof window.hacked"), "undefined");
}

#[test]
fn twenty_policies_on_212_prompts_are_small_and_quick() {
    let folder = folder();
    let names = runs::names(20);
    let answers = runs::long_answers(20, 212);
    let characters: usize = answers.iter().flatten().map(String::len).sum();
    assert!(characters > 6_000_000, "{characters}");
    let made = runs::write(folder.path(), names, answers);
    let written = json(&["report", &text(folder.path())]);
    assert_eq!((written["answers"].as_u64(), written["verdicts"].as_u64()), (Some(20 * 212), Some(19 * 212 * 2 * 2)));
    let size = fs::metadata(folder.path().join("report.html")).unwrap().len();
    println!("{characters} characters in answers: {:.2} MiB", size as f64 / f64::from(1 << 20));
    assert!(size < 5 << 20, "{size} bytes");
    let Some(program) = browser::find() else { return };
    let mut browser = Browser::start(&program);
    browser.open(&folder.path().join("report.html"), "light");
    assert_eq!(found(&mut browser), "212 of 212 prompts");
    assert_eq!(browser.value("document.querySelectorAll('#list article').length"), 10, "only a page is drawn");
    assert_eq!(
        browser.value("document.querySelectorAll('[data-file=frontier-1] svg .tip').length"),
        made.policies.len()
    );
    let shown = browser.value("document.querySelector('#list .answer').textContent");
    assert_eq!(shown, made.answers[0][0]);
    browser.assert_quiet();
}

/// Where a page is left for people to look at.
#[test]
#[ignore = "writes a page to look at"]
fn a_page_to_look_at() {
    let out = std::env::var_os("SACPO_REPORT_PAGE").expect("SACPO_REPORT_PAGE names a folder");
    let names = runs::names(8);
    let answers = runs::short_answers(&names, PROMPTS);
    runs::write(Path::new(&out), names, answers);
    done(&["report", &text(Path::new(&out))]);
}
