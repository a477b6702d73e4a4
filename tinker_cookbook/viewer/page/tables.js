// Settings, checkpoints, samples, evaluations and times of the chosen runs.
const MANY_CHARACTERS = 400, TABLE_RUNS = 12, MOST_RESULTS = 60, SAMPLE_RUNS = 4, GANTT_RUNS = 6;
const shorten = (value, most) => value.length > most ? `${value.slice(0, most)}…` : value;
const show = (value) => value === null || value === undefined ? "–" : typeof value === "string" ? value : typeof value === "number" ? String(Number(value.toPrecision(6))) : JSON.stringify(value);
const heading = (id) => make("th", { scope: "col" }, swatch(id), nameOf(id));
const empty = (text) => make("section", {}, make("p", { class: "empty" }, text));
function tooMany(list, most) {
  return list.length > most ? make("p", { class: "soft small" }, `The first ${most} of ${list.length} chosen runs are shown.`) : null;
}
async function chosenDetails(most) {
  return Promise.all(chosenRuns().slice(0, most).map(async (run) => ({ run, ...(await detailsOf(run)) })));
}

async function showSettings() {
  const all = await chosenDetails(MOST_RESULTS), list = all.slice(0, TABLE_RUNS);
  await showResults(all);
  const keys = [...new Set(list.flatMap((each) => Object.keys(each.settings)))].sort();
  const rows = keys.map((key) => [key, list.map((each) => each.settings[key])]).filter(([, values]) =>
    $("equal").checked || list.length < 2 || values.some((value) => JSON.stringify(value) !== JSON.stringify(values[0])));
  const usual = (values) => JSON.stringify(values[0]);
  table($("settings-table"), [], rows.map(([key, values]) => make("tr", {}, make("th", { scope: "row" }, key),
    ...values.map((value) => make("td", { class: JSON.stringify(value) === usual(values) ? "" : "other", title: show(value) }, shorten(show(value), MANY_CHARACTERS))))),
    list.length ? "The settings of these runs agree." : "Choose runs in the list.");
  if (rows.length) $("settings-table").tHead.rows[0].replaceChildren(make("th", { scope: "col" }, "Setting"), ...list.map((each) => heading(each.id)));
  table($("checkpoints"), ["Run", "Checkpoint", "Best value", "Paths"], list.flatMap((each) => [...each.checkpoints].reverse().map((record) => make("tr", {},
    make("td", {}, swatch(each.id), nameOf(each.id)), make("td", { class: "number" }, String(record.name)),
    make("td", { class: "number" }, record.best_value === undefined ? "–" : number(record.best_value)),
    make("td", { class: "mono" }, [record.state_path, record.sampler_path].filter(Boolean).join("\n"))))), "No checkpoint is recorded.");
}

async function showSamples() {
  const list = (await chosenDetails(SAMPLE_RUNS)).filter((each) => each.samples.length);
  if (!list.length) { $("samples").replaceChildren(empty("None of the chosen runs has recorded samples.")); return; }
  const prompts = [...new Set(list.flatMap((each) => each.samples.map((sample) => sample.prompt)))];
  $("samples").replaceChildren(tooMany(chosenRuns(), SAMPLE_RUNS) || "", ...prompts.map((prompt) => {
    const asked = list.filter((each) => each.samples.some((sample) => sample.prompt === prompt));
    const columns = asked.map((each) => numbered(each.samples.filter((sample) => sample.prompt === prompt)));
    const steps = [...new Set(columns.flatMap((column) => [...column.keys()]))].sort((a, b) => a - b);
    const node = make("table", { class: "answers-table" });
    table(node, [], steps.map((step) => make("tr", {}, make("td", {}, step < 0 ? `sample ${step + 1e9}` : `step ${step}`), ...columns.map((column) => {
      const sample = column.get(step);
      return make("td", {}, sample ? sample.answer : "–", sample && typeof sample.reward === "number" ? make("div", { class: "soft small" }, `reward ${number(sample.reward)}`) : null);
    }))), "");
    node.tHead.rows[0].replaceChildren(make("th", { scope: "col" }, "When"), ...asked.map((each) => heading(each.id)));
    return make("section", {}, make("p", { class: "prompt" }, prompt), make("div", { class: "scroll" }, node));
  }));
}
// Samples of older runs have no step; they are numbered.
function numbered(samples) {
  return new Map(samples.map((sample, index) => [sample.step === null || sample.step === undefined ? index + 1 - 1e9 : sample.step, sample]));
}

