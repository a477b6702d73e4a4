// The list of runs, the views, and the keys.
const POLL_MS = 2000;
const TABS = [["curves", "Curves", showCurves], ["settings", "Settings", showSettings], ["samples", "Samples", showSamples], ["rollouts", "Rollouts", showRollouts], ["evaluations", "Evaluations", showEvaluations], ["timing", "Timing", showTiming]];
let tab = "curves", timer = 0, isChosenByHand = false;
const initial = new URLSearchParams(location.hash.slice(1));
function setState(kind, text) { $("state").replaceChildren(make("span", { class: `dot ${kind}` }), text); }
function remember() {
  const words = { tab, smooth: view.smooth, log: view.log ? 1 : 0, axis: view.axis };
  if (isChosenByHand) words.run = chosenIds();
  if (joint.length) words.joint = joint;
  const text = query(words).toString();
  history.replaceState(null, "", text.length < 6000 ? `#${text}` : location.pathname);
}
async function showTab() {
  for (const [id] of TABS) $(id).hidden = id !== tab;
  for (const button of $("tabs").children) {
    const isNow = button.dataset.tab === tab;
    button.ariaSelected = String(isNow);
    button.tabIndex = isNow ? 0 : -1;
  }
  remember();
  await refreshTab();
}
async function refreshTab() {
  try {
    await TABS.find(([id]) => id === tab)[2]();
  } catch (error) {
    setState("off", source.isLive ? `not reachable (${error.message})` : error.message);
  }
}
function choose(id) { tab = id; showTab(); }
$("tabs").append(...TABS.map(([id, title]) => {
  const button = make("button", { type: "button", role: "tab", onclick: () => choose(id) }, title);
  button.dataset.tab = id;
  button.setAttribute("aria-controls", id);
  return button;
}));
$("tabs").addEventListener("keydown", (event) => {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  const index = (TABS.findIndex(([id]) => id === tab) + by + TABS.length) % TABS.length;
  choose(TABS[index][0]);
  $("tabs").children[index].focus();
});

const matches = (run, words) => words.every((word) => [run.id, run.recipe, run.model, run.state, run.data].some((text) => String(text ?? "").toLowerCase().includes(word)));
const found = () => { const words = $("find").value.toLowerCase().split(/\s+/).filter(Boolean); return runs.filter((run) => matches(run, words)); };
function aboutRun(run) {
  const steps = run.total ? `${run.step} of ${run.total} steps` : `${run.step} steps`;
  const value = run.value === null || run.value === undefined ? "" : `${run.metric} ${number(run.value)}`;
  const age = run.updated ? `${span(Math.max(0, Date.now() / 1000 - run.updated))} ago` : "";
  const parts = [steps, value, source.isLive ? age : ""].filter(Boolean);
  return [make("span", { class: run.state }, run.state), ` · ${parts.join(" · ")}`];
}
let listed = "";
function showRuns() {
  const list = found();
  $("count").textContent = `${chosen.size} of ${runs.length} shown`;
  const state = JSON.stringify([list.map((run) => [run.id, run.version, run.value]), [...chosen], Math.floor(Date.now() / 20000)]);
  if (state === listed) return;
  listed = state;
  keepFocus(() => $("runs").replaceChildren(...list.map((run) => {
    const box = make("input", { type: "checkbox", key: `run ${run.id}`, checked: chosen.has(run.id), onchange: () => {
      if (box.checked) chosen.add(run.id); else chosen.delete(run.id);
      changed();
    } });
    const mark = make("i");
    mark.style.background = chosen.has(run.id) ? colourOf(run.id) : "transparent";
    return make("li", {}, make("label", { title: run.id }, box, mark, make("div", {}, make("div", { class: "name" }, nameOf(run.id)), make("div", { class: "about" }, ...aboutRun(run)))));
  })));
  if (!list.length) $("runs").replaceChildren(make("li", { class: "empty" }, runs.length ? "No run fits." : "No run here yet; recipes write their runs to this folder."));
}
function changed() {
  isChosenByHand = true;
  showRuns();
  remember();
  refreshTab();
}
const chooseThese = (list) => { chosen = new Set(list.map((run) => run.id)); changed(); };
$("choose-all").addEventListener("click", () => chooseThese(found()));
$("choose-none").addEventListener("click", () => chooseThese([]));
$("choose-newest").addEventListener("click", () => chooseThese(found().slice(0, NEWEST)));
$("find").addEventListener("input", showRuns);

