// The result of each run against a setting in which the runs differ.
const LOG_FROM = 10;              // a setting that varies by this factor gets a log scale
let resultPlot = null;
async function showResults(list) {
  const names = [...new Set(list.flatMap((each) => Object.keys(each.settings)))].sort();
  const valuesOf = (name) => list.map((each) => each.settings[name]);
  const axes = names.filter((name) => valuesOf(name).every((value) => typeof value === "number") && new Set(valuesOf(name)).size > 1);
  $("results").hidden = !axes.length;
  if (resultPlot) { resultPlot.destroy(); resultPlot = null; }
  if (!axes.length) return;
  fill($("result-setting"), axes.map((name) => [name, name]), axes.includes("learning_rate") ? "learning_rate" : $("result-setting").value);
  if (resultChosen && axes.includes(resultChosen)) $("result-setting").value = resultChosen;
  const found = await source.keys(list.map((each) => each.id));
  const metrics = [...new Set(Object.values(found).flat())].sort();
  const main = list.flatMap((each) => each.run.main).find((name) => metrics.includes(name));
  fill($("result-metric"), metrics.map((name) => [name, name]), $("result-metric").value || main);
  const axis = $("result-setting").value, metric = $("result-metric").value;
  await fetchCurves([metric]);
  const best = LOWER.test(metric) ? Math.min : Math.max;
  const points = list.map((each) => ({ id: each.id, x: each.settings[axis], curve: cached(metric, each.id) })).filter((point) => point.curve && point.curve.y.length)
    .map((point) => ({ ...point, y: $("result-value").value === "best" ? best(...point.curve.y) : point.curve.y[point.curve.y.length - 1] }));
  if (!points.length) return;
  const xs = [...new Set(points.map((point) => point.x))].sort((a, b) => a - b);
  const means = xs.map((x) => mean(points.filter((point) => point.x === x).map((point) => point.y)));
  const isLog = xs[0] > 0 && xs[xs.length - 1] / xs[0] >= LOG_FROM;
  const style = getComputedStyle(document.documentElement), soft = style.getPropertyValue("--soft");
  const look = { stroke: soft, grid: { stroke: style.getPropertyValue("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  const data = uPlot.join([[xs, means], ...points.map((point) => [[point.x], [point.y]])]);
  resultPlot = new uPlot({
    width: $("result-plot").clientWidth || 360, height: 260, legend: { show: false }, padding: [8, 16, 0, 0], cursor: { show: false },
    scales: { x: { time: false, ...(isLog ? { distr: 3, range: (u, low, high) => [low / 1.3, high * 1.3] } : { range: (u, low, high) => padded(low, high) }) }, y: { range: (u, low, high) => padded(low, high) } },
    axes: [{ ...look, size: 30, splits: () => xs, values: (u, splits) => splits.map(axisNumber), filter: (u, splits) => splits }, { ...look, size: 54, values: (u, splits) => splits.map((value) => value === null ? "" : axisNumber(value)) }],
    series: [{}, { stroke: soft, width: 1.5, spanGaps: true, points: { show: false } }, ...points.map((point) => ({ stroke: colourOf(point.id), points: { show: true, size: 10, fill: colourOf(point.id) } }))],
  }, data, $("result-plot"));
  const order = [...points].sort((a, b) => LOWER.test(metric) ? a.y - b.y : b.y - a.y);
  $("result-plot").setAttribute("aria-label", `${metric} by ${axis}: ${points.map((point) => `${show(point.x)} gives ${number(point.y)}`).join("; ")}`);
  $("result-note").replaceChildren(swatch(order[0].id), `Best: ${axis}=${show(order[0].x)} with ${number(order[0].y)} (${nameOf(order[0].id)}). The line joins the means.`);
}
let resultChosen = null;
$("result-setting").addEventListener("change", () => { resultChosen = $("result-setting").value; showSettings(); });
for (const id of ["result-metric", "result-value"]) $(id).addEventListener("change", () => showSettings());
