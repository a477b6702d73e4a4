// Where the numbers come from: a server on this machine, or data inside the page.
const PARTS_FEW = 500, PARTS_MANY = 200, MANY_RUNS = 10;
const numParts = () => chosenIds().length > MANY_RUNS || innerWidth < 600 ? PARTS_MANY : PARTS_FEW;
function query(words) {
  const params = new URLSearchParams();
  for (const [name, value] of Object.entries(words)) {
    for (const each of Array.isArray(value) ? value : [value]) params.append(name, each);
  }
  return params;
}
const live = {
  isLive: true,
  async ask(name, words) {
    // In the body, because fifty names of runs are too long for an address.
    const answer = await fetch(`api/${name}`, { method: "POST", body: query(words).toString(), cache: "no-store", credentials: "omit" });
    if (!answer.ok) throw new Error((await answer.text()) || answer.statusText);
    return answer.json();
  },
  runs() { return this.ask("runs", {}); },
  keys(runs) { return this.ask("keys", { run: runs }); },
  curves(runs, metrics, between) {
    return this.ask("curves", { run: runs, metric: metrics, parts: numParts(), ...(between ? { first: between[0], last: between[1] } : {}) });
  },
  run(id) { return this.ask("run", { run: id }); },
  rollouts(id, step, split) { return this.ask("rollouts", { run: id, step, split }); },
  spans(id, step) { return this.ask("spans", { run: id, step }); },
  evaluations() { return this.ask("evaluations", {}); },
};
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}
function inside(data) {
  return {
    isLive: false,
    async runs() { return data.runs; },
    async keys(runs) { return Object.fromEntries(runs.map((id) => [id, data.keys[id] || []])); },
    async curves(runs, metrics) {
      return Object.fromEntries(metrics.map((metric) => [metric,
        Object.fromEntries(runs.filter((id) => (data.curves[metric] || {})[id]).map((id) => [id, data.curves[metric][id]]))]));
    },
    async run(id) { return data.details[id]; },
    async rollouts(id, step, split) { return data.rollouts[JSON.stringify([id, step, split])] || []; },
    async spans(id, step) { return data.spans[JSON.stringify([id, step])] || []; },
    async evaluations() { return data.evaluations; },
  };
}
let source = live;

// The state of the page.
const NEWEST = 5, PALETTE = 10;
let runs = [];                // as the source lists them, the newest first
let chosen = new Set();       // ids of the runs that are shown
const colourNumbers = new Map();
const details = new Map();    // id -> { version, value }
const chosenRuns = () => runs.filter((run) => chosen.has(run.id));
const chosenIds = () => chosenRuns().map((run) => run.id);
function colourOf(id) {
  if (!colourNumbers.has(id)) colourNumbers.set(id, colourNumbers.size);
  const index = colourNumbers.get(id);
  if (index < PALETTE) return getComputedStyle(document.documentElement).getPropertyValue(`--c${index}`).trim();
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  return `hsl(${Math.round(index * 137.508) % 360} 65% ${isDark ? 68 : 38}%)`;
}
// The part of a name that tells runs apart: folders that all runs share are left out.
function nameOf(id) {
  const all = runs.map((run) => run.id.split("/"));
  let shared = 0;
  while (all.length > 1 && all.every((parts) => parts.length > shared + 1 && parts[shared] === all[0][shared])) shared += 1;
  return id.split("/").slice(shared).join("/");
}
const swatch = (id) => { const mark = make("i", { class: "swatch" }); mark.style.background = colourOf(id); return mark; };
async function detailsOf(run) {
  const known = details.get(run.id);
  if (known && known.version === run.version) return known.value;
  const value = await source.run(run.id);
  details.set(run.id, { version: run.version, value });
  return value;
}
