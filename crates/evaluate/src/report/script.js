"use strict";
// The page is complete without this script but for the theme's switch, saving plots, and the answers.

const $ = (id) => document.getElementById(id);

/** An element with a class and a text; texts never become markup. */
function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

// ---- theme

const theme = $("theme");
// a browser may forbid storage to files
const stored = (action) => { try { return action(localStorage); } catch { return null; } };

const chosenTheme = document.documentElement.dataset;
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (chosenTheme.theme ? chosenTheme.theme === "dark" : systemIsDark.matches);
const tellTheme = () => theme.setAttribute("aria-pressed", String(isDark()));

// until somebody chooses, the page follows the system
const kept = stored((s) => s.getItem("sacpo-theme"));
if (kept) chosenTheme.theme = kept;
tellTheme();
theme.hidden = false;
systemIsDark.addEventListener("change", tellTheme);
theme.addEventListener("click", () => {
  chosenTheme.theme = isDark() ? "light" : "dark";
  tellTheme();
  stored((s) => s.setItem("sacpo-theme", chosenTheme.theme));
});

// ---- saving plots

function save(url, file) {
  const link = element("a");
  link.href = url;
  link.download = file;
  link.click();
}

async function savePlot(figure, format) {
  const svg = figure.querySelector("svg");
  // the attributes are those of the file on white paper: the page's style is not part of it
  const url = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(svg));
  const file = `${figure.dataset.file}.${format}`;
  if (format === "svg") return save(url, file);
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = element("canvas");
  const scale = 3;
  canvas.width = scale * svg.width.baseVal.value;
  canvas.height = scale * svg.height.baseVal.value;
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  save(canvas.toDataURL("image/png"), file);
}

for (const button of document.querySelectorAll("[data-save]")) {
  button.addEventListener("click", () => savePlot(button.closest("figure"), button.dataset.save));
}

// ---- answers

const PAGE = 10;
const view = { sets: [], set: null, chosen: [], matches: [], page: 0 };

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}

/** Replaces the options of a select; hides its label if there is nothing to choose. */
function options(id, values, least) {
  const select = $(id);
  select.replaceChildren(...values.map(([value, text]) => {
    const option = element("option", "", text);
    option.value = value;
    return option;
  }));
  $(`${id}-label`).hidden = values.length < least;
}

function openSet(index) {
  const set = view.set = view.sets[index];
  // the verdicts of each prompt
  set.judged ??= set.verdicts.reduce((all, v) => { all[v.prompt].push(v); return all; }, set.prompts.map(() => []));
  view.chosen = set.shown;
  const categories = [...new Set(set.prompts.map((p) => p.category).filter((c) => c !== null))].sort();
  options("category", [["", "all"], ...categories.map((c) => [c, c])], 3);
  options("metric", [...new Set(set.verdicts.map((v) => v.metric))].sort().map((m) => [m, m]), 2);
  $("chosen").replaceChildren(...set.policies.map((name, index) => {
    const label = element("label", "", name);
    const box = element("input");
    box.type = "checkbox";
    box.value = index;
    box.checked = view.chosen.includes(index);
    label.prepend(box);
    return label;
  }));
  openWinners();
  find();
}

function openWinners() {
  const named = view.chosen.map((p) => [String(p), view.set.policies[p]]);
  const kept = $("winner").value;
  const values = [["", "anyone"], ...named, ["tie", "nobody: a tie"], ["none", "nobody: no verdict"]];
  options("winner", view.set.verdicts.length ? values : [], 1);
  if (values.some(([value]) => value === kept)) $("winner").value = kept;
}

/** What the verdicts between the shown policies say of each of them on a prompt, by one metric. */
function standings(prompt, metric) {
  const all = new Map(view.chosen.map((p) => [p, { won: 0, tied: 0, lost: 0, missing: 0, total: 0, n: 0, scores: [] }]));
  for (const { metric: of, pair, outcome, scores } of view.set.judged[prompt]) {
    if (of !== metric || !pair.every((p) => all.has(p))) continue;
    pair.forEach((p, place) => {
      const mine = all.get(p);
      if (scores) mine.scores.push(scores[place]);
      if (outcome === null) { mine.missing++; return; }
      const share = place === 0 ? outcome : 1 - outcome;
      mine[share > 0.5 ? "won" : share < 0.5 ? "lost" : "tied"]++;
      mine.total += share;
      mine.n++;
    });
  }
  return all;
}

/** The policy with the highest mean outcome on a prompt; "tie" if several have it, "none" without verdicts. */
function winner(prompt, metric) {
  const rated = [...standings(prompt, metric)].filter(([, s]) => s.n > 0).map(([p, s]) => [String(p), s.total / s.n]);
  if (rated.length === 0) return "none";
  const best = Math.max(...rated.map(([, mean]) => mean));
  const first = rated.filter(([, mean]) => mean === best);
  return first.length === 1 ? first[0][0] : "tie";
}

const folded = (text) => text.toLowerCase();

