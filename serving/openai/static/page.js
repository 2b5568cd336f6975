// Asks the routes of this origin, and draws what they answer.
import { examples, topics } from "./sentences.js";

const SHOWN = 5; // nearest sentences
const RETRY_MS = 2000; // until the server is ready
const sentences = Object.entries(topics).flatMap(([topic, texts]) => texts.map((text) => ({ text, topic })));
const vectors = new Map(); // "model/version" -> the promised vectors of the sentences
const one = (selector, within = document) => within.querySelector(selector);

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  made.dir = "auto"; // a text may run from right to left
  return made;
}

// The JSON of an answer. Throws an Error with the reason in words.
async function ask(path, body) {
  const key = one("#api-key").value.trim();
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let answer, said;
  try {
    answer = await fetch(path, body ? { method: "POST", body: JSON.stringify(body), headers } : { headers });
    said = await answer.text();
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  let content = null;
  try {
    content = JSON.parse(said);
  } catch {} // not from these routes, but for example from a proxy
  if (answer.ok && content) return content;
  if (answer.status === 401) one("#key").hidden = false;
  const wait = answer.headers.get("Retry-After");
  const reason = content?.error?.message ?? (answer.statusText || "no reason given");
  const why = `The server refused (${answer.status}): ${reason}.${wait ? ` Try again in ${wait} s.` : ""}`;
  throw Object.assign(new Error(why), { status: answer.status });
}

const embed = async (model, input) =>
  (await ask("v1/embeddings", { model, input })).data.map(({ embedding }) => embedding);

// What Triton counted for a model so far, its loaded versions together; times in ms.
async function counted(model) {
  const { model_stats } = await ask(`v2/models/${encodeURIComponent(model)}/stats`);
  const sum = (phase, field) =>
    model_stats.reduce((total, { inference_stats }) => total + Number(inference_stats?.[phase]?.[field] ?? 0), 0);
  const spent = (...phases) => phases.reduce((total, phase) => total + sum(phase, "ns") / 1e6, 0);
  return {
    requests: sum("success", "count"),
    queue: spent("queue"),
    model: spent("compute_input", "compute_infer", "compute_output"),
    versions: model_stats.map(({ version }) => version).join(),
  };
}

// An answer, and where its time went: Triton's share is known only if it ran no other request at the same time.
async function timed(model, before, send) {
  const start = performance.now();
  const answer = await send();
  const total = performance.now() - start;
  let after = await counted(model);
  for (let tries = 0; tries < 20 && after.requests === before.requests; tries++) {
    await new Promise((resolve) => setTimeout(resolve, 10)); // Triton counts a request after it was answered
    after = await counted(model);
  }
  const requests = after.requests - before.requests;
  const [queue, inModel] = [after.queue - before.queue, after.model - before.model];
  return { answer, total, queue, inModel, rest: total - queue - inModel, requests };
}

function cosine(a, b) {
  const dot = (x, y) => x.reduce((sum, value, place) => sum + value * y[place], 0);
  return dot(a, b) / (Math.sqrt(dot(a, a) * dot(b, b)) || 1);
}

async function search(model) {
  const before = await counted(model);
  const known = `${model}/${before.versions}`;
  if (!vectors.has(known)) {
    const promised = embed(model, sentences.map(({ text }) => text));
    vectors.set(known, promised);
    promised.catch(() => vectors.delete(known));
  }
  const others = await vectors.get(known);
  const run = await timed(model, await counted(model), () => embed(model, one("#sentence").value));
  const scored = sentences.map((each, place) => ({ ...each, score: cosine(run.answer[0], others[place]) }));
  return { ...run, rows: scored.sort((a, b) => b.score - a.score).slice(0, SHOWN) };
}

async function rank(model) {
  const texts = one("#texts").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const query = one("#query").value;
  const run = await timed(model, await counted(model), () => ask("rerank", { model, query, texts }));
  return { ...run, rows: run.answer.map(({ index, score }) => ({ text: texts[index], topic: "", score })) };
}

const picked = []; // items, the oldest first
let matches = []; // items whose title has the typed words

// The title of an item, with its name if another of the shown items has the same title.
function titleAmong(items, { item, title }) {
  return items.some((other) => other.title === title && other.item !== item) ? `${title} (${item})` : title;
}

function itemButton(title, label, act) {
  const button = element("button", title);
  button.type = "button";
  button.ariaLabel = `${label} ${title}`;
  button.addEventListener("click", act);
  return button;
}

function drawItems() {
  const title = (item) => titleAmong([...matches, ...picked], item);
  one("#matches").replaceChildren(...matches.map((item) => itemButton(title(item), "Pick", () => pick(item))));
  one("#picked").replaceChildren(...picked.map((item, place) => itemButton(title(item), "Remove", () => {
    picked.splice(place, 1);
    drawItems();
    one("#title").focus();
    goRecommend();
  })));
}

function pick(item) {
  picked.push(item);
  matches = [];
  one("#title").value = "";
  drawItems();
  one("#title").focus();
  goRecommend();
}

const recommender = () => `recommenders/${encodeURIComponent(one("#recommend-model").value)}`;
const find = async (title) => (await ask(`${recommender()}/items?title=${encodeURIComponent(title)}`)).data;

// Recommends items after the picked ones; a typed title is picked first.
async function recommend(model) {
  const typed = one("#title").value.trim();
  if (typed) {
    const [first] = await find(typed);
    if (!first) throw new Error(`No title or name contains "${typed}".`);
    picked.push(first);
    matches = [];
    one("#title").value = "";
    drawItems();
  }
  if (!picked.length) throw new Error("Pick a title first.");
  const history = picked.map(({ item }) => item);
  const run = await timed(model, await counted(model), () => ask(recommender(), { history }));
  if (!run.answer.data.length) throw new Error("The model has nothing left to recommend.");
  const shown = [...run.answer.data, ...picked];
  return { ...run, rows: run.answer.data.map((item) => ({ text: titleAmong(shown, item) })) };
}

function draw(section, { rows, total, queue, inModel, rest, requests }) {
  const milliseconds = (value) => `${value.toFixed(value < 1 ? 2 : 1)} ms`;
  const list = rows.map(({ text, topic, score }) => {
    const row = element("li", "");
    row.append(element("span", text, "text"));
    if (score !== undefined) {
      const bar = element("i", "", "bar");
      bar.style.setProperty("--share", `${Math.max(0, Math.min(1, score)) * 100}%`);
      row.append(element("small", topic), element("b", score.toFixed(2)), bar);
    }
    return row;
  });
  one("ol", section).replaceChildren(...list);
  const known = requests === 1;
  const parts = [
    ["queue", "In the queue", queue],
    ["in-model", section.id === "recommend" ? "Model" : "Tokenize and model", inModel],
    ["rest", "All else", rest],
  ];
  const shares = parts.map(([name, , value]) => {
    const share = element("i", "", name);
    share.style.setProperty("--share", Math.max(0, value));
    return share;
  });
  const figures = [["total", "In all", total], ...(known ? parts : [])].map(([name, what, value]) => {
    const figure = element("div", "", name);
    figure.append(element("dt", what), element("dd", milliseconds(value)));
    return figure;
  });
  one(".shares", section).replaceChildren(...(known ? shares : []));
  one(".times", section).replaceChildren(...figures);
  one(".note", section).textContent = known
    ? "Queue and model: by Triton's statistics. All else: the browser, the connection and these routes."
    : `Triton counted ${requests} requests at the same time, so its share of this one is not known.`;
  one(".found", section).hidden = false;
  const [{ text, score }] = rows;
  const best = score === undefined ? text : `${text} ${score.toFixed(2)}`;
  one(".heard", section).textContent = `Best: ${best}. In all ${milliseconds(total)}.`;
}

// Submitting the section's form, or calling the returned function, runs `run` and draws its result. An earlier, slower
// run is dropped. Choosing another model removes the result of the one before.
function connect(id, run) {
  const section = one(id);
  section.insertBefore(one("#result").content.cloneNode(true), one("details", section));
  let turns = 0;
  one("form", section).addEventListener("submit", (event) => {
    event.preventDefault();
    go();
  });
  one("select", section).addEventListener("change", () => {
    turns++;
    section.ariaBusy = "false";
    clear();
  });
  function clear(problem = "") {
    one(".found", section).hidden = true;
    one(".heard", section).textContent = "";
    one(".problem", section).textContent = problem;
  }
  async function go() {
    const turn = ++turns;
    section.ariaBusy = "true";
    one(".problem", section).textContent = "";
    try {
      const found = await run(one("select", section).value);
      if (turn === turns) draw(section, found);
    } catch (error) {
      if (turn === turns) clear(error.message);
    } finally {
      if (turn === turns) section.ariaBusy = "false";
    }
  }
  return go;
}

// Offers the models that can do what a section needs; hides it if none can.
function offer(id, models, capability) {
  const able = models.filter(({ capabilities }) => capabilities.includes(capability));
  one("select", one(id)).replaceChildren(...able.map((model) => new Option(model.id)));
  one(id).hidden = able.length === 0;
  return able.length;
}

// Shows the forms once a model is ready.
async function begin() {
  const status = one("#status");
  let problem = new Error("No model is ready that makes embeddings, scores pairs of texts or takes names.");
  try {
    const { data } = await ask("v1/models");
    const { data: recommenders } = await ask("recommenders");
    if (offer("#search", data, "embed") + offer("#rank", data, "rerank") + offer("#recommend", recommenders, "recommend")) {
      status.hidden = true;
      return;
    }
  } catch (error) {
    problem = error;
  }
  status.textContent = problem.message;
  status.hidden = false;
  if (problem.status !== 401) setTimeout(begin, RETRY_MS); // else the key form asks again
}

for (const text of examples) {
  const button = element("button", text);
  button.type = "button";
  button.addEventListener("click", () => {
    one("#sentence").value = text;
    one("#search form").requestSubmit();
  });
  one(".examples").append(button);
}
one("#search summary").textContent = `The ${sentences.length} bundled sentences`;
for (const [topic, texts] of Object.entries(topics)) {
  const list = element("ul", "");
  list.append(...texts.map((text) => element("li", text)));
  one("#bundled").append(element("h3", topic), list);
}
one("#key").addEventListener("submit", (event) => {
  event.preventDefault();
  begin();
});
connect("#search", search);
connect("#rank", rank);
const goRecommend = connect("#recommend", recommend);
one("#title").addEventListener("input", async (event) => {
  const typed = event.target.value;
  const found = await find(typed).catch(() => []); // submitting shows why
  if (typed !== one("#title").value) return;
  matches = found;
  drawItems();
});
one("#recommend-model").addEventListener("change", () => {
  picked.length = matches.length = 0;
  drawItems();
});
begin();
