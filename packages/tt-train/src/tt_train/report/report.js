"use strict";
// Draws the curves from the figures in #data. Text goes in as text nodes only; nothing is fetched.
(() => {
  const { runs, charts } = JSON.parse(document.getElementById("data").textContent);
  const AXES = { step: "Steps", tokens: "Tokens", elapsed_s: "Time" };
  const view = { x: "step", log: false, hidden: new Set(), cross: null };
  const PAPER = 620; // width of a chart on A4 or letter in pixels; a browser does not lay the page out for paper first
  const readout = document.getElementById("readout");

  const html = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const svg = (parent, name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };

  // ---- numbers as text
  const short = (value) => {
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size >= 1e9) return +(value / 1e9).toPrecision(3) + "B";
    if (size >= 1e6) return +(value / 1e6).toPrecision(3) + "M";
    if (size >= 1e4) return +(value / 1e3).toPrecision(3) + "k";
    if (size < 1e-3) return value.toExponential(1).replace(".0e", "e");
    return String(+value.toPrecision(3));
  };
  const exact = (value) => {
    const size = Math.abs(value);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    if (size > 0 && size < 1e-3) return value.toExponential(3);
    return String(+value.toPrecision(4));
  };
  const clock = (seconds) => {
    if (seconds < 90) return short(seconds) + " s";
    if (seconds < 5400) return short(seconds / 60) + " min";
    return short(seconds / 3600) + " h";
  };
  const onX = (value) => (view.x === "elapsed_s" ? clock(value) : short(value));

  // ---- scales
  const niceStep = (span, count) => {
    const raw = span / count;
    const unit = 10 ** Math.floor(Math.log10(raw));
    return unit * [1, 2, 2.5, 5, 10].find((factor) => factor * unit >= raw * 0.999);
  };
  const linearTicks = (low, high, count) => {
    const step = niceStep(high - low || 1, count);
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i += 1) ticks.push(+(i * step).toPrecision(12));
    return ticks;
  };
  const xTicks = (low, high, width) => { // three at least, also on a phone, where the run has as many
    let ticks = [];
    for (let count = Math.max(2, width / 110); count < 12 && ticks.length < 3; count += 1)
      ticks = linearTicks(low, high, count).filter((tick) => view.x !== "step" || Number.isInteger(tick));
    return ticks;
  };
  const logTicks = (low, high) => {
    const factors = Math.log10(high / low) > 2.5 ? [1] : [1, 2, 5];
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
      for (const factor of factors) {
        const tick = factor * 10 ** power;
        if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(+tick.toPrecision(6));
      }
    return ticks.length > 1 ? ticks : linearTicks(low, high, 4);
  };
  const extent = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);

  const shownRuns = () => runs.filter((run) => !view.hidden.has(run.name));
  const present = (run, key) => run.columns[key] && run.columns[key].some((value) => value !== null);

  // ---- one chart
  const draw = (figure, paper) => {
    const chart = charts.find((one) => one.name === figure.dataset.chart);
    const plot = figure.querySelector(".plot");
    const width = paper ?? plot.clientWidth;
    const height = plot.clientHeight;
    const box = { left: 46, right: width - 8, top: 8, bottom: height - 24 };
    plot.querySelector("svg")?.remove();
    const canvas = svg(plot, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": figure.dataset.label });

    const lines = shownRuns().flatMap((run) =>
      chart.series.filter((series) => present(run, series.key)).map((series) => ({ run, series })));
    const log = view.log && chart.name === "loss";
    const points = lines.map(({ run, series }) =>
      run.columns[series.key].map((y, i) => (y === null || run.columns[view.x][i] === null || (log && y <= 0)
        ? null : [run.columns[view.x][i], y])));
    const finite = points.flat().filter((point) => point !== null);
    if (!finite.length) {
      svg(canvas, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing recorded");
      return;
    }
    let [x0, x1] = extent(finite.map((point) => point[0]));
    let [y0, y1] = extent(finite.map((point) => point[1]));
    if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
    const flat = y1 - y0 <= Math.abs(y1) * 1e-6;
    if (flat) [y0, y1] = y1 === 0 ? [-1, 1] : y1 > 0 && chart.zero ? [0, y1 * 1.5] : [y1 - Math.abs(y1) / 2, y1 + Math.abs(y1) / 2];
    if (!log && !flat) {
      const margin = (y1 - y0) * 0.06;
      if (chart.zero && y0 >= 0) y0 = 0;
      else y0 = y0 >= 0 ? Math.max(0, y0 - margin) : y0 - margin;
      y1 += margin;
    }
    const scale = log ? Math.log : (value) => value;
    const toX = (x) => box.left + ((x - x0) / (x1 - x0)) * (box.right - box.left);
    const toY = (y) => box.bottom - ((scale(y) - scale(y0)) / (scale(y1) - scale(y0))) * (box.bottom - box.top);

    for (const tick of log ? logTicks(y0, y1) : linearTicks(y0, y1, height > 250 ? 6 : 4)) {
      svg(canvas, "line", { class: "grid", x1: box.left, x2: box.right, y1: toY(tick), y2: toY(tick) });
      svg(canvas, "text", { x: box.left - 8, y: toY(tick) + 4, "text-anchor": "end" }, short(tick));
    }
    svg(canvas, "line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
    for (const tick of xTicks(x0, x1, width)) {
      const anchor = toX(tick) > box.right - 14 ? "end" : "middle";
      svg(canvas, "text", { x: toX(tick), y: box.bottom + 17, "text-anchor": anchor }, onX(tick));
    }

    lines.forEach(({ run, series }, index) => {
      let path = "";
      let pen = false;
      for (const point of points[index]) {
        if (point === null) {
          pen = pen && series.sparse === true;
          continue;
        }
        path += `${pen ? "L" : "M"}${toX(point[0]).toFixed(1)} ${toY(point[1]).toFixed(1)}`;
        pen = true;
      }
      const drawn = points[index].filter((point) => point !== null);
      const colour = `var(--run-${run.colour})`;
      svg(canvas, "path", {
        d: path, stroke: colour, "stroke-width": series.width,
        "stroke-opacity": series.opacity ?? 1, "stroke-dasharray": series.dash ?? (series.sparse ? "5 4" : "none"),
      });
      if (series.sparse || drawn.length < 3)
        for (const point of drawn.length > 60 ? [] : drawn)
          svg(canvas, "circle", { cx: toX(point[0]), cy: toY(point[1]), r: 3.2, stroke: colour });
      if (series.tag && drawn.length) {
        const [x, y] = drawn.at(-1);
        svg(canvas, "text", { x: toX(x) - 7, y: toY(y) - 7, "text-anchor": "end" }, series.tag);
      }
    });
    figure.chart = { box, toX, toY, x0, x1, lines, points, layer: svg(canvas, "g", {}) };
    mark(figure);
  };

  // ---- reading off: a cross-hair at the same place in every chart, figures in the chart under the pointer
  const nearest = (points, x) => {
    let best = null;
    for (const point of points) if (point !== null && (best === null || Math.abs(point[0] - x) < Math.abs(best[0] - x))) best = point;
    return best;
  };
  const readings = (figure) => figure.chart.lines.map(({ run, series }, index) => {
    const point = nearest(figure.chart.points[index], view.cross);
    return point && { run, series, point };
  }).filter(Boolean);

  const mark = (figure) => {
    const { layer, box, toX, toY, x0, x1 } = figure.chart ?? {};
    if (!layer) return;
    layer.replaceChildren();
    figure.querySelector(".tip")?.remove();
    if (view.cross === null || view.cross < x0 || view.cross > x1) return;
    svg(layer, "line", { class: "cross", x1: toX(view.cross), x2: toX(view.cross), y1: box.top, y2: box.bottom });
    const found = readings(figure);
    for (const { run, series, point } of found)
      if (!series.faint) svg(layer, "circle", { cx: toX(point[0]), cy: toY(point[1]), r: 3.6, stroke: `var(--run-${run.colour})` });
    if (figure === view.figure) tip(figure, found);
  };

  const where = () => (view.x === "elapsed_s" ? `after ${clock(view.cross)}` : `${view.x} ${exact(view.cross)}`);
  const said = ({ run, series, point }) => [runs.length > 1 ? `${run.name}, ${series.label}` : series.label, exact(point[1])];
  const tip = (figure, found) => {
    const box = html("div", { class: "tip card", "aria-hidden": "true" }, html("b", {}, where()));
    for (const one of found) {
      if (one.series.faint && runs.length > 1 && present(one.run, "smooth")) continue;
      const [label, value] = said(one);
      const dot = html("i", { class: "dot" });
      dot.style.setProperty("--colour", `var(--run-${one.run.colour})`);
      if (one.series.faint) dot.style.opacity = "0.4";
      const at = one.series.sparse ? ` (${onX(one.point[0])})` : "";
      box.append(html("div", {}, dot, html("span", {}, label + at), html("span", {}, value)));
    }
    const plot = figure.querySelector(".plot");
    plot.append(box);
    const x = figure.chart.toX(view.cross);
    const left = x + 14 + box.offsetWidth > plot.clientWidth ? x - 14 - box.offsetWidth : x + 14;
    box.style.transform = `translate(${Math.max(0, left)}px, 10px)`;
  };

  const figures = [...document.querySelectorAll(".chart")];
  const drawAll = (paper) => figures.forEach((figure) => draw(figure, paper));
  const cross = (figure, x) => {
    view.figure = figure;
    view.cross = x;
    figures.forEach(mark);
  };

  for (const figure of figures) {
    const plot = figure.querySelector(".plot");
    const stops = () => [...new Set(figure.chart.points.flat().filter(Boolean).map((point) => point[0]))].sort((a, b) => a - b);
    plot.addEventListener("pointermove", (event) => {
      if (!figure.chart) return;
      const { box, x0, x1 } = figure.chart;
      const x = x0 + ((event.clientX - plot.getBoundingClientRect().left - box.left) / (box.right - box.left)) * (x1 - x0);
      cross(figure, nearest(figure.chart.points.flat(), x)[0]);
    });
    plot.addEventListener("pointerleave", () => cross(null, null));
    plot.addEventListener("blur", () => cross(null, null));
    plot.addEventListener("keydown", (event) => {
      const jump = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
      if (jump === undefined || !figure.chart) return;
      event.preventDefault();
      const all = stops();
      const now = view.cross === null ? 0 : all.indexOf(view.cross) + jump;
      cross(figure, all[Math.min(all.length - 1, Math.max(0, now))]);
      readout.textContent = `${where()}: ` + readings(figure).map((one) => said(one).join(" ")).join("; ");
    });
  }

  // ---- controls
  const [runGroup, xGroup, yGroup] = document.querySelectorAll("#controls [role=group]");
  const choices = (group, options, chosen, choose) => {
    for (const [value, label] of options) {
      const button = html("button", { type: "button", "aria-pressed": String(value === chosen) }, label);
      button.addEventListener("click", () => {
        for (const other of group.children) other.setAttribute("aria-pressed", String(other === button));
        choose(value);
        view.cross = null;
        drawAll();
      });
      group.append(button);
    }
  };
  const axes = Object.entries(AXES).filter(([key]) => key === "step" || runs.every((run) => present(run, key)));
  if (axes.length > 1) choices(xGroup, axes, "step", (value) => { view.x = value; });
  choices(yGroup, [[false, "Linear"], [true, "Log"]], false, (value) => { view.log = value; });
  if (runs.length > 1)
    for (const run of runs) {
      const dot = html("i", { class: "dot" });
      dot.style.setProperty("--colour", `var(--run-${run.colour})`);
      const button = html("button", { type: "button", "aria-pressed": "true" }, dot, run.name);
      button.addEventListener("click", () => {
        if (!view.hidden.delete(run.name)) view.hidden.add(run.name);
        button.setAttribute("aria-pressed", String(!view.hidden.has(run.name)));
        drawAll();
      });
      runGroup.append(button);
    }
  document.getElementById("controls").hidden = false;

  for (const button of document.querySelectorAll(".command button")) {
    button.hidden = !navigator.clipboard;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(button.parentElement.querySelector("pre").textContent);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Select and copy";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
  }

  const theme = document.getElementById("theme");
  const themes = ["system", "light", "dark"];
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % 3];
    if (next === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    theme.querySelector("span").textContent = next;
  });

  new ResizeObserver(() => drawAll()).observe(document.getElementById("charts"));
  addEventListener("beforeprint", () => drawAll(PAPER));
  addEventListener("afterprint", () => drawAll());
  drawAll();
})();
