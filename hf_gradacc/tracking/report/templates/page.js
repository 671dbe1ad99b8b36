"use strict";
// Shows in every panel what its lines say at the update nearest to the pointer. With a panel in
// focus, the arrow keys move from update to update. Without this script the page lacks only that.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byTokens = data.axis !== "updates", several = data.runs.length > 1;
  const places = data.runs.flatMap(tables => Object.values(tables).flatMap(table => table.x));
  const xs = [...new Set(places)].sort((a, b) => a - b);
  const views = [...document.querySelectorAll("figure")].map(makeView);
  let current = xs.length - 1;

  function nearest(values, x) {  // in ascending values
    let low = 0, high = values.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (values[middle] < x) low = middle; else high = middle;
    }
    return x - values[low] <= values[high] - x ? low : high;
  }

  function number(value) {
    return value === null ? "∞" : value.toLocaleString("en-US", {maximumSignificantDigits: 6});
  }

  function updates(table, at) {
    const first = table.first[at], last = table.last[at];
    return first === last
      ? `update ${first.toLocaleString("en-US")}`
      : `updates ${first.toLocaleString("en-US")}–${last.toLocaleString("en-US")}, mean`;
  }

  function element(name, parent, text = "") {
    const made = document.createElement(name);
    made.textContent = text;
    parent.append(made);
    return made;
  }

  function makeView(figure, number) {
    const svg = figure.querySelector("svg");
    const here = document.createElementNS(svg.namespaceURI, "g");
    here.setAttribute("class", "here");
    svg.append(here);
    const values = element("div", figure);
    values.className = "values";
    values.hidden = true;
    figure.tabIndex = 0;
    figure.addEventListener("pointermove", event => {
      const [left, , right] = panel.box, frame = svg.getBoundingClientRect();
      const at = (event.clientX - frame.left) * svg.viewBox.baseVal.width / frame.width;
      const share = Math.min(1, Math.max(0, (at - left) / (right - left)));
      show(nearest(xs, panel.x[0] + share * (panel.x[1] - panel.x[0])));
    });
    figure.addEventListener("pointerleave", hide);
    figure.addEventListener("blur", hide);
    figure.addEventListener("keydown", event => {
      const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      show(Math.min(xs.length - 1, Math.max(0, current + step)));
    });
    const panel = data.panels[number];
    return {figure, svg, here, values, panel};
  }

  function show(index) {
    current = index;
    views.forEach(view => showIn(view, xs[index]));
  }

  function hide() {
    views.forEach(view => { view.values.hidden = true; view.here.replaceChildren(); });
  }

  function showIn({figure, svg, here, values, panel}, x) {
    const [left, top, right, bottom] = panel.box, [low, high] = panel.y;
    const across = left + (right - left) * (x - panel.x[0]) / (panel.x[1] - panel.x[0]);
    const scale = panel.log ? Math.log : value => value;
    here.replaceChildren();
    values.replaceChildren();
    draw("path", {d: `M${across} ${top}V${bottom}`});
    const head = element("div", values);
    const said = new Set();
    for (const line of panel.lines) {
      const table = data.runs[line.run][line.kind];
      const at = nearest(table.x, x), value = table[line.keys[0]][at];
      if (value === null) continue;
      const row = element("div", values);
      element("i", row).style.background = line.colour;
      row.append(`${line.label}: `);
      element("b", row, number(value));
      if (line.keys.length > 1 && table[line.keys[1]][at] !== null) {
        row.append(` (${number(table[line.keys[1]][at])} to ${number(table[line.keys[2]][at])})`);
      }
      const which = updates(table, at);
      if (!several && !said.size) head.textContent = which;
      else if (several || !said.has(which)) element("small", row, ` ${which}`);
      said.add(which);
      if (!line.stacked && !(panel.log && value <= 0)) {
        const share = (scale(value) - scale(low)) / (scale(high) - scale(low));
        const dot = {r: 4.5, fill: line.colour, cy: bottom - (bottom - top) * share};
        draw("circle", {...dot, cx: left + (right - left) * table.x[at] / panel.x[1]});
      }
    }
    const place = byTokens ? `${number(Math.round(x))} tokens` : several ? `update ${number(x)}` : "";
    head.append(head.textContent && place ? ` · ${place}` : place);
    values.hidden = !said.size;
    const width = figure.clientWidth, rule = across * width / svg.viewBox.baseVal.width;
    const beside = rule < width / 2 ? rule + 12 : rule - 12 - values.offsetWidth;
    values.style.left = `${Math.max(0, Math.min(width - values.offsetWidth, beside))}px`;
    values.style.top = "4px";

    function draw(name, attributes) {
      const made = document.createElementNS(here.namespaceURI, name);
      Object.entries(attributes).forEach(pair => made.setAttribute(...pair));
      here.append(made);
    }
  }
})();