function find() {
  const { set, chosen } = view;
  const [text, category, metric, wanted] = [folded($("text").value.trim()), $("category").value, $("metric").value, $("winner").value];
  view.matches = set.prompts.flatMap((prompt, index) => {
    if (category && prompt.category !== category) return [];
    const texts = [prompt.text, ...chosen.map((p) => prompt.answers[p]?.text ?? "")];
    if (text && !texts.some((t) => folded(t).includes(text))) return [];
    return !wanted || winner(index, metric) === wanted ? [index] : [];
  });
  view.page = 0;
  show();
}

/** A text with what is searched for marked. */
function marked(parent, text) {
  const wanted = folded($("text").value.trim());
  const low = folded(text);
  // lengths differ where folding changes a letter's number of units; then nothing is marked
  if (!wanted || low.length !== text.length) { parent.append(text); return parent; }
  let from = 0;
  for (let at = low.indexOf(wanted); at >= 0; at = low.indexOf(wanted, from)) {
    parent.append(text.slice(from, at), element("mark", "", text.slice(at, at + wanted.length)));
    from = at + wanted.length;
  }
  parent.append(text.slice(from));
  return parent;
}

function told(metric, { won, tied, lost, missing, n, scores }) {
  if (n + missing === 0) return [];
  const mean = scores.length ? `; mean score ${(scores.reduce((a, b) => a + b, 0) / scores.length).toFixed(1)}` : "";
  return [`${metric}: won ${won}, tied ${tied}, lost ${lost}${missing ? `, missing ${missing}` : ""}${mean}`];
}

function column(index, policy, results, first) {
  const { set } = view;
  const answer = set.prompts[index].answers[policy];
  const made = element("div", first === String(policy) ? "won" : "");
  made.append(element("h4", "", set.policies[policy]));
  made.append(answer ? marked(element("div", "answer"), answer.text) : element("div", "judged", "no answer"));
  const lines = results.flatMap(([metric, all]) => told(metric, all.get(policy)));
  if (answer?.tokens != null) lines.push(`${answer.tokens} tokens${answer.cut ? ", cut" : ""}`);
  else if (answer?.cut) lines.push("cut");
  made.append(...lines.map((line) => element("p", "judged", line)));
  return made;
}

function row(index) {
  const { set, chosen } = view;
  const prompt = set.prompts[index];
  const made = element("article", "prompt");
  made.tabIndex = 0;
  const head = marked(element("h3"), prompt.text);
  head.id = `prompt-${index}`;
  made.setAttribute("aria-labelledby", head.id);
  if (prompt.category !== null) head.append(element("small", "", prompt.category));
  const columns = element("div", "columns");
  const results = [...$("metric").options].map((o) => [o.value, standings(index, o.value)]);
  const first = winner(index, $("metric").value);
  columns.append(...chosen.map((policy) => column(index, policy, results, first)));
  made.append(head, columns);
  return made;
}

function show() {
  const { matches, set } = view;
  const pages = Math.max(1, Math.ceil(matches.length / PAGE));
  const from = view.page * PAGE;
  $("found").textContent = `${matches.length} of ${set.prompts.length} prompts`;
  $("list").replaceChildren(...matches.slice(from, from + PAGE).map(row));
  $("page").textContent = `page ${view.page + 1} of ${pages}`;
  $("previous").disabled = view.page === 0;
  $("next").disabled = view.page + 1 === pages;
  $("pages").hidden = pages === 1;
}

function turn(by) {
  const pages = Math.ceil(view.matches.length / PAGE);
  if (view.page + by < 0 || view.page + by >= pages) return false;
  view.page += by;
  show();
  return true;
}

/** Moves the focus to the next or previous prompt, over the end of a page. */
function step(by) {
  const rows = [...$("list").children];
  const at = rows.findIndex((r) => r.contains(document.activeElement));
  const to = at < 0 ? (by > 0 ? 0 : rows.length - 1) : at + by;
  if (to >= 0 && to < rows.length) rows[to].focus();
  else if (turn(by)) $("list").children[by > 0 ? 0 : $("list").children.length - 1].focus();
}

function listen() {
  $("filter").addEventListener("submit", (event) => event.preventDefault());
  $("set").addEventListener("change", () => openSet($("set").value));
  $("text").addEventListener("input", find);
  for (const id of ["category", "metric", "winner"]) $(id).addEventListener("change", find);
  $("chosen").addEventListener("change", () => {
    view.chosen = [...$("chosen").querySelectorAll(":checked")].map((box) => Number(box.value));
    openWinners();
    find();
  });
  for (const [id, by] of [["previous", -1], ["next", 1]]) {
    $(id).addEventListener("click", () => { if (turn(by)) $("list").firstElementChild.focus(); });
  }
  $("answers").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not([type=checkbox]), select")) return;
    const action = { "/": () => $("text").focus(), j: () => step(1), k: () => step(-1) }[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
}

async function openAnswers() {
  try {
    view.sets = await unpack($("packed").textContent);
  } catch (error) {
    $("found").textContent = `The answers cannot be shown: ${error.message}. A newer browser may help.`;
    return;
  }
  options("set", view.sets.map((set, index) => [String(index), set.name]), 2);
  listen();
  openSet(0);
  $("filter").hidden = false;
}

if ($("packed")) openAnswers();
