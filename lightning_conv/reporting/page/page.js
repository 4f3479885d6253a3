(function () {
  "use strict";
  var root = document.documentElement, charts = [], data = read("data-charts"), terms = read("data-terms");

  var STEPS = [];  // distances of the ticks of a step, which is whole
  for (var decade = 1; decade < 1e15; decade *= 10) STEPS.push(decade, 2 * decade, 5 * decade);
  var latest = 0;  // the last step of any chart
  data.forEach(function (chart) { chart.lines.forEach(function (line) { latest = Math.max(latest, line.x[line.x.length - 1] || 0); }); });

  function read(id) { return JSON.parse(document.getElementById(id).textContent); }
  function color(name) { return getComputedStyle(root).getPropertyValue(name).trim(); }
  function stored(value) {  // a page that is opened from a file may have no storage
    try { if (value === undefined) return localStorage.getItem("convergence-theme"); localStorage.setItem("convergence-theme", value); } catch (error) { }
    return null;
  }
  function text(value) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    var size = Math.abs(value);
    return size >= 1e5 || size < 1e-3 ? value.toExponential(3) : String(Number(value.toPrecision(5)));
  }
  function power(value) {
    if (value === null) return "";
    var size = Math.abs(value);
    return value !== 0 && (size >= 1e5 || size < 1e-3) ? Number(value.toPrecision(3)).toExponential().replace("e+", "e") : String(Number(value.toPrecision(6)));
  }
  function dark() {
    var chosen = root.getAttribute("data-theme");
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function draw(holder, chart, log) {
    var tables = [], kinds = [], labels = [];
    chart.lines.forEach(function (line, number) {
      tables.push([line.x, line.y]); kinds.push({ line: line, number: number, what: "value" });
      ["lower", "upper"].forEach(function (end) {
        if (line.lower && line.upper) { tables.push([line.x, line[end]]); kinds.push({ line: line, number: number, what: end }); }
      });
    });
    var raw = uPlot.join(tables), shown = raw, floor = Infinity;
    if (log) {
      raw.slice(1).forEach(function (column) { column.forEach(function (value) { if (value > 0 && value < floor) floor = value; }); });
      shown = raw.map(function (column, at) {
        if (!at) return column;
        // A lower bound of 0 and below reaches down to the edge; a value of 0 and below is not drawn.
        return column.map(function (value) { return value === null || value === undefined || value > 0 ? value : kinds[at - 1].what === "lower" ? floor / 2 : null; });
      });
    }
    var series = [{ label: "step" }], bands = [], low = {};
    kinds.forEach(function (kind, at) {
      var stroke = color("--c" + (kind.line.color % 8)), bound = kind.what !== "value";
      var known = kind.line.y.filter(function (value) { return value !== null; }).length;
      series.push({
        label: bound ? (kind.what === "lower" ? "at least" : "at most") : kind.line.label,
        stroke: bound ? "transparent" : stroke, width: 1.6, dash: kind.line.dash ? [6, 4] : undefined,
        points: { show: !bound && known <= 40, size: 5, fill: stroke, stroke: stroke }, spanGaps: false,
        value: function (plot, value, index, row) { return row === null || row === undefined ? "–" : text(raw[index][row]); }
      });
      if (kind.what === "lower") low[kind.number] = at + 1;
      if (kind.what === "upper") bands.push({ series: [at + 1, low[kind.number]], fill: stroke + (chart.lines.length > 3 ? "1a" : "33") });
    });
    var rule = { stroke: color("--rule"), width: 1 }, axis = { stroke: color("--ink"), grid: rule, ticks: rule, font: "12px sans-serif" };
    var sparse = log ? Object.assign({ filter: few }, rule) : rule;
    var options = {
      width: Math.max(240, holder.clientWidth), height: 260, series: series, bands: bands, legend: { live: true },
      scales: { x: { time: false, range: stepRange }, y: { distr: log ? 3 : 1 } },
      cursor: { focus: { prox: 20 } },
      axes: [
        Object.assign({ label: "step", labelSize: 18, labelFont: "12px sans-serif", size: 34, incrs: STEPS, values: function (plot, all) { return all.map(power); } }, axis),
        Object.assign({ size: 66, values: function (plot, all) { return all.map(power); } }, axis, { grid: sparse, ticks: sparse })
      ],
      hooks: { draw: [function (plot) { edge(plot, chart.edge); }] }
    };
    if (log) options.scales.y.range = function (plot, min, max) {
      if (!(min > 0) || !(max > 0)) return [0.1, 10];
      if (chart.edge !== null) { min = Math.min(min, chart.edge); max = Math.max(max, chart.edge); }
      return [round(min, false), round(max, true)];
    };
    else if (chart.edge === null) options.scales.y.range = function (plot, min, max) {
      return min === 0 && max === 0 ? [0, 1] : uPlot.rangeNum(min, max, 0.1, true);  // uPlot's own range of a zero goes up to 100
    };
    else options.scales.y.range = function (plot, min, max) {
      return uPlot.rangeNum(Math.min(min, chart.edge), Math.max(max, chart.edge * 1.02), 0.1, true);
    };
    holder.textContent = "";
    return new uPlot(options, shown, holder);
  }
  function stepRange(plot, min, max) {  // of a single step, uPlot's own range goes up to 100
    return plot.data[0].length === 1 ? [0, Math.max(latest, plot.data[0][0], 1)] : [min, max];
  }
  function round(value, up) {  // to 1, 2 or 5 times a power of ten, where the ticks of a logarithmic axis can begin
    var base = Math.pow(10, Math.floor(Math.log10(value) + 1e-9)), steps = [1, 2, 5, 10].map(function (each) { return each * base; });
    if (up) return steps.find(function (each) { return each > value * 1.01; }) || 20 * base;
    return steps.reverse().find(function (each) { return each < value * 0.99; }) || base / 2;
  }
  function few(plot, all) {  // over more than four decades the lines between the powers of ten would fill the chart
    var many = plot.scales.y.max > 1e4 * plot.scales.y.min;
    return all.map(function (value) { return many && Math.abs(Math.log10(value) - Math.round(Math.log10(value))) > 1e-6 ? null : value; });
  }
  function edge(plot, value) {
    if (value === null || value < plot.scales.y.min || value > plot.scales.y.max) return;
    var at = plot.valToPos(value, "y", true), context = plot.ctx;
    context.save();
    context.strokeStyle = color("--ink"); context.lineWidth = 1.2 * devicePixelRatio; context.setLineDash([5, 4]);
    context.beginPath(); context.moveTo(plot.bbox.left, at); context.lineTo(plot.bbox.left + plot.bbox.width, at); context.stroke();
    context.restore();
  }

  function begin(card) {
    if (card.started) return;
    card.started = true;
    var chart = data[Number(card.getAttribute("data-chart"))], holder = card.querySelector(".plot"), button = card.querySelector("button");
    var state = { log: chart.log, plot: null };
    function again() { if (state.plot) state.plot.destroy(); state.plot = draw(holder, chart, state.log); button.textContent = state.log ? "linear" : "log"; }
    var positive = chart.lines.some(function (line) { return line.y.some(function (value) { return value > 0; }); });
    button.hidden = !positive;
    button.addEventListener("click", function () { state.log = !state.log; again(); });
    again();
    charts.push(again);
    new ResizeObserver(function () {
      if (state.plot && Math.abs(holder.clientWidth - state.plot.width) > 2 && holder.clientWidth > 0) state.plot.setSize({ width: holder.clientWidth, height: 260 });
    }).observe(holder);
  }
  function beginAll(within) { within.querySelectorAll(".chart[data-chart]").forEach(function (card) { if (!card.closest("details:not([open])")) begin(card); }); }
  document.querySelectorAll("details").forEach(function (part) { part.addEventListener("toggle", function () { if (part.open) beginAll(part); }); });

  var toggle = document.getElementById("theme");
  function name() { toggle.textContent = dark() ? "Light" : "Dark"; }
  function redraw() { name(); charts.forEach(function (again) { again(); }); }
  toggle.addEventListener("click", function () { var next = dark() ? "light" : "dark"; root.setAttribute("data-theme", next); stored(next); redraw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  var before = stored();
  if (before === "dark" || before === "light") root.setAttribute("data-theme", before);
  name();

  var tip = document.getElementById("tip");
  function show(event) {
    var word = event.target.closest && event.target.closest("dfn[data-term]");
    if (!word) return;
    tip.textContent = terms[word.getAttribute("data-term")] || "";
    tip.style.display = "block";
    var box = word.getBoundingClientRect(), left = Math.min(box.left, innerWidth - tip.offsetWidth - 12);
    tip.style.left = Math.max(8, left) + scrollX + "px"; tip.style.top = box.bottom + scrollY + 6 + "px";
  }
  function hide() { tip.style.display = "none"; }
  document.addEventListener("mouseover", show); document.addEventListener("focusin", show);
  document.addEventListener("mouseout", hide); document.addEventListener("focusout", hide);
  document.addEventListener("keydown", function (event) { if (event.key === "Escape") hide(); });
  beginAll(document);
})();
