"use strict";
const $ = (id) => document.getElementById(id);
// Everything that comes from the service is set as text, never as markup.
function make(tag, properties, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "key") node.dataset.key = value;
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
// Tables are made anew at each poll; who works with the keyboard stays where they are.
function keepFocus(change) {
  const key = document.activeElement && document.activeElement.dataset.key;
  change();
  const again = key && document.querySelector(`[data-key="${CSS.escape(key)}"]`);
  if (again && again !== document.activeElement) again.focus({ preventScroll: true });
}
const bytes = (value) => value >= 2 ** 30 ? `${(value / 2 ** 30).toFixed(1)} GiB`
  : value >= 2 ** 20 ? `${Math.round(value / 2 ** 20)} MiB` : `${Math.ceil(value / 1024)} KiB`;
const count = (value) => value >= 1e6 ? `${(value / 1e6).toFixed(1)}M` : value >= 1e4 ? `${Math.round(value / 1e3)}k` : String(Math.round(value));
function span(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 129600 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}
const ago = (time) => `${span(Math.max(0, (Date.now() - Date.parse(time)) / 1000))} ago`;
function table(node, columns, rows, nothing) {
  if (!rows.length) { node.replaceChildren(make("tbody", {}, make("tr", {}, make("td", { class: "empty" }, nothing)))); return; }
  node.replaceChildren(
    make("thead", {}, make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...rows));
}
function number(value) {
  const size = Math.abs(value);
  if (size >= 1e4) return count(value);
  if (Number.isInteger(value)) return String(value);
  return size < 1e-3 ? value.toExponential(2) : size < 100 ? value.toFixed(size < 0.1 ? 4 : 3) : value.toFixed(1);
}
