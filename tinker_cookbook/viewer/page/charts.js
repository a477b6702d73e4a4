// Curves: one chart for each metric, or for several metrics together.
const FIRST_METRICS = ["test/nll", "train_mean_nll", "test/env/all/reward/total", "env/all/reward/total", "test/accuracy", "test/margin", "dpo_loss", "accuracy", "margin", "teacher_kl", "env/all/correct", "optim/kl_sample_train_v2", "optim/entropy", "learning_rate", "optim/lr", "time/step", "num_tokens"];
const MAX_FIRST = 6, MAX_TIP = 10, RAW_WITH_SMOOTH = 8, RUNS_AT_ONCE = 10, SMOOTH_FROM = 6;
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3], [4, 2], [1, 4]];
const curveCache = new Map();     // metric -> Map(id -> { version, curve })
const charts = new Set();         // the charts on the page
let keysOf = {};                  // id -> names of metrics
let joint = [];                   // metrics of the chart of several metrics
let wantedCharts = new Set(), fetchTimer = 0;
const view = { smooth: 0, log: false, axis: "step", wanted: "" };

const versionOf = (id) => { const run = runs.find((each) => each.id === id); return run ? run.version : ""; };
function cached(metric, id) {
  const known = curveCache.get(metric) && curveCache.get(metric).get(id);
  return known ? known.curve : undefined;
}
function isCurrent(metric, id) {
  const known = curveCache.get(metric) && curveCache.get(metric).get(id);
  return known !== undefined && known.version === versionOf(id) && known.parts >= numParts();
}
async function fetchCurves(metrics, drawn = () => {}) {
  const ids = chosenIds(), all = view.axis === "step" ? metrics : [...metrics, view.axis];
  const missing = new Map();      // ids of runs, joined -> metrics: one question for each set of runs
  for (const metric of new Set(all)) {
    const stale = ids.filter((id) => !isCurrent(metric, id));
    if (!stale.length) continue;
    const key = JSON.stringify(stale);
    missing.set(key, [...(missing.get(key) || []), metric]);
  }
  for (const [key, names] of missing) {
    const stale = JSON.parse(key);
    for (let start = 0; start < stale.length; start += RUNS_AT_ONCE) {
      await fetchSome(stale.slice(start, start + RUNS_AT_ONCE), names);
      if (start + RUNS_AT_ONCE < stale.length) drawn();
    }
  }
}
async function fetchSome(ids, names) {
  const versions = ids.map(versionOf), parts = numParts(), answer = await source.curves(ids, names);
  for (const metric of names) {
    if (!curveCache.has(metric)) curveCache.set(metric, new Map());
    ids.forEach((id, index) => curveCache.get(metric).set(id, { version: versions[index], parts, curve: answer[metric][id] || null }));
  }
}
function needChart(chart) {
  wantedCharts.add(chart);
  clearTimeout(fetchTimer);
  fetchTimer = setTimeout(loadCharts, 30);
}
async function loadCharts() {
  const list = [...wantedCharts];
  wantedCharts = new Set();
  if (!list.length) return;
  try {
    await fetchCurves([...new Set(list.flatMap((chart) => chart.metrics))], () => list.forEach(drawIfShown));
  } catch (error) {
    setState("off", `not reachable (${error.message})`);
    return;
  }
  list.forEach(drawIfShown);
}
function drawIfShown(chart) { if (charts.has(chart)) chart.draw(); }
// A mean that forgets: what is smoothed are the means of the parts, weighted by their number of points.
function smoothed(curve) {
  let sum = 0, weight = 0;
  return curve.mean_y.map((value, index) => {
    const keep = view.smooth ** curve.count[index];
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}
function onAxis(id, steps) {
  if (view.axis === "step") return steps;
  const axis = cached(view.axis, id);
  if (!axis) return null;
  let at = 0;
  return steps.map((step) => {
    while (at < axis.x.length - 2 && axis.x[at + 1] < step) at += 1;
    const [x0, x1] = [axis.x[at], axis.x[Math.min(at + 1, axis.x.length - 1)]];
    const part = x1 > x0 ? Math.min(1, Math.max(0, (step - x0) / (x1 - x0))) : 0;
    return axis.y[at] + part * (axis.y[Math.min(at + 1, axis.y.length - 1)] - axis.y[at]);
  });
}
const drawable = (values) => view.log ? values.map((value) => value > 0 ? value : null) : values;
function linesOf(chart) {
  const lines = [], ids = chosenIds();
  chart.metrics.forEach((metric, index) => {
    for (const id of ids) {
      const curve = (chart.detail && chart.detail[metric] && chart.detail[metric][id]) || cached(metric, id);
      const steps = curve && curve.x.length ? onAxis(id, curve.x) : null;
      if (!steps) continue;
      const look = { id, metric, dash: DASHES[index % DASHES.length], total: curve.total };
      const smooth = view.smooth > 0 && curve.total >= SMOOTH_FROM;
      if (!smooth || ids.length * chart.metrics.length <= RAW_WITH_SMOOTH) lines.push({ ...look, x: steps, steps: curve.x, y: drawable(curve.y), faint: smooth });
      if (smooth) lines.push({ ...look, x: onAxis(id, curve.mean_x), steps: curve.mean_x, y: drawable(smoothed(curve)), faint: false });
    }
  });
  return lines;
}
const axisTitle = () => view.axis === "step" ? "step" : view.axis === "axis/seconds" ? "seconds of training" : "tokens";
const axisNumber = (value) => Math.abs(value) >= 1e4 ? count(value) : value !== 0 && Math.abs(value) < 1e-3 ? Number(value.toPrecision(3)).toExponential() : String(Number(value.toPrecision(6)));
const axisTime = (value) => view.axis === "axis/seconds" && value >= 90 ? span(value) : axisNumber(value);

class Chart {
  constructor(metrics, { large = false, title = null } = {}) {
    this.metrics = metrics;
    this.detail = null;           // curves of a zoomed part, with more points
    this.plot = make("div", { class: "plot", tabIndex: 0, role: "img" });
    this.tip = make("div", { class: "tip", hidden: true });
    this.enlarge = make("button", { class: "link small", type: "button", ariaLabel: `Enlarge ${metrics[0]}`, onclick: () => this.toggle() }, "enlarge");
    this.node = make("section", { class: large ? "large" : "" },
      make("div", { class: "chart-head" }, title || make("h3", {}, metrics.join(", ")), large ? null : this.enlarge), this.plot);
    this.plot.append(this.tip);
    this.plot.addEventListener("keydown", (event) => this.press(event));
    this.plot.addEventListener("blur", () => { this.tip.hidden = true; });
    charts.add(this);
  }
  remove() { this.clear(); charts.delete(this); seen.unobserve(this.node); this.node.remove(); }
  clear() { if (this.u) { this.u.destroy(); this.u = null; } }
  toggle() {
    const isLarge = this.node.classList.toggle("large");
    this.enlarge.textContent = isLarge ? "reduce" : "enlarge";
    this.draw();
  }
  draw() {
    const lines = linesOf(this);
    const shape = JSON.stringify([lines.map((line) => [line.id, line.metric, line.faint]), view.log, view.axis, this.plot.clientWidth, this.plot.clientHeight, colourOf(lines.length ? lines[0].id : "")]);
    this.lines = lines;
    this.plot.dataset.smooth = String(view.smooth);
    this.plot.dataset.runs = String(new Set(lines.map((line) => line.id)).size);
    if (!lines.length) {
      this.clear();
      this.shape = "";
      const missing = view.axis !== "step" ? "These runs do not record this axis." : chosen.size ? "No values yet." : "Choose runs on the left.";
      if (!this.empty) this.plot.append(this.empty = make("p", { class: "empty" }, missing));
      this.empty.textContent = missing;
      return;
    }
    if (this.empty) { this.empty.remove(); this.empty = null; }
    const data = uPlot.join(lines.map((line) => [line.x, line.y]));
    this.plot.setAttribute("aria-label", this.describe());
    if (this.u && shape === this.shape) { this.u.setData(data, !this.isZoomed); return; }
    const zoom = this.u && this.isZoomed ? [this.u.scales.x.min, this.u.scales.x.max] : null;
    this.clear();
    this.shape = shape;
    this.u = new uPlot(this.options(lines), data, this.plot);
    if (zoom && this.axisDrawn === view.axis) this.u.setScale("x", { min: zoom[0], max: zoom[1] });
    else this.isZoomed = false;
    this.axisDrawn = view.axis;
  }
  options(lines) {
    const style = getComputedStyle(document.documentElement), soft = style.getPropertyValue("--soft"), line = style.getPropertyValue("--line");
    const axis = { stroke: soft, grid: { stroke: line, width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const isLarge = this.node.classList.contains("large") || this.node.closest("#joint");
    return {
      width: this.plot.clientWidth || 360, height: isLarge ? (innerWidth < 861 ? 260 : 380) : 220, legend: { show: false }, padding: [8, 16, 0, 0],
      cursor: { drag: { x: true, y: false, setScale: true }, points: { size: 7 }, focus: { prox: -1 }, y: false },
      scales: { x: { time: false, range: (u, low, high) => (u.data[0].length === 1 ? [u.data[0][0] - 1, u.data[0][0] + 1] : [low, high]) }, y: view.log ? { distr: 3, range: (u, low, high) => [low * 0.92, high * 1.08] } : { range: (u, low, high) => padded(low, high) } },
      axes: [{ ...axis, size: 30, values: (u, splits) => splits.map((value) => value === null || (view.axis === "step" && !Number.isInteger(value)) ? "" : axisTime(value)), space: 60 }, { ...axis, size: 54, values: (u, splits) => splits.map((value) => value === null ? "" : axisNumber(value)) }],
      series: [{}, ...lines.map((each) => ({
        stroke: colourOf(each.id), alpha: each.faint ? 0.3 : 1, width: each.faint ? 1 : 1.8, dash: each.dash, spanGaps: true,
        points: each.x.length < 4 ? { show: true, size: 7, fill: colourOf(each.id) } : { show: false },
      }))],
      hooks: { setCursor: [(u) => this.hover(u)], setScale: [(u, key) => { if (key === "x") this.zoomed(u); }] },
    };
  }
  // After a zoom the server is asked for the points that the whole curve had no room for.
  zoomed(u) {
    const all = [Math.min(...u.data[0].slice(0, 1)), u.data[0][u.data[0].length - 1]];
    this.isZoomed = u.scales.x.min > all[0] || u.scales.x.max < all[1];
    if (this.detail && !this.isZoomed) { this.detail = null; setTimeout(() => { this.u && this.draw(); }); }
    const hasMore = (this.lines || []).some((line) => line.total > line.x.length);
    if (!source.isLive || !this.isZoomed || view.axis !== "step" || !hasMore || this.detail) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(async () => {
      if (!this.u || !this.isZoomed) return;
      const between = [Math.floor(this.u.scales.x.min), Math.ceil(this.u.scales.x.max)];
      const zoom = { min: this.u.scales.x.min, max: this.u.scales.x.max };
      this.detail = await source.curves(chosenIds(), this.metrics, between);
      this.lines = linesOf(this);
      if (!this.u) return;
      this.u.setData(uPlot.join(this.lines.map((line) => [line.x, line.y])), false);
      this.u.setScale("x", zoom);
      this.u.root.dataset.detail = "yes";
    }, 120);
  }
  hover(u) {
    const { left, top } = u.cursor;
    if (left < 0 || left === null || !this.lines) { this.tip.hidden = true; return; }
    const at = u.posToVal(left, "x"), rows = [];
    for (const line of this.lines) {
      const index = nearest(line.x, at);
      if (line.y[index] !== null && !line.faint) rows.push({ line, x: line.x[index], step: line.steps[index], y: line.y[index], away: Math.abs(u.valToPos(line.y[index], "y") - top) });
    }
    if (!rows.length) { this.tip.hidden = true; return; }
    const close = [...rows].sort((a, b) => a.away - b.away), shown = close.slice(0, MAX_TIP).sort((a, b) => b.y - a.y);
    const steps = new Set(shown.map((row) => Math.round(row.step)));
    const where = view.axis === "step" ? `step ${[...steps][0]}${steps.size > 1 ? " or near" : ""}` : `${axisTime(close[0].x)}, step ${Math.round(close[0].step)}`;
    this.tip.replaceChildren(make("div", { class: "soft" }, where), ...shown.map((row) => {
      const label = this.metrics.length > 1 ? `${nameOf(row.line.id)}: ${row.line.metric}` : nameOf(row.line.id);
      return make("div", { class: row === close[0] ? "near" : "" }, swatch(row.line.id), make("span", {}, label), make("b", {}, number(row.y)));
    }), rows.length > shown.length ? make("div", { class: "soft" }, `and ${rows.length - shown.length} more`) : null);
    this.tip.hidden = false;
    const box = this.plot.getBoundingClientRect(), x = left + 60, width = this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, x + width + 24 > box.width ? x - width - 20 : x + 14)}px`;
    this.tip.style.top = `${Math.max(0, Math.min(top, box.height - this.tip.offsetHeight))}px`;
  }
  press(event) {
    if (!this.u || !["ArrowLeft", "ArrowRight", "Home", "End", "Escape"].includes(event.key)) return;
    event.preventDefault();
    if (event.key === "Escape") { this.tip.hidden = true; this.u.setScale("x", { min: this.u.data[0][0], max: this.u.data[0][this.u.data[0].length - 1] }); return; }
    const xs = this.u.data[0], last = xs.length - 1, now = this.at === undefined ? last : this.at;
    const jump = Math.max(1, Math.round(xs.length / 60)) * (event.shiftKey ? 5 : 1);
    this.at = event.key === "Home" ? 0 : event.key === "End" ? last : Math.min(last, Math.max(0, now + (event.key === "ArrowLeft" ? -jump : jump)));
    this.u.setCursor({ left: this.u.valToPos(xs[this.at], "x"), top: this.u.over.clientHeight / 2 });
  }
  describe() {
    const ends = this.lines.filter((line) => !line.faint).slice(0, 8).map((line) => `${nameOf(line.id)} ends at ${number(line.y[line.y.length - 1] ?? NaN)}`);
    return `${this.metrics.join(", ")} by ${axisTitle()}: ${ends.join("; ")}`;
  }
}
function padded(low, high) {
  if (low === null) return [0, 1];
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 0.5;
  return [low - pad, high + pad];
}
function nearest(xs, at) {
  let low = 0, high = xs.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (xs[middle] < at) low = middle + 1; else high = middle; }
  return low > 0 && at - xs[low - 1] < xs[low] - at ? low - 1 : low;
}
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const chart = entry.target.chart;
    chart.isSeen = entry.isIntersecting;
    if (chart.isSeen) needChart(chart);
  }
}, { rootMargin: "300px" });
function place(chart, parent) {
  chart.node.chart = chart;
  parent.append(chart.node);
  seen.observe(chart.node);
}
function groupOf(metric) { return metric.includes("/") ? metric.split("/")[0] : "training"; }
let layout = "";
async function showCurves() {
  keysOf = { ...keysOf, ...(await source.keys(chosenIds())) };
  const names = [...new Set(chosenIds().flatMap((id) => keysOf[id] || []))].sort();
  const main = new Set([...chosenRuns().flatMap((run) => run.main), ...FIRST_METRICS].filter((name) => names.includes(name)));
  const first = [...main].slice(0, MAX_FIRST);
  const fits = view.wanted.trim().toLowerCase();
  const matching = fits ? names.filter((name) => name.toLowerCase().includes(fits)) : names;
  const groups = fits ? [["found", matching]] : [["main", first], ...Object.entries(Object.groupBy ? Object.groupBy(matching, groupOf) : groupBy(matching, groupOf)).sort(([a], [b]) => a < b ? -1 : 1)];
  const state = JSON.stringify(groups);
  if (state !== layout) {
    const open = new Set([...document.querySelectorAll(".group[open]")].map((node) => node.dataset.name));
    const isNew = layout === "";
    layout = state;
    for (const chart of [...charts]) if (!chart.node.closest("#joint")) chart.remove();
    $("groups").replaceChildren(...groups.map(([name, metrics]) => groupNode(name, metrics, isNew ? name === "main" : open.has(name) || name === "found" || name === "main")));
    $("names").replaceChildren(...names.map((name) => make("option", { value: name })));
  }
  if (!names.length) $("groups").replaceChildren(make("section", {}, make("p", { class: "empty" }, chosen.size ? "These runs have no metrics yet." : "Choose runs in the list.")));
  for (const chart of charts) if (chart.isSeen) needChart(chart);
}
function groupBy(items, key) {
  const found = {};
  for (const item of items) (found[key(item)] = found[key(item)] || []).push(item);
  return found;
}
function groupNode(name, metrics, isOpen) {
  const body = make("div", { class: "charts" });
  const node = make("details", { class: "group", open: isOpen }, make("summary", {}, name === "main" ? "Main" : name === "found" ? "Found" : name, " ", make("span", { class: "soft small" }, String(metrics.length))), body);
  node.dataset.name = name;
  const fill = () => { if (node.open && !body.childNodes.length) for (const metric of metrics) place(new Chart([metric]), body); };
  node.addEventListener("toggle", fill);
  queueMicrotask(fill);
  return node;
}
function showJoint() {
  const old = [...charts].find((chart) => chart.node === $("joint"));
  if (old) { old.clear(); charts.delete(old); seen.unobserve($("joint")); }
  $("joint").hidden = !joint.length;
  $("joint").replaceChildren();
  if (!joint.length) return;
  const chips = make("div", {}, ...joint.map((metric, index) => make("span", { class: "chip" }, `${["solid", "dashed", "dotted", "dash-dot", "short dashes", "wide dots"][index % 6]}: ${metric}`,
    make("button", { type: "button", ariaLabel: `Remove ${metric}`, onclick: () => { joint = joint.filter((each) => each !== metric); showJoint(); } }, "×"))));
  const chart = new Chart([...joint], { large: true, title: chips });
  $("joint").replaceChildren(...chart.node.childNodes);
  chart.node = $("joint");
  chart.node.chart = chart;
  seen.observe(chart.node);
  needChart(chart);
}
function redraw() { for (const chart of charts) if (chart.isSeen) needChart(chart); else { chart.clear(); chart.shape = ""; } }
