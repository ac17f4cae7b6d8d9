// The page: what is asked, runs as they are written out, and their comparison.

import * as api from "./api.js";
import { show } from "./panel.js";
import { Stats } from "./stats.js";

const $ = (id) => document.getElementById(id);
const SUGGESTIONS = [
  "I would like to book a table for two tonight.",
  "I need a hotel in the centre, with parking.",
  "Can you find me a train to London on Friday?",
];
const page = { mode: "chat", turns: [], running: null, models: [], last: null };

// --- one run -----------------------------------------------------------------------------------------------------

class Run {
  constructor(drafting, parent) {
    this.drafting = drafting;
    this.text = "";
    this.ids = [];
    this.stats = new Stats(performance.now());
    this.box = document.createElement("article");
    this.box.className = "run busy";
    this.box.dataset.drafting = drafting;
    this.box.setAttribute("aria-label", drafting ? "Answer with drafting" : "Answer without drafting");
    this.head = document.createElement("header");
    this.body = document.createElement("div");
    this.body.className = "text";
    this.box.append(this.head, this.body);
    parent.append(this.box);
    this.title();
  }

  title() {
    const rate = this.stats.rate ? `${this.stats.rate.toFixed(1)} tokens/s` : "…";
    const name = document.createElement("b");
    name.textContent = this.drafting ? "Drafting on" : "Drafting off";
    this.head.replaceChildren(name, ` ${rate}, ${this.stats.tokens} tokens, ${this.stats.seconds.toFixed(2)} s`);
  }

  add(info) {
    this.stats.step(info, performance.now());
    const fragment = document.createDocumentFragment();
    for (const token of info.tokens) {
      this.ids.push(token.id);
      if (!token.text) continue;
      const span = document.createElement("span");
      span.className = `token ${token.kind}`;
      span.textContent = this.text || page.mode === "completion" ? token.text : token.text.trimStart();
      span.title = token.drafter ? `${token.kind}, guessed by ${token.drafter}` : token.kind;
      this.text += token.text;
      fragment.append(span);
    }
    const near = $("stage").scrollHeight - $("stage").scrollTop - $("stage").clientHeight < 80;
    this.body.append(fragment);
    if (near) $("stage").scrollTop = $("stage").scrollHeight;
    this.title();
  }

  async go(ask, signal) {
    try {
      for await (const payload of api.stream(ask.path, { ...ask.body, ...draftFields(this.drafting) }, signal)) {
        const info = payload.choices[0]?.draft_info;
        if (info) { this.add(info); show(this.stats, this.drafting ? "drafting on" : "drafting off"); }
      }
      this.done = true;
    } catch (error) {
      if (error.name === "AbortError") this.head.append(", stopped");
      else this.trouble(error);
    } finally {
      this.box.classList.remove("busy");
    }
    return this;
  }

  trouble(error) {
    const box = document.createElement("p");
    box.className = "trouble";
    box.setAttribute("role", "alert");
    box.textContent = error.message;
    this.box.append(box);
    if (error.status === 401) $("key-dialog").showModal();
  }
}

function draftFields(drafting) {
  if (!drafting) return { num_draft_tokens: 0 };
  const length = $("gamma").value;
  return length ? { num_draft_tokens: Number(length) } : {};
}

// --- what is asked -----------------------------------------------------------------------------------------------

function newAsk(prompt) {
  const seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value);
  const common = { model: $("model").value, temperature: Number($("temperature").value), seed, max_tokens: Number($("max-tokens").value) || 200 };
  if (page.mode === "completion") return { prompt, path: "/v1/completions", body: { ...common, prompt } };
  const messages = [...page.turns, { role: "user", content: prompt }];
  return { prompt, path: "/v1/chat/completions", body: { ...common, messages } };
}

function newTurn(ask, race) {
  $("welcome").hidden = true;
  const turn = document.createElement("section");
  turn.className = `turn ${page.mode}${race ? " race" : ""}`;
  const asked = document.createElement("p");
  asked.className = "asked";
  asked.textContent = ask.prompt;
  const runs = document.createElement("div");
  runs.className = "runs";
  turn.append(asked, runs);
  $("turns").append(turn);
  turn.scrollIntoView({ block: "end" });
  return { turn, runs };
}

async function whileRunning(work) {
  const controller = new AbortController();
  page.running = controller;
  busy(true);
  try { return await work(controller.signal); } finally { page.running = null; busy(false); $("prompt").focus(); }
}

async function send() {
  const prompt = $("prompt").value;
  if (page.running || !prompt.trim()) return;
  $("prompt").value = "";
  const ask = newAsk(prompt);
  const { turn, runs } = newTurn(ask, false);
  const run = new Run(drafting(), runs);
  page.last = { ask, turn, runs, run };
  await whileRunning((signal) => run.go(ask, signal));
  remember(ask, run);
  announce(`Answer finished: ${run.stats.tokens} tokens, ${run.stats.rate.toFixed(0)} a second. ${run.text}`);
}

function remember(ask, run) {
  if (ask.body.messages && run.text.trim()) {
    page.turns = [...ask.body.messages, { role: "assistant", content: run.text.trim() }];
  }
}

/** The last prompt again with drafting switched over; the texts must be the same. */
async function replay() {
  if (page.running || !page.last?.run.done) return;
  const { ask, turn, runs, run } = page.last;
  if (run.drafting === drafting()) return;
  run.box.classList.add("compared");
  const again = new Run(drafting(), runs);
  again.box.scrollIntoView({ block: "end" });
  await whileRunning((signal) => again.go(ask, signal));
  if (again.done) compare(turn, run, again, false);
  page.last = { ...page.last, run: again };
}

