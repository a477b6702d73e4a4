// Rollouts of reinforcement learning: by step, group and reward, each token with its numbers.
const rolloutState = { run: null, split: "train", step: null, groups: [], loaded: "" };
const OPEN_ROLLOUTS = 1;
async function showRollouts() {
  const list = chosenRuns().filter((run) => run.iterations > 0);
  $("rollouts").querySelector(".bar").hidden = !list.length;
  if (!list.length) {
    $("rollout-note").textContent = "";
    $("rollout-groups").replaceChildren(empty("None of the chosen runs has rollouts."));
    return;
  }
  fill($("rollout-run"), list.map((run) => [run.id, nameOf(run.id)]), rolloutState.run);
  rolloutState.run = $("rollout-run").value;
  const detail = await detailsOf(list.find((run) => run.id === rolloutState.run));
  const splits = [...new Set(detail.iterations.flatMap((each) => each.splits))];
  fill($("rollout-split"), splits.map((name) => [name, name === "train" ? "training" : name.replace(/^eval_/, "evaluation ")]), rolloutState.split);
  rolloutState.split = $("rollout-split").value;
  const steps = detail.iterations.filter((each) => each.splits.includes(rolloutState.split)).map((each) => each.step);
  rolloutState.steps = steps;
  if (!steps.includes(rolloutState.step)) rolloutState.step = steps[steps.length - 1];
  const slider = $("rollout-step");
  slider.max = String(steps.length - 1);
  slider.value = String(steps.indexOf(rolloutState.step));
  slider.setAttribute("aria-valuetext", `step ${rolloutState.step}`);
  $("rollout-step-text").textContent = `${rolloutState.step} (${steps.indexOf(rolloutState.step) + 1} of ${steps.length})`;
  const wanted = JSON.stringify([rolloutState.run, rolloutState.split, rolloutState.step]);
  if (wanted === rolloutState.loaded) return;
  rolloutState.loaded = wanted;
  const groups = await source.rollouts(rolloutState.run, rolloutState.step, rolloutState.split);
  if (wanted !== rolloutState.loaded) return;
  rolloutState.groups = groups;
  drawGroups();
}
function fill(select, options, value) {
  const state = JSON.stringify(options);
  if (select.dataset.state !== state) {
    select.dataset.state = state;
    select.replaceChildren(...options.map(([id, name]) => make("option", { value: id }, name)));
  }
  if (options.some(([id]) => id === value)) select.value = value;
}
function moveStep(by) {
  const steps = rolloutState.steps || [], at = steps.indexOf(rolloutState.step) + by;
  if (at < 0 || at >= steps.length) return;
  rolloutState.step = steps[at];
  showRollouts();
}
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const rewardsOf = (group) => group.rollouts.map((each) => each.reward).filter((value) => typeof value === "number");
const spread = (group) => { const all = rewardsOf(group); return all.length ? Math.max(...all) - Math.min(...all) : 0; };
function ordered(groups) {
  const by = $("order").value, key = (group) => { const all = rewardsOf(group); return all.length ? mean(all) : -Infinity; };
  const list = [...groups];
  if (by === "high") list.sort((a, b) => key(b) - key(a));
  if (by === "low") list.sort((a, b) => key(a) - key(b));
  if (by === "spread") list.sort((a, b) => spread(b) - spread(a));
  return list;
}
function drawGroups() {
  const bound = (id, otherwise) => $(id).value.trim() === "" ? otherwise : Number($(id).value);
  const least = bound("least", -Infinity), most = bound("most", Infinity);
  const isFiltered = least !== -Infinity || most !== Infinity;
  const fits = (each) => !isFiltered || (each.reward >= least && each.reward <= most);
  let numShown = 0, numAll = 0;
  const nodes = [];
  for (const group of ordered(rolloutState.groups)) {
    const rollouts = group.rollouts.filter(fits);
    numAll += group.rollouts.length;
    numShown += rollouts.length;
    if ($("order").value === "high") rollouts.sort((a, b) => b.reward - a.reward);
    if ($("order").value === "low") rollouts.sort((a, b) => a.reward - b.reward);
    if (rollouts.length || (!isFiltered && group.errors.length)) nodes.push(groupSection(group, rollouts, isFiltered ? [] : group.errors, nodes.length < OPEN_ROLLOUTS));
  }
  $("rollout-groups").replaceChildren(...nodes);
  $("rollout-note").textContent = `${numShown} of ${numAll} rollouts in ${nodes.length} groups. ${LEGENDS[$("colour").value]}`;
}
const LEGENDS = {
  logprob: "Darker orange: the token was less likely when it was sampled.",
  advantage: "Green tokens are made more likely by training, red ones less likely.",
  weight: "Blue tokens are trained on.",
  difference: "Blue: the sampler gave the token a higher probability than the trainer; purple: a lower one.",
  none: "",
};
function groupSection(group, rollouts, errors, isOpen) {
  const all = rewardsOf(group), low = Math.min(...all), high = Math.max(...all);
  const bars = make("span", { class: "rewards", role: "img", ariaLabel: `rewards ${all.map(number).join(", ")}` }, ...all.map((value) => {
    const mark = make("i", { title: number(value) });
    mark.style.height = `${high > low ? 2 + 20 * (value - low) / (high - low) : 11}px`;
    return mark;
  }));
  const text = all.length ? (high > low ? `mean ${number(mean(all))}, ${number(low)} to ${number(high)}` : `every reward ${number(low)}: nothing to learn from`) : "no reward";
  return make("section", {}, make("div", { class: "group-head" }, make("h2", {}, `Group ${group.index}`), make("span", { class: "soft small" }, [...group.tags, text].join(" · ")), all.length ? bars : null),
    ...errors.map((error) => make("p", { class: "error small" }, error)), ...rollouts.map((each, index) => rolloutNode(each, isOpen && index === 0)));
}
function rolloutNode(rollout, isOpen) {
  const last = rollout.turns.length ? rollout.turns[rollout.turns.length - 1] : {};
  const said = String(last.reply ?? (last.tokens || []).join("")).replace(/\s+/g, " ").slice(0, 200);
  const body = make("div");
  const node = make("details", { class: "rollout", open: isOpen }, make("summary", {}, make("b", {}, number(rollout.reward ?? NaN)), make("span", { class: "cut" }, said), make("span", { class: "soft small" }, endingOf(rollout))), body);
  const draw = () => { if (node.open && !body.childNodes.length) body.append(...rollout.turns.flatMap(turnNodes), facts(rollout.metrics)); };
  node.addEventListener("toggle", draw);
  draw();
  return node;
}
const endingOf = (rollout) => [rollout.ending ? rollout.ending.replaceAll("_", " ") : "", rollout.turns.length > 1 ? `${rollout.turns.length} turns` : ""].filter(Boolean).join(", ");
function facts(values) {
  return make("div", { class: "facts" }, ...Object.entries(values).map(([key, value]) => make("span", {}, `${key}: ${typeof value === "number" ? number(value) : show(value)}`)));
}
function turnNodes(turn) {
  const text = [turn.num_tokens ? `${turn.num_tokens} tokens` : "", typeof turn.reward === "number" ? `reward ${number(turn.reward)}` : "", meansOf(turn)].filter(Boolean).join(" · ");
  return [make("pre", {}, turn.prompt ?? ""), replyNode(turn), make("div", { class: "facts" }, text), facts({ ...turn.metrics, ...turn.logs })];
}
function meansOf(turn) {
  const pairs = (turn.trainer || []).map((value, index) => [turn.logprob[index], value]).filter(([a, b]) => a !== null && b !== null);
  const known = (turn.logprob || []).filter((value) => value !== null);
  return [known.length ? `${number(mean(known))} nats each` : "", pairs.length ? `sampler and trainer differ by ${number(mean(pairs.map(([a, b]) => Math.abs(a - b))))} nats each` : ""].filter(Boolean).join(" · ");
}
function replyNode(turn) {
  if (!turn.tokens) return make("pre", { class: "reply" }, turn.reply ?? "");
  const node = make("pre", { class: "reply", tabIndex: 0, role: "group", ariaLabel: "Reply; the arrow keys go through its tokens" });
  const values = turn.tokens.map((_, index) => valueOf(turn, index));
  const largest = Math.max(0, ...values.filter((value) => value !== null).map(Math.abs));
  turn.tokens.forEach((token, index) => {
    const mark = make("span", {}, token);
    paint(mark, values[index], largest);
    mark.addEventListener("pointerenter", () => tell(turn, index, node));
    node.append(mark);
  });
  node.addEventListener("pointerleave", () => { $("token").hidden = true; });
  node.addEventListener("blur", () => { $("token").hidden = true; const now = node.querySelector(".now"); if (now) now.classList.remove("now"); });
  let at = -1;
  node.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
    event.preventDefault();
    at = Math.min(turn.tokens.length - 1, Math.max(0, at + (event.key === "ArrowRight" ? 1 : -1)));
    const now = node.querySelector(".now");
    if (now) now.classList.remove("now");
    node.children[at].classList.add("now");
    tell(turn, at, node);
  });
  return node;
}
function valueOf(turn, index) {
  const of = (name) => turn[name] && turn[name][index] !== undefined ? turn[name][index] : null;
  switch ($("colour").value) {
    case "logprob": return of("logprob");
    case "advantage": return of("advantage");
    case "weight": return of("weight");
    case "difference": return of("trainer") === null || of("logprob") === null ? null : of("logprob") - of("trainer");
    default: return null;
  }
}
const LEAST_DIFFERENCE = 0.02;    // nats; smaller differences stay pale
function paint(mark, value, largest) {
  if (value === null) return;
  const kind = $("colour").value, part = Math.min(1, Math.abs(value) / Math.max(largest, 1e-9));
  const colours = {
    logprob: `rgba(255, 140, 0, ${0.6 * (1 - Math.exp(Math.max(value, -50)))})`,
    advantage: `rgba(${value > 0 ? "22, 163, 74" : "220, 38, 38"}, ${0.55 * part})`,
    weight: value > 0 ? "rgba(59, 130, 246, 0.35)" : "",
    difference: `rgba(${value > 0 ? "37, 99, 235" : "168, 85, 247"}, ${0.65 * Math.min(1, Math.abs(value) / Math.max(largest, LEAST_DIFFERENCE))})`,
  };
  mark.style.background = colours[kind];
}
function tell(turn, index, node) {
  const of = (name) => turn[name] ? turn[name][index] : null, parts = [JSON.stringify(turn.tokens[index])];
  if (of("logprob") !== null) parts.push(`log probability ${of("logprob").toFixed(3)} (${(100 * Math.exp(of("logprob"))).toFixed(1)}%)`);
  if (typeof of("trainer") === "number") parts.push(`trainer ${of("trainer").toFixed(3)}, difference ${(of("logprob") - of("trainer")).toFixed(4)}`);
  if (typeof of("advantage") === "number") parts.push(`advantage ${number(of("advantage"))}`);
  if (typeof of("weight") === "number") parts.push(`weight ${of("weight")}`);
  $("token").textContent = parts.join(" · ");
  $("token").hidden = !node.isConnected;
}