const IS_EVALUATION = /^(test|eval|held_out|dev|val)[/_]/;
const LOWER = /(^|[/_])(nll|bpb|loss|kl|perplexity|error|errors)($|[/_:])/;
async function showEvaluations() {
  const ids = chosenIds().slice(0, TABLE_RUNS);
  const found = await source.keys(ids);
  const metrics = [...new Set(ids.flatMap((id) => found[id] || []))].filter((name) => IS_EVALUATION.test(name)).sort();
  await fetchCurves(metrics);
  const rows = metrics.map((metric) => make("tr", {}, make("th", { scope: "row" }, metric), ...ids.map((id) => {
    const curve = cached(metric, id);
    if (!curve || !curve.y.length) return make("td", {}, "–");
    const best = (LOWER.test(metric) ? Math.min : Math.max)(...curve.y), at = curve.x[curve.y.indexOf(best)];
    return make("td", {}, number(curve.y[curve.y.length - 1]), make("div", { class: "soft small" }, `first ${number(curve.y[0])}, best ${number(best)} at step ${at}`));
  })));
  const held = make("table", { class: "matrix" });
  table(held, [], rows, ids.length ? "These runs have no held-out metrics." : "Choose runs in the list.");
  if (rows.length) held.tHead.rows[0].replaceChildren(make("th", { scope: "col" }, "Metric"), ...ids.map(heading));
  const stored = await source.evaluations(), names = [...new Set(stored.map((row) => row.benchmark))];
  const bench = make("table");
  table(bench, ["Benchmark", "Evaluation", "Score", "Correct", "Cut", "Errors"], names.flatMap((name) => stored.filter((row) => row.benchmark === name)
    .sort((a, b) => (b.numbers.score || 0) - (a.numbers.score || 0)).map(({ name: title, model, numbers: n }) => make("tr", {},
      make("td", {}, name), make("td", {}, make("div", { class: "name" }, title), model ? make("div", { class: "soft small" }, model) : null),
      make("td", { class: "number" }, n.score === undefined ? "–" : `${number(n.score)}${n.standard_error ? ` ± ${number(n.standard_error)}` : ""}`),
      make("td", { class: "number" }, `${show(n.num_correct)} of ${show(n.num_examples)}`),
      make("td", { class: "number" }, show(n.num_truncated)), make("td", { class: "number" }, show(n.num_errors))))), "No stored evaluation; `tinker-cookbook eval` makes one.");
  $("evaluations").replaceChildren(tooMany(chosenRuns(), TABLE_RUNS) || "",
    make("section", {}, make("h2", {}, "Held-out metrics"), make("div", { class: "scroll" }, held)),
    make("section", {}, make("h2", {}, "Benchmarks"), make("div", { class: "scroll" }, bench)));
}

const WHOLE = ["step", "total"];
const spanSteps = new Map();      // id -> the step whose spans are shown
async function showTiming() {
  const list = (await chosenDetails(GANTT_RUNS)).filter((each) => each.times.length);
  if (!list.length) { $("timing").replaceChildren(empty("None of the chosen runs has recorded times.")); return; }
  const nodes = await Promise.all(list.map(timingOf));
  $("timing").replaceChildren(tooMany(chosenRuns(), GANTT_RUNS) || "", ...nodes);
}
function bar(name, seconds, whole, note) {
  const mark = make("i");
  mark.style.width = `${Math.min(100, 100 * seconds / whole)}%`;
  return [make("div", { class: "name" }, name), make("div", { class: "track" }, mark), make("div", { class: "number" }, note)];
}
async function timingOf(each) {
  // Steps may overlap: "step" is the time from the end of one step to the end of the next.
  const whole = each.times.find((row) => row.name === "step") || each.times.find((row) => row.name === "total") || each.times[0];
  const parts = each.times.filter((row) => !WHOLE.includes(row.name) && !/_(max|mean|min)$/.test(row.name)), base = Math.max(whole.mean, 1e-9);
  const rows = [whole, ...parts].flatMap((row) => bar(row === whole ? "whole step" : row.name, row.mean, base, `${number(row.mean)} s${row === whole ? "" : `, ${Math.round(100 * row.mean / base)}%`}`));
  const node = make("section", {}, make("h2", {}, swatch(each.id), `Where a step of ${nameOf(each.id)} goes`),
    make("p", { class: "soft small" }, `Mean seconds per step; a part may contain another one. In the last steps, a whole step took ${number(whole.recent)} s.`), make("div", { class: "time" }, ...rows));
  if (each.timed_steps.length) node.append(await spansOf(each));
  return node;
}
async function spansOf(each) {
  const steps = each.timed_steps, now = steps.includes(spanSteps.get(each.id)) ? spanSteps.get(each.id) : steps[steps.length - 1];
  const list = await source.spans(each.id, now), end = Math.max(...list.map((item) => item.start + item.seconds), 1e-9);
  const choice = make("select", { key: `spans ${each.id}`, ariaLabel: `Step of ${nameOf(each.id)}`, onchange: () => { spanSteps.set(each.id, Number(choice.value)); showTiming(); } },
    ...steps.map((step) => make("option", { value: step, selected: step === now }, `step ${step}`)));
  const byName = Object.entries(groupBy(list, (item) => item.name));
  const rows = byName.flatMap(([name, items]) => {
    const track = make("div", { class: "track spans" }, ...items.map((item) => {
      const mark = make("i", { title: `${name}: ${number(item.seconds)} s, from ${number(item.start)} s` });
      mark.style.left = `${100 * item.start / end}%`;
      mark.style.width = `${100 * item.seconds / end}%`;
      return mark;
    }));
    return [make("div", { class: "name" }, name), track, make("div", { class: "number" }, `${number(items.reduce((sum, item) => sum + item.seconds, 0))} s`)];
  });
  return make("div", { class: "spans-of" }, make("div", { class: "head" }, make("h2", {}, "One step over time"), choice), make("div", { class: "time" }, ...rows));
}
