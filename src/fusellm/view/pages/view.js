/* The explorer's only script. What comes from a run goes into pages as text (textContent), never as
   HTML, and nothing is asked of any host but the one that the page came from. */
"use strict";
(() => {
  const by = (id) => document.getElementById(id);
  const read = (id) => (by(id) ? JSON.parse(by(id).textContent) : null);
  const make = (tag, classes = "", text = "") => {
    const made = document.createElement(tag);
    if (classes) made.className = classes;
    if (text !== "") made.textContent = text;
    return made;
  };
  const shown = (probability) => {
    if (probability > 0.9995) return probability.toFixed(2);
    if (probability > 0 && probability < 0.0005) return "<.001";
    return probability.toFixed(3).replace(/^0/, "");
  };
  const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

  /* Ask again until it is done, and say how far it is. */
  async function waitFor(address, place) {
    for (let wait = 150; ; wait = Math.min(wait * 1.5, 1500)) {
      const told = await (await fetch(address)).json();
      if (told.done) return told;
      const share = told.share === null ? "" : ` ${Math.round(100 * told.share)} %`;
      place.textContent = `${told.what} …${share}`;
      await pause(wait);
    }
  }

  for (const place of document.querySelectorAll("[data-waits]")) {
    waitFor(place.dataset.waits, place)
      .then((told) => (told.error ? (place.textContent = told.error) : location.reload()))
      .catch(() => (place.textContent = "The explorer does not answer any more; is it still running?"));
  }

  const narrow = by("narrow");
  if (narrow) {
    const items = [...by("blocks").children];
    narrow.addEventListener("input", () => {
      const wanted = narrow.value.toLowerCase();
      for (const item of items) item.hidden = !item.textContent.toLowerCase().includes(wanted);
      by("narrowed").textContent = `${items.filter((item) => !item.hidden).length} blocks`;
    });
  }

  const block = read("block-data");
  if (!block) return;
  const kept = read("positions-data");
  const series = (s) => `s${(s % 8) + 1}`;
  const strips = by("strips"), target = block.rows[0];
  const tokens = new Map();  // of each position the button of the token that it predicts
  const marked = new Set();
  let models = null, chosen = block.at, order = 0;
  if (by("asked")) by("asked").textContent = block.asked;

  /* position that predicts each token of a source: by the place of the token */
  const predicts = block.sources.map((source) => {
    const of = new Map();
    source.positions.forEach((place, n) => { if (place >= 0) of.set(place + 1, n); });
    return of;
  });
  const outcome = (n) => {  // what training changed: "+", "−" or nothing
    if (!models || !models.target || !models.fused) return "";
    const before = models.target.rank[n] === 1, after = models.fused.rank[n] === 1;
    return after && !before ? "+" : before && !after ? "−" : "";
  };

  function lines(width) {
    const made = [];
    let start = 0;
    while (start + width < block.width) {
      let cut = null;
      for (const columns of [block.cuts, block.boundaries]) {
        const inside = columns.filter((column) => column > start && column < start + width);
        const last = inside[inside.length - 1];
        if (last !== undefined && last - start > width / 2) { cut = last; break; }
      }
      let end = cut === null ? start + width : cut + 1;
      // Not inside a wide character, whose second column is empty.
      if (cut === null)
        while (end > start + 1 && block.rows.some((row) => row.cells[end] === "")) end--;
      made.push([start, end]);
      start = cut === null ? end : cut;
    }
    made.push([start, block.width]);
    return made;
  }

  function put(row, element, from, to) {
    element.style.gridColumn = `${from} / ${to}`;
    row.append(element);
  }

  function rowOf(line, name, classes, columns) {
    line.append(make("span", "label", name));
    const row = make("div", `row ${classes}`);
    row.style.gridTemplateColumns = `repeat(${columns}, 1ch)`;
    line.append(row);
    return row;
  }

  /* pieces of a row's tokens that stand in a line: [place, first column, one after the last] */
  function* pieces(row, start, end) {
    for (let place = 0; place < row.first.length; place++) {
      const from = Math.max(row.first[place], start), to = Math.min(row.last[place], end);
      if (from < to) yield [place, from, to, from === row.first[place]];
    }
  }

  function draw() {
    const focused = strips.contains(document.activeElement), scrolled = strips.scrollTop;
    const probe = make("span", "probe", "0".repeat(50));
    strips.replaceChildren(probe);
    const cell = probe.getBoundingClientRect().width / 50;
    const room = strips.clientWidth - parseFloat(getComputedStyle(strips).getPropertyValue("--label"));
    const width = Math.max(Math.floor(room / cell) - 1, 12);
    tokens.clear();
    strips.replaceChildren(...lines(width).map(([start, end]) => drawLine(start, end)));
    strips.scrollTop = scrolled;
    mark();
    show(focused);
  }

  function drawLine(start, end) {
    const line = make("div", "line"), columns = end - start;
    const winners = rowOf(line, "", "winners", columns);
    const own = rowOf(line, "target", "target", columns);
    winners.setAttribute("aria-hidden", "true");
    for (const [place, from, to, whole] of pieces(target, start, end)) {
      const text = target.cells.slice(from, to).join(""), n = place - 1;
      const asked = n >= 0 && n < block.positions;
      const element = make(asked && whole ? "button" : "span", "token", text);
      if (asked) {
        const winner = block.winners[n];
        element.dataset.position = n;
        if (winner !== null) element.classList.add(series(winner));
        if (whole) {
          element.type = "button";
          element.tabIndex = -1;
          element.setAttribute("aria-label", `${block.spelled[place]}, position ${n}, ` +
            (winner === null ? "nobody" : block.sources[winner].name));
          tokens.set(n, element);
          const sign = outcome(n) + (winner === null ? "–" : block.sources[winner].letter);
          put(winners, make("span", "mark", sign), from - start + 1, Math.max(to, from + 1) - start + 1);
        } else element.setAttribute("aria-hidden", "true");
      }
      put(own, element, from - start + 1, to - start + 1);
    }
    block.sources.forEach((source, s) => {
      const row = rowOf(line, `${source.letter} ${source.name}`, "source", columns), strip = block.rows[s + 1];
      for (const [place, from, to] of pieces(strip, start, end)) {
        const n = predicts[s].get(place), look = n === undefined ? "unaligned" : source.situations[n];
        const element = make("span", `token is ${look}`, strip.cells.slice(from, to).join(""));
        element.title = look;
        if (n !== undefined) element.dataset.position = n;
        put(row, element, from - start + 1, to - start + 1);
      }
      if (!strip.read) put(row, make("span", "quiet", "could not read this block"), 1, Math.max(columns, 2));
    });
    return line;
  }

  /* Marks */

  function isMarked(n) {
    const won = by("by-winner").value, right = by("by-right").value;
    const least = parseFloat(by("by-divergence").value);
    if (won === "none" ? block.winners[n] !== null : won !== "" && block.winners[n] !== Number(won)) return false;
    if (right !== "") {
      const [good, bad] = right.split("/");
      if (models[good].rank[n] !== 1 || models[bad].rank[n] === 1) return false;
    }
    if (!Number.isNaN(least) && models) {
      const bits = models.target.divergence[n];
      if (bits === null || bits < least) return false;
    }
    return true;
  }

  function mark() {
    const filtered = ["by-winner", "by-right", "by-divergence"].some((id) => by(id).value !== "");
    marked.clear();
    for (let n = 0; n < block.positions; n++) if (filtered && isMarked(n)) marked.add(n);
    by("matches").textContent = filtered ? `${marked.size} of ${block.positions} positions` : "";
    by("next").disabled = by("previous").disabled = marked.size === 0;
    for (const element of strips.querySelectorAll(".target .token"))
      element.classList.toggle("marked", marked.has(Number(element.dataset.position)));
    if (by("all").open) table();
  }

  function step(by_, among) {
    const places = [...among].sort((a, b) => a - b);
    const next = by_ > 0 ? places.find((n) => n > chosen) : places.reverse().find((n) => n < chosen);
    if (next !== undefined) choose(next, true);
  }

  /* One position */

  function show(focus) {
    for (const element of strips.querySelectorAll("[data-position]"))
      element.classList.toggle("chosen", Number(element.dataset.position) === chosen);
    for (const [n, element] of tokens) {
      element.tabIndex = n === chosen ? 0 : -1;
      if (n === chosen) element.setAttribute("aria-current", "true");
      else element.removeAttribute("aria-current");
    }
    const element = tokens.get(chosen);
    if (element && focus) element.focus();
    else if (element) {  // within the strips alone, and not the page
      const top = element.offsetTop - strips.offsetTop;
      if (top < strips.scrollTop || top > strips.scrollTop + strips.clientHeight - 60)
        strips.scrollTop = Math.max(top - 60, 0);
    }
  }

  async function choose(n, focus) {
    chosen = n;
    show(focus);
    const turn = ++order;
    if (focus) await pause(60);  // a key that is held goes on before anything is asked
    if (turn !== order) return;
    try {
      const at = await position(n);
      if (turn !== order) return;
      history.replaceState(null, "", `#position-${n}`);
      closely(at);
    } catch (error) {
      if (turn === order) by("closely").replaceChildren(make("p", "", String(error.message)));
    }
  }

  async function position(n) {
    if (kept) return kept[n];
    const answer = block.answer === null ? "" : `&answer=${block.answer}`;
    const got = await fetch(`position.json?block=${block.block}&position=${n}${answer}`);
    const said = await got.json();
    if (!got.ok) throw new Error(said.error);
    return said;
  }

  function bar(probability) {
    const made = make("span", "bar");
    made.style.width = `${Math.max(6 * probability, probability > 0 ? 0.1 : 0)}em`;
    return made;
  }

  function list(caption, heads, rows) {
    const made = make("table", "compact");
    made.append(make("caption", "", caption));
    const head = make("tr");
    for (const name of heads) {
      const cell = make("th", "", name);
      cell.scope = "col";
      head.append(cell);
    }
    made.append(make("thead"), make("tbody"));
    made.tHead.append(head);
    for (const { cells, strong } of rows) {
      const row = make("tr", strong ? "true" : "");
      cells.forEach((one) => {
        const cell = make("td");
        if (Array.isArray(one)) cell.append(...one);
        else cell.textContent = one;
        row.append(cell);
      });
      made.tBodies[0].append(row);
    }
    return made;
  }

  const token = (text) => make("code", "", text);
  const spaced = (parts) => parts.flatMap((part) => [part, " "]);

  function outcomes(of, rest) {
    return [
      ...of.outcomes.map((one) => ({
        strong: one.true,
        cells: [
          [...(one.leftover ? [make("em", "", "tokens of no other outcome: ")] : []),
            ...spaced(one.tokens.map(token)), ...(one.more ? [make("small", "", `and ${one.more} more`)] : [])],
          [bar(one.probability), ` ${shown(one.probability)}`],
          one.true ? "✓" : "",
        ],
      })),
      ...[[`${of.more} more`, of.more ? of.mass_of_more : 0], ...rest].filter(([, mass]) => mass > 0).map(([name, mass]) => ({
        cells: [[make("em", "", name)], [bar(mass), ` ${shown(mass)}`], ""],
      })),
    ];
  }

  function closely(at) {
    const winner = block.winners[at.position], parts = [];
    by("position").textContent = `Position ${at.position}: what comes after ${at.read_bytes} bytes`;
    const said = make("p");
    said.append("The text goes on with ", token(at.next), ". ",
      winner === null ? "No source has a share here: the target learns from the text alone."
        : `${block.sources[winner].name} has most of the fused distribution.`);
    parts.push(said);
    const cards = make("div", "cards");
    at.before.forEach((one, s) => {
      const source = block.sources[s], card = make("section", "card"), heading = make("h3");
      heading.append(make("span", `letter ${series(s)}`, source.letter), ` ${source.name} `,
        make("small", "", `${(100 * source.weights[at.position]).toFixed(0)} % of the fused`));
      card.append(heading);
      if (one.silence !== undefined) card.append(make("p", "", one.silence));
      else {
        const next = make("p");
        next.append("reads ", ...spaced(one.next.map(token)), "next: ",
          make("span", `is ${source.situations[at.position]}`, source.situations[at.position]));
        card.append(next, list(`Before the map, its own tokens${one.healed ? ", healed" : ""}`,
          ["token", "probability"],
          [...one.kept.map((entry) => ({
            cells: [
              [token(entry.token), ...(entry.becomes === null ? [make("small", "", " becomes nothing")] : [])],
              [bar(entry.probability), ` ${shown(entry.probability)}`]] })),
            ...(one.more_kept ? [{ cells: [`and ${one.more_kept} more`, ""] }] : []),
            { cells: [[make("em", "", "not kept")], [bar(one.tail), ` ${shown(one.tail)}`]] }]));
        card.append(list("After the map, in the target’s tokens", ["tokens", "probability", "true"],
          outcomes(one, [["becomes nothing", one.nowhere], ["not kept", one.tail]])));
      }
      cards.append(card);
    });
    const fused = make("section", "card");
    fused.append(make("h3", "", "Fused"));
    if (at.fused.length === 0) fused.append(make("p", "", "No distribution here."));
    for (const share of at.fused) fused.append(list(
      `${share.source}, ${(100 * share.weight).toFixed(0)} %`, ["tokens", "probability", "true"],
      outcomes(share, [["anything else", share.rest]])));
    cards.append(fused);
    parts.push(cards);
    by("closely").replaceChildren(...parts);
    predictions();
  }

  const NAMES = { target: "target before", clm: "CLM", fused: "fused" };

  function predictions() {
    if (!models || chosen === null) return;
    const rows = Object.entries(models).map(([name, one]) => ({
      strong: one.rank[chosen] === 1,
      cells: [NAMES[name] || name,
        [bar(one.true[chosen]), ` ${shown(one.true[chosen])}`],
        one.rank[chosen] === 1 ? "✓ 1" : String(one.rank[chosen]),
        one.divergence[chosen] === null ? "–" : one.divergence[chosen].toFixed(2),
        one.best[chosen].flatMap(([text, probability]) => [token(text), ` ${shown(probability)}  `])],
    }));
    const heads = ["model", "true token", "its rank", "divergence, bits", "most probable"];
    const scroll = make("div", "scroll");
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "Predictions of the models");
    scroll.append(list("", heads, rows));
    scroll.querySelector("caption").remove();
    by("models").replaceChildren(scroll);
  }

  async function ask() {
    let said = read("predictions-data");
    if (!said) {
      if (by("models-wait").textContent.startsWith("No model")) return;
      const answer = block.answer === null ? "" : `&answer=${block.answer}`;
      const told = await waitFor(`predictions.json?block=${block.block}${answer}`, by("models-wait"));
      if (told.error) { by("models-wait").textContent = told.error; return; }
      said = told.models;
    }
    models = Object.fromEntries(said.map((one) => [one.name, one]));
    const pairs = [["fused", "target"], ["target", "fused"], ["fused", "clm"], ["clm", "fused"]];
    for (const [good, bad] of pairs.filter((pair) => pair.every((name) => models[name]))) {
      const option = make("option", "", `${NAMES[good]} is right where ${NAMES[bad]} is not`);
      option.value = `${good}/${bad}`;
      by("by-right").append(option);
    }
    by("by-right").disabled = by("by-right").options.length === 1;
    by("by-divergence").disabled = false;
    draw();
    predictions();
    if (by("all").open) table();
  }

  function table() {
    const all = by("positions-table");
    if (!all.tHead.rows.length) {
      const row = make("tr");
      for (const name of ["position", "text goes on with", "most of the fused from", ...block.sources.map((s) => s.name), "fused − target before"]) {
        const cell = make("th", "", name);
        cell.scope = "col";
        row.append(cell);
      }
      all.tHead.append(row);
    }
    const rows = [];
    for (let n = 0; n < block.positions; n++) {
      if (marked.size && !marked.has(n)) continue;
      const row = make("tr"), link = make("a", "", String(n)), winner = block.winners[n];
      link.href = `#position-${n}`;
      const head = make("th");
      head.scope = "row";
      head.append(link);
      row.append(head, make("td", "", block.spelled[n + 1]), make("td", "", winner === null ? "–" : block.sources[winner].name));
      for (const source of block.sources) row.append(make("td", "", source.situations[n]));
      row.append(make("td", "", outcome(n)));
      rows.push(row);
    }
    all.tBodies[0].replaceChildren(...rows);
  }

  /* What people do */

  strips.addEventListener("click", (event) => {
    const at = event.target.closest("[data-position]");
    if (at) choose(Number(at.dataset.position), at.tagName === "BUTTON");
  });
  strips.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (event.key in keys) { step(keys[event.key], tokens.keys()); event.preventDefault(); }
    else if (event.key === "Home") { choose(0, true); event.preventDefault(); }
    else if (event.key === "End") { choose(block.positions - 1, true); event.preventDefault(); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "n") step(1, marked);
    if (event.key === "p") step(-1, marked);
  });
  by("next").addEventListener("click", () => step(1, marked));
  by("previous").addEventListener("click", () => step(-1, marked));
  for (const id of ["by-winner", "by-right", "by-divergence"]) by(id).addEventListener("input", mark);
  by("all").addEventListener("toggle", () => by("all").open && table());
  const ofAddress = () => {
    const named = /^#position-(\d+)$/.exec(location.hash);
    return named && Number(named[1]) < block.positions ? Number(named[1]) : null;
  };
  addEventListener("hashchange", () => ofAddress() !== null && choose(ofAddress(), false));
  let size = 0;
  new ResizeObserver(() => {
    if (strips.clientWidth !== size) { size = strips.clientWidth; draw(); }
  }).observe(strips);
  const first = ofAddress() ?? block.at;
  if (first === null) by("closely").textContent = "No position of this block predicts anything.";
  else choose(first, false);
  ask().catch((error) => (by("models-wait").textContent = String(error.message)));
})();