async function refresh() {
  clearTimeout(timer);
  try {
    const before = JSON.stringify(runs.map((run) => [run.id, run.version]));
    runs = await source.runs();
    for (const run of [...runs].reverse()) colourOf(run.id);
    const known = new Set(runs.map((run) => run.id));
    chosen = new Set([...chosen].filter((id) => known.has(id)));
    const isRunning = runs.some((run) => run.state === "running");
    setState(source.isLive ? "on" : "", source.isLive ? (isRunning ? "live" : "no run is in progress") : "saved page");
    const isNew = before !== JSON.stringify(runs.map((run) => [run.id, run.version]));
    showRuns();
    if (isNew) await refreshTab();
  } catch (error) {
    setState("off", `not reachable (${error.message})`);
  }
  if (source.isLive) timer = setTimeout(refresh, document.hidden ? 10 * POLL_MS : POLL_MS);
}
document.addEventListener("visibilitychange", () => { if (!document.hidden && source.isLive) refresh(); });

const again = () => { remember(); redraw(); };
$("smooth").addEventListener("input", () => { view.smooth = Number($("smooth").value); $("smooth-text").textContent = String(view.smooth); again(); });
$("log").addEventListener("change", () => { view.log = $("log").checked; again(); });
$("axis").addEventListener("change", () => { view.axis = $("axis").value; again(); });
$("wanted").addEventListener("input", () => { view.wanted = $("wanted").value; showCurves(); });
$("equal").addEventListener("change", showSettings);
function addJoint() {
  const name = $("add").value.trim();
  if (!name || joint.includes(name) || ![...$("names").children].some((option) => option.value === name)) return;
  joint.push(name);
  $("add").value = "";
  remember();
  showJoint();
}
$("add-button").addEventListener("click", addJoint);
$("add").addEventListener("keydown", (event) => { if (event.key === "Enter") addJoint(); });
for (const [id, name] of [["rollout-run", "run"], ["rollout-split", "split"]]) $(id).addEventListener("change", () => { rolloutState[name] = $(id).value; showRollouts(); });
$("rollout-step").addEventListener("input", () => { rolloutState.step = rolloutState.steps[Number($("rollout-step").value)]; showRollouts(); });
$("before").addEventListener("click", () => moveStep(-1));
$("after").addEventListener("click", () => moveStep(1));
for (const id of ["order", "least", "most", "colour"]) $(id).addEventListener("input", drawGroups);
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input:not([type=checkbox]):not([type=range]), select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^[1-6]$/.test(event.key)) choose(TABS[Number(event.key) - 1][0]);
  else if (event.key === "/") { event.preventDefault(); $("fold").open = true; $("find").focus(); }
  else if (tab === "rollouts" && event.key === "[") moveStep(-1);
  else if (tab === "rollouts" && event.key === "]") moveStep(1);
});
let resizeTimer = 0;
addEventListener("resize", () => { clearTimeout(resizeTimer); resizeTimer = setTimeout(redraw, 120); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { listed = ""; showRuns(); redraw(); refreshTab(); });

async function begin() {
  const data = $("data");
  if (data) {
    const saved = await unpack(data.textContent);
    source = inside(saved);
    $("place").textContent = saved.place;
  } else {
    $("place").textContent = document.documentElement.dataset.place || "";
  }
  if (innerWidth < 861) $("fold").open = false;
  view.smooth = Math.min(0.99, Math.max(0, Number(initial.get("smooth")) || 0));
  view.log = initial.get("log") === "1";
  view.axis = ["axis/seconds", "axis/tokens"].includes(initial.get("axis")) ? initial.get("axis") : "step";
  $("smooth").value = String(view.smooth);
  $("smooth-text").textContent = String(view.smooth);
  $("log").checked = view.log;
  $("axis").value = view.axis;
  if (TABS.some(([id]) => id === initial.get("tab"))) tab = initial.get("tab");
  runs = await source.runs();
  const wanted = new Set(initial.getAll("run")), isAll = document.documentElement.dataset.all === "yes";
  isChosenByHand = wanted.size > 0;
  chosen = new Set(runs.filter((run, index) => wanted.size ? wanted.has(run.id) : isAll || index < NEWEST).map((run) => run.id));
  runs = runs.map((run) => ({ ...run, version: "" }));  // the first refresh then shows everything
  joint = initial.getAll("joint");
  for (const [id] of TABS) $(id).hidden = id !== tab;
  for (const button of $("tabs").children) { button.ariaSelected = String(button.dataset.tab === tab); button.tabIndex = button.dataset.tab === tab ? 0 : -1; }
  await refresh();
  showJoint();
}
begin().catch((error) => setState("off", error.message));