async function race() {
  const prompt = $("prompt").value.trim() ? $("prompt").value : page.last?.ask.prompt;
  if (page.running || !prompt) return;
  $("prompt").value = "";
  const ask = newAsk(prompt);
  const { turn, runs } = newTurn(ask, true);
  const both = [new Run(true, runs), new Run(false, runs)];
  page.last = { ask, turn, runs, run: both[0] };
  const first = await whileRunning(async (signal) => {
    const going = both.map((run) => run.go(ask, signal));
    const winner = await Promise.race(going);
    await Promise.all(going);
    return winner;
  });
  if (both.every((run) => run.done)) { first.box.classList.add("won"); compare(turn, both[1], both[0], true); }
  show(both[0].stats, "drafting on");
  remember(ask, both[0]);
}

function compare(turn, before, after, raced) {
  turn.querySelector(".verdict")?.remove();
  const same = before.text === after.text && before.ids.join() === after.ids.join();
  const [on, off] = before.drafting ? [before, after] : [after, before];
  const verdict = document.createElement("p");
  verdict.className = `verdict${same ? "" : " differs"}`;
  const times = (on.stats.tokens && off.stats.whole / on.stats.whole) || 1;
  const speed = times >= 1 ? `${times.toFixed(2)} times as fast with drafting` : `drafting took ${(1 / times).toFixed(2)} times as long`;
  verdict.textContent = same ? `✓ Identical, all ${after.ids.length} tokens${raced ? ", side by side" : ""}: ${speed}` : "✗ The texts differ";
  turn.append(verdict);
  verdict.scrollIntoView({ block: "end" });
  announce(verdict.textContent);
}

// --- controls ----------------------------------------------------------------------------------------------------

const drafting = () => $("switch").getAttribute("aria-checked") === "true";
const stop = () => page.running?.abort();
const announce = (text) => { $("announce").textContent = text; };

function busy(yes) {
  $("stop").hidden = !yes;
  $("send").hidden = yes;
  $("race").disabled = yes;
  $("switch").disabled = yes;
}

function toggle() {
  if (page.running) return;
  $("switch").setAttribute("aria-checked", String(!drafting()));
  replay();
}

function clear() {
  stop();
  page.turns = [];
  page.last = null;
  $("turns").replaceChildren();
  $("welcome").hidden = false;
  $("prompt").focus();
}

function choose(mode) {
  if (page.mode === mode) return;
  page.mode = mode;
  for (const name of ["chat", "completion"]) {
    $(`tab-${name}`).setAttribute("aria-selected", String(name === mode));
    $(`tab-${name}`).tabIndex = name === mode ? 0 : -1;
  }
  $("stage").setAttribute("aria-labelledby", `tab-${mode}`);
  $("prompt").placeholder = mode === "chat" ? "Ask something" : "Text to go on from";
  clear();
}

function theme() {
  const next = { "": "light", light: "dark", dark: "" }[document.documentElement.dataset.theme ?? ""];
  if (next) document.documentElement.dataset.theme = next; else delete document.documentElement.dataset.theme;
  $("theme").setAttribute("aria-label", `Colours: ${next || "as the system"}`);
}

// --- models ------------------------------------------------------------------------------------------------------

async function refresh() {
  try {
    page.models = await api.models();
    const chosen = $("model").value;
    $("model").replaceChildren(...page.models.map((model) => new Option(model.id, model.id, false, model.id === chosen)));
    describe();
  } catch (error) {
    status("failed", error.status === 401 ? "needs an API key" : "no connection");
  }
}

function describe() {
  const model = page.models.find((one) => one.id === $("model").value);
  if (!model) return status("", "no model is launched");
  const ready = model.state === "ready";
  const exact = ready ? `, drafts: ${model.draft}, ${model.exact ? "exact" : "exactness not proven here"}` : "";
  status(model.state, model.error ? `${model.state}: ${model.error}` : `${model.state}${exact}`);
  const chats = model.model_ability.includes("chat");
  $("tab-chat").disabled = ready && !chats;
  if (ready && !chats) choose("completion");
}

function status(state, text) {
  $("state").className = `state ${state}`;
  if ($("state").textContent !== text) $("state").textContent = text;
}

// --- wiring ------------------------------------------------------------------------------------------------------

$("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && page.running) { event.preventDefault(); stop(); }
  if (event.altKey && event.code === "KeyD") { event.preventDefault(); toggle(); }
  if (event.altKey && event.code === "KeyR") { event.preventDefault(); race(); }
});
$("switch").addEventListener("click", toggle);
$("race").addEventListener("click", race);
$("stop").addEventListener("click", stop);
$("clear").addEventListener("click", clear);
$("theme").addEventListener("click", theme);
$("model").addEventListener("change", () => { describe(); clear(); });
$("temperature").addEventListener("input", () => { $("temperature-out").textContent = $("temperature").value; });
for (const [name, other] of [["chat", "completion"], ["completion", "chat"]]) {
  $(`tab-${name}`).addEventListener("click", () => choose(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") { choose(other); $(`tab-${other}`).focus(); }
  });
}
$("key-button").addEventListener("click", () => $("key-dialog").showModal());
$("key-dialog").addEventListener("close", () => {
  if ($("key-dialog").returnValue === "ok") { api.useKey($("key").value); refresh(); }
});
for (const text of SUGGESTIONS) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => { $("prompt").value = text; send(); });
  $("suggestions").append(button);
}
refresh();
setInterval(() => { if (!page.running && !document.hidden) refresh(); }, 5000);
