"use strict";
// Texts enter the page as text nodes only; nothing here makes markup out of data.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const page = document.getElementById("page");
  const PAGE_OF_DOCUMENTS = 8;
  const COARSE = matchMedia("(pointer: coarse)").matches;
  const CONFIG = {
    responsive: true,
    displaylogo: false,
    showSendToCloud: false, // plotly.js 4 would offer to upload the curves to its maker
    plotlyServerURL: "",
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
  };
  const state = { spike: -1, samples: new Set(), shown: PAGE_OF_DOCUMENTS };
  const plots = new Map(); // element -> its figure, to draw it again in other colours

  // --- small makers of elements ------------------------------------------------------------------

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "onclick") element.addEventListener("click", value);
      else if (value !== undefined && value !== null) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  // What a font shows nothing for, or what turns the direction of all that follows.
  const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u2028-\u202e\u2066-\u2069\ufeff\p{Cs}]/gu;

  function literal(text) {
    const fragment = document.createDocumentFragment();
    let last = 0;
    for (const match of text.matchAll(UNSEEN)) {
      fragment.append(text.slice(last, match.index));
      const code = match[0].codePointAt(0);
      const name = "U+" + code.toString(16).toUpperCase().padStart(4, "0");
      fragment.append(make("span", { class: "unseen" }, name));
      last = match.index + match[0].length;
    }
    fragment.append(text.slice(last));
    return fragment;
  }

  const whole = (value) => value.toLocaleString("en-US");
  const number = (value, digits = 3) => (value === null ? "–" : value.toFixed(digits));
  const plural = (count, word) => `${whole(count)} ${word}${count === 1 ? "" : "s"}`;
  const baseName = (path) => path.split("/").pop() || path;
  const labelled = (name, value) => make("span", {}, name + " ", make("b", {}, literal(String(value))));
  const badge = (label) => make("span", { class: "label " + label }, label);

  function card(title, ...content) {
    const heading = make("h2", {}, title);
    return make("section", { class: "card", "aria-label": title }, make("div", { class: "bar" }, heading), ...content);
  }

  function commandBlock({ title, text }) {
    const button = make("button", { type: "button", class: "copy", "aria-label": "Copy: " + title }, "Copy");
    // A line breaks between words, not at the hyphens of an option.
    const words = text.split(/(\s+)/).map((word) => (word.trim() ? make("span", { class: "word" }, literal(word)) : word));
    const pre = make("pre", { tabindex: "0" }, make("code", {}, ...words));
    button.addEventListener("click", async () => {
      button.textContent = (await copy(text, pre)) ? "Copied" : "Select and copy it";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
    const bar = make("div", { class: "bar" }, make("h4", {}, literal(title)), button);
    return make("div", { class: "command" }, bar, pre);
  }

  async function copy(text, element) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      getSelection().selectAllChildren(element); // a file may be denied the clipboard
      return false;
    }
  }

  // --- figures -----------------------------------------------------------------------------------

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

  function draw(element, figure, layout = {}) {
    plots.set(element, { figure, layout });
    const axis = { gridcolor: colour("grid"), linecolor: colour("line"), zerolinecolor: colour("grid") };
    const themed = {
      ...figure.layout,
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("fg"), family: "system-ui, sans-serif", size: 12 },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("fg") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("dim"), activecolor: colour("accent") },
      dragmode: COARSE ? false : "zoom",
    };
    for (const key of Object.keys(themed)) {
      if (/^[xy]axis\d*$/.test(key)) themed[key] = { ...axis, ...themed[key], ...(layout[key] || {}) };
    }
    return Plotly.react(element, figure.data, themed, CONFIG);
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const [element, { figure, layout }] of plots) draw(element, figure, layout);
  });

  // --- the curves --------------------------------------------------------------------------------

  const curves = make("div", { class: "curves", role: "img", "aria-label": "Loss and gradient norm over the iterations; the spikes are listed below as buttons" });
  const spikeButtons = data.spikes.map((spike, index) =>
    make("button", { type: "button", class: "spike", "aria-pressed": "false", onclick: () => selectSpike(index, true) },
      "Iteration " + spikeRange(spike), make("small", {}, spikeSize(spike))));

  function spikeRange(spike) {
    return spike.first === spike.last ? String(spike.first) : `${spike.first}–${spike.last}`;
  }

  function spikeSize(spike) {
    return spike.peak === null ? spike.kind : `loss ${number(spike.peak)}`;
  }

  function curvesCard() {
    const log = make("button", { type: "button", id: "log-scale", "aria-pressed": "false", onclick: toggleLog }, "Log scale");
    const bar = make("div", { class: "bar" }, make("h2", {}, "Loss and gradient norm"), log);
    const list = make("ul", { class: "chips", "aria-label": "Spikes" }, ...spikeButtons.map((button) => make("li", {}, button)));
    return make("section", { class: "card", "aria-label": "Curves" }, bar, data.curves ? curves : make("p", {}, "No curve was read."), list);
  }

  function toggleLog(event) {
    const button = event.currentTarget;
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    drawCurves(on ? "log" : "linear");
  }

  let scale = "linear";
  function drawCurves(type = scale) {
    if (!data.curves) return;
    scale = type;
    const markers = data.curves.data.find((trace) => trace.name === "spikes");
    markers.marker.size = data.spikes.map((_, index) => (index === state.spike ? 18 : 12));
    markers.marker.line.color = colour("card");
    markers.marker.opacity = 1;
    const { yaxis, yaxis2, legend } = data.curves.layout;
    draw(curves, data.curves, {
      yaxis: { ...yaxis, type },
      yaxis2: { ...yaxis2, type },
      legend: { ...legend, font: { size: 11 } },
      uirevision: type, // keeps the reader's zoom when a spike is selected
    });
  }

  function clickCurve({ points }) {
    const marker = points.find((point) => point.data.name === "spikes");
    const hit = marker ? marker.customdata : data.spikes.findIndex((spike) => points.some((point) => spike.first <= point.x && point.x <= spike.last));
    if (hit >= 0) selectSpike(hit, true);
  }

  // --- a spike and its step ----------------------------------------------------------------------

  const stepPlace = make("div", { id: "step", "aria-live": "polite" });
  let heat = null; // the heat map on show
  let sampleButtons = new Map();
  let documentPlace = null;

  function selectSpike(index, scroll) {
    state.spike = index;
    state.samples.clear();
    state.shown = PAGE_OF_DOCUMENTS;
    spikeButtons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
    drawCurves();
    if (heat) Plotly.purge(heat);
    plots.delete(heat);
    heat = null;
    stepPlace.replaceChildren(...stepCards(data.spikes[index]));
    if (heat) drawHeat();
    if (scroll) stepPlace.scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  function stepCards(spike) {
    const title = make("h2", {}, "Iteration " + spike.iteration);
    const facts = make("div", { class: "facts" },
      labelled("kind", spike.kind),
      labelled("loss", spike.peak === null ? "none" : number(spike.peak)),
      spike.baseline === null ? null : labelled("expected", number(spike.baseline)),
      spike.score === null ? null : labelled("score", number(spike.score, 1)),
      spike.first === spike.last ? null : labelled("iterations", spikeRange(spike)));
    const { step } = spike;
    const head = make("section", { class: "card", "aria-label": "Step" },
      make("div", { class: "bar" }, title, badge(step ? step.label : "UNKNOWN")), facts, evidence(spike));
    if (!step) {
      head.append(make("p", { class: "note" }, "Its samples are not shown. ", literal(spike.reason)));
      return [head, ...commandCards(spike.commands)];
    }
    facts.append(
      labelled("samples", `${whole(step.consumed[0])}–${whole(step.consumed[1] - 1)} of the run`),
      ...(step.attempt === null ? [] : [labelled("attempt", step.attempt)]),
      ...(step.skipped ? [labelled("skipped", "yes: its samples were not trained on")] : []));
    if (!step.samples.length) return [head, ...commandCards(spike.commands)];
    const columns = make("div", { class: "columns" }, heatCard(step), ...commandCards(spike.commands));
    if (!spike.commands.length) columns.className = "";
    return [head, columns, documentsCard()];
  }

  function evidence(spike) {
    const lines = [...spike.evidence, ...(spike.step ? spike.step.reasons : [])];
    return lines.length ? make("ul", { class: "plain" }, ...lines.map((line) => make("li", {}, literal(line)))) : null;
  }

  function commandCards(commands) {
    return commands.length ? [card("What to do", ...commands.map(commandBlock))] : [];
  }

  // --- the samples of a step ---------------------------------------------------------------------

  function heatCard(step) {
    heat = make("div", { class: "heat", tabindex: "0", role: "application", "aria-label": "Loss of each sample; the arrow keys choose one" });
    heat.addEventListener("keydown", moveInHeat);
    const worst = step.order.slice(0, 8);
    sampleButtons = new Map(worst.map((ordinal) => [ordinal, sampleButton(step.samples[ordinal], ordinal)]));
    const list = make("ul", { class: "chips", "aria-label": "Samples of the largest loss" }, ...[...sampleButtons.values()].map((button) => make("li", {}, button)));
    const measured = step.samples.some((sample) => sample.loss !== null);
    const note = measured ? null : make("p", { class: "note" }, "No loss of a single sample was recorded (no ledger): all look alike.");
    return card("Loss of each sample", heat, note, list);
  }

  function sampleButton(sample, ordinal) {
    const toggle = (event) => selectSample(ordinal, event.ctrlKey || event.metaKey || event.shiftKey);
    return make("button", { type: "button", class: "sample", "aria-pressed": "false", onclick: toggle },
      "Sample " + sample.sample_index, make("small", {}, sample.loss === null ? "rank " + sample.rank : number(sample.loss)));
  }

  function drawHeat() {
    const { step } = data.spikes[state.spike];
    const shapes = [];
    cells(step).forEach((row, y) => row.forEach((ordinal, x) => {
      if (state.samples.has(ordinal)) {
        shapes.push({ type: "rect", x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5, line: { color: colour("fg"), width: 3 } });
      }
    }));
    const first = !heat.data;
    draw(heat, step.figure, { shapes, uirevision: "kept" });
    if (first) heat.on("plotly_click", ({ points, event }) => {
      const ordinal = points[0].customdata;
      if (ordinal >= 0) selectSample(ordinal, event && (event.ctrlKey || event.metaKey || event.shiftKey));
    });
  }

  function cells(step) {
    const columns = 1 + Math.max(...step.samples.map((sample) => sample.cell[1]));
    const rows = 1 + Math.max(...step.samples.map((sample) => sample.cell[0]));
    const grid = Array.from({ length: rows }, () => Array(columns).fill(-1));
    step.samples.forEach((sample, ordinal) => (grid[sample.cell[0]][sample.cell[1]] = ordinal));
    return grid;
  }

  function moveInHeat(event) {
    if (event.key === "Escape") return showSamples([]);
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move) return undefined;
    event.preventDefault();
    const { step } = data.spikes[state.spike];
    const current = [...state.samples].pop();
    if (current === undefined) return showSamples([step.order[0]]);
    const [row, column] = step.samples[current].cell;
    const next = (cells(step)[row + move[0]] || [])[column + move[1]];
    return next >= 0 ? showSamples([next]) : undefined;
  }

  function selectSample(ordinal, also) {
    const chosen = new Set(also ? state.samples : []);
    if (state.samples.has(ordinal)) chosen.delete(ordinal);
    else chosen.add(ordinal);
    showSamples(chosen);
  }

  function showSamples(chosen) {
    state.samples = new Set(chosen);
    state.shown = PAGE_OF_DOCUMENTS;
    for (const [ordinal, button] of sampleButtons) button.setAttribute("aria-pressed", String(state.samples.has(ordinal)));
    drawHeat();
    showDocuments();
  }

  // --- the documents -----------------------------------------------------------------------------

  function documentsCard() {
    documentPlace = make("section", { class: "card", id: "documents", "aria-label": "Documents" });
    showDocuments();
    return documentPlace;
  }

  function chosenDocuments(step) {
    const all = [];
    for (const ordinal of step.order) {
      const sample = step.samples[ordinal];
      if (state.samples.size && !state.samples.has(ordinal)) continue;
      for (const span of sample.documents) {
        const own = span.text && span.text.loss;
        all.push({ sample, span, loss: own ?? sample.loss, ofSample: own === null || own === undefined });
      }
    }
    return all.sort((a, b) => (b.loss ?? -Infinity) - (a.loss ?? -Infinity) || 0);
  }

  function showDocuments() {
    const { step } = data.spikes[state.spike];
    const all = chosenDocuments(step);
    const shown = all.slice(0, state.shown);
    const title = state.samples.size ? `Documents of ${plural(state.samples.size, "chosen sample")}` : "Documents of the step, largest loss first";
    const bar = make("div", { class: "bar" }, make("h2", {}, title), key(all));
    if (state.samples.size) bar.append(make("button", { type: "button", id: "all-samples", onclick: () => showSamples([]) }, "All samples"));
    const more = make("button", { type: "button", id: "more", onclick: showMore }, `Show more (${whole(all.length - shown.length)} left)`);
    documentPlace.replaceChildren(bar, make("div", {}, ...shown.map((entry) => documentView(entry, step))), ...(shown.length < all.length ? [more] : []));
  }

  function key(all) {
    const marks = new Set(all.flatMap(({ span }) => (span.text ? span.text.pieces.map((piece) => piece[1]) : [])));
    return make("span", { class: "key" },
      marks.has("sample") ? make("mark", {}, "in the sample") : null,
      marks.has("worst") ? make("mark", { class: "worst" }, "its worst block") : null);
  }

  function showMore() {
    state.shown += 3 * PAGE_OF_DOCUMENTS;
    showDocuments();
  }

  function documentView({ sample, span, loss, ofSample }, step) {
    const name = ofSample ? "sample loss" : "loss";
    const heading = make("h4", {},
      make("span", { class: "loss" }, loss === null ? "no loss" : `${name} ${number(loss)}`),
      make("span", {}, literal(baseName(sample.prefix)), ` · document ${span.document}`), badge(step.label));
    const facts = make("div", { class: "facts" },
      labelled("tokens", `${whole(span.tokens[0])}–${whole(span.tokens[1])}`),
      span.file === null ? null : labelled("source", span.line === null ? span.file : `${span.file}:${span.line}`),
      labelled("byte", `${whole(span.byte_offset)} of ${sample.prefix}.bin`),
      labelled("sample", `${sample.sample_index} at token ${whole(span.sample_start)}`),
      labelled("drawn by", `rank ${sample.rank}, micro batch ${sample.micro_batch}, position ${sample.position}`));
    return make("article", { class: "document" }, heading, facts, ...textView(span.text, span.cut));
  }

  function textView(text, cut) {
    if (!text) return [make("p", { class: "note" }, cut ? "Its text was left out to keep the page small." : "No text was decoded.")];
    const pre = make("pre", { class: "text", dir: "auto", tabindex: "0" });
    if (text.before) pre.append(make("span", { class: "elided" }, `[${plural(text.before, "character")} before] `));
    for (const [piece, mark] of text.pieces) {
      pre.append(mark ? make("mark", { class: mark }, literal(piece)) : literal(piece));
    }
    if (text.after) pre.append(make("span", { class: "elided" }, ` [${plural(text.after, "character")} more]`));
    return [pre, ...(text.note ? [make("p", { class: "note" }, literal(text.note))] : [])];
  }

  // --- the whole run -----------------------------------------------------------------------------

  function table(heads, rows) {
    const cell = (tag, [content, kind]) => make(tag, { class: kind }, content);
    const head = make("tr", {}, ...heads.map((entry) => cell("th", entry)));
    return make("div", { class: "scroll", tabindex: "0" }, make("table", {}, make("thead", {}, head),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((entry) => cell("td", entry)))))));
  }

  function rankingCard() {
    const heads = [["#", "n"], ["score", "n"], ["document and text", "where"], ["loss", "n"], ["read", "n"], ["tokens", "n"]];
    const rows = data.ranking.map((entry, index) => [
      [String(index + 1), "n"],
      [number(entry.score, 2) + (entry.uncertainty === null ? "" : ` ± ${number(entry.uncertainty, 2)}`), "n"],
      [rankedDocument(entry), "where"],
      [number(entry.loss), "n"],
      [entry.visits === null ? "–" : `${whole(entry.visits)}×`, "n"],
      [entry.tokens === null ? "–" : whole(entry.tokens), "n"],
    ]);
    return card("Documents of the whole run that stand out", make("p", { class: "note" }, "Score above 0: harder than its like; below 0: easier, such as a text that repeats itself."), table(heads, rows));
  }

  function rankedDocument(entry) {
    const where = entry.file === null ? "" : ` · ${entry.file}${entry.line === null ? "" : ":" + entry.line}`;
    const name = make("div", {}, literal(`${baseName(entry.prefix)} · document ${entry.document}${where}`));
    if (!entry.text) return name;
    return make("div", {}, name, make("details", {}, make("summary", {}, "text"), ...textView(entry.text, false)));
  }

  function attemptsCard() {
    const heads = [["attempt", "n"], ["iterations", "n"], ["name", "where"]];
    const rows = data.attempts.map(([name, first, last], index) => [[String(index + 1), "n"], [`${first}–${last}`, "n"], [literal(name), "where"]]);
    const list = table(heads, rows);
    list.classList.add("narrow");
    return card("Attempts", list);
  }

  function megabytes() {
    const characters = [...document.scripts].reduce((sum, script) => sum + script.textContent.length, 0);
    return (characters / 1e6).toFixed(1);
  }

  function cutsCard() {
    return card("About this page", make("ul", { class: "plain" }, ...data.cut.map((line) => make("li", {}, line)),
      make("li", {}, `It is one file of ${megabytes()} MB, most of them the plotting library, and fetches nothing: it can be mailed and opened offline.`)));
  }

  page.replaceChildren(
    curvesCard(), stepPlace,
    ...(data.ranking.length ? [rankingCard()] : []),
    ...(data.commands.length ? [card("Commands for the run", ...data.commands.map(commandBlock))] : []),
    ...(data.attempts.length ? [attemptsCard()] : []),
    cutsCard());
  drawCurves();
  if (data.curves) curves.on("plotly_click", clickCurve);
  if (data.spikes.length) selectSpike(Math.max(0, data.spikes.findIndex((spike) => spike.found && spike.step)), false);
  document.body.dataset.ready = "yes";
})();
