"""Style and script of the transcript pages; each page contains a copy."""

__all__ = ["FILTER_SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --page: #fff; --wash: #f6f8fa; --line: #d0d7de; --text: #1b1f24;
        --soft: #57606a; --good: #116329; --bad: #a40e26; --link: #0550ae }
@media (prefers-color-scheme: dark) {
  :root { --page: #0e1319; --wash: #171e27; --line: #323d4b; --text: #e7ecf3; --soft: #9aa7b8;
          --good: #4ade80; --bad: #ff8b7e; --link: #7aa2ff } }
* { box-sizing: border-box } [hidden] { display: none !important }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
       color: var(--text); background: var(--page); overflow-wrap: anywhere }
a { color: var(--link) } :focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem }
nav, form { display: flex; flex-wrap: wrap; gap: .4rem 1.1rem; align-items: center }
form { margin: .8rem 0; padding: .6rem .8rem; background: var(--wash); border-radius: 6px }
input, select, button { font: inherit; color: inherit; background: var(--page);
       padding: .15rem .4rem; border: 1px solid var(--line); border-radius: 4px }
input { width: 5.5rem }
details { border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0; padding: .2rem .7rem }
summary { cursor: pointer; padding: .25rem 0 } summary b { font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; padding: .5rem .7rem;
      background: var(--wash); border-radius: 4px; font: 13px/1.55 ui-monospace, monospace }
pre.reply { background: var(--page); border: 1px solid var(--line) }
table { border-collapse: collapse; margin: .2rem 0 .6rem; font-size: .9rem }
details tr { display: inline-block; margin-right: 1.4rem } td { padding: .1rem .5rem .1rem 0 }
details td:first-child { color: var(--soft) }
td { font-variant-numeric: tabular-nums } details td:last-child { white-space: pre-wrap }
.steps th, .steps td { padding: .25rem 1.2rem .25rem 0; text-align: left; vertical-align: top;
       overflow-wrap: normal; border-bottom: 1px solid var(--line) }
.steps td:first-child { white-space: nowrap } .steps th { font-weight: normal; color: var(--soft) }
.good { color: var(--good) } .bad { color: var(--bad) } .note { color: var(--soft) }
h2 span { font-weight: normal } details[open] > summary .said { display: none }
pre.reply + .note { margin: -.2rem 0 .3rem; font-size: .85rem }
.said { display: block; margin-left: 1.1rem; overflow: hidden; text-overflow: ellipsis;
        white-space: nowrap; font: 13px/1.55 ui-monospace, monospace; color: var(--soft) }
""".strip()

FILTER_SCRIPT = """
"use strict";
const form = document.getElementById("filter");
const episodes = [...document.querySelectorAll("details[data-reward]")];
const bound = (name, otherwise) => {
  const value = form.elements[name].value.trim();
  return value === "" || Number.isNaN(Number(value)) ? otherwise : Number(value);
};
function apply() {
  const least = bound("least", -Infinity), most = bound("most", Infinity);
  const ending = form.elements.ending.value;
  let shown = 0;
  for (const episode of episodes) {
    const reward = Number(episode.dataset.reward);
    const fits = reward >= least && reward <= most;
    episode.hidden = !fits || (ending !== "" && episode.dataset.ending !== ending);
    if (!episode.hidden) shown += 1;
  }
  for (const group of document.querySelectorAll("section")) {
    const own = [...group.querySelectorAll("details[data-reward]")];
    group.hidden = own.length > 0 && own.every((episode) => episode.hidden);
  }
  document.getElementById("shown").textContent = `${shown} of ${episodes.length} shown`;
}
form.addEventListener("input", apply);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(apply));
form.hidden = false;
apply();
""".strip()
