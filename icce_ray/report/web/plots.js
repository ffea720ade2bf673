// Diagrams as SVG, drawn from their numbers (page_plots.py says what they hold). The legend stands beside the data, a
// pointer reads values, and every diagram has its numbers as a table. The page of a sweep uses this file too.

const PLOT = {width: 380, height: 216, left: 48, right: 14, top: 26, bottom: 40};
const PLOT_COLORS = ["#4a86e0", "#d97a2b", "#7f8794"];

function shape(tag, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

function node(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

const numberText = (value) => (Math.abs(value) >= 10000 || (value && Math.abs(value) < 0.001)
  ? value.toLocaleString("en", {notation: Math.abs(value) < 1 ? "scientific" : "compact", maximumSignificantDigits: 3})
  : value.toLocaleString("en", {maximumSignificantDigits: 4}));

/** Round numbers from `low` to `high`: 1, 2 or 5 times a power of ten. */
function roundNumbers(low, high, log, most = 6) {
  const found = [];
  if (log) {
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
    }
    const inside = found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
    const tens = inside.filter((value) => Math.abs(Math.log10(value) % 1) < 1e-9);
    return inside.length <= most ? inside : tens.filter((_, i) => i % Math.ceil(tens.length / most) === 0);
  }
  const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((value) => value >= rough * 0.999);
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

/** The place of a value on an axis from `start` to `stop`. */
function axisScale(values, {log = false, ticks = null}, start, stop, fromZero) {
  let low = Math.min(...values), high = Math.max(...values);
  if (fromZero && !log) low = Math.min(0, low);
  if (ticks) [low, high] = [-0.5, ticks.length - 0.5];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
  const of = (value) => (log ? Math.log(value) : value);
  return {low, high, at: (value) => start + ((of(value) - of(low)) / (of(high) - of(low))) * (stop - start)};
}

/** A diagram with its heading, legend and numbers. */
function drawPlot({heading, x, y, series, marks, span}) {
  const {width, height, left, right, top, bottom} = PLOT;
  const known = (name) => series.flatMap((one) => (one[name] ?? [])).filter((value) => value !== null);
  const marked = (name) => marks.filter((mark) => mark[name] !== undefined).map((mark) => mark[name]);
  const across = axisScale([...known("x"), ...marked("x")], x, left, width - right, false);
  const hasBars = series.some((one) => one.kind === "bars");
  const up = axisScale([...known("y"), ...known("low"), ...known("high"), ...marked("y")], y, height - bottom, top, hasBars);
  const picture = shape("svg", {viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${heading}: ${y.label} by ${x.label}. ${series.map(describeSeries).join(" ")}`});
  const line = (x1, y1, x2, y2, more) => picture.append(shape("line", {x1, y1, x2, y2, stroke: "currentColor", ...more}));
  const label = (text, place) => picture.append(shape("text", {"font-size": 11, fill: "currentColor", ...place}, text));

  if (span) picture.append(shape("rect", {x: across.at(span[0]) - 1, y: top, width: across.at(span[1]) - across.at(span[0]) + 2,
    height: height - top - bottom, fill: "currentColor", opacity: 0.1}));
  for (const value of roundNumbers(up.low, up.high, y.log, 5)) {
    line(left, up.at(value), width - right, up.at(value), {opacity: 0.13});
    label(numberText(value), {x: left - 6, y: up.at(value) + 4, "text-anchor": "end"});
  }
  for (const [value, text] of x.ticks ? x.ticks.map((text, i) => [i, text])
    : roundNumbers(across.low, across.high, x.log).map((value) => [value, numberText(value)])) {
    line(across.at(value), height - bottom, across.at(value), height - bottom + 4, {opacity: 0.5});
    label(text, {x: across.at(value), y: height - bottom + 16, "text-anchor": "middle"});
  }
  line(left, height - bottom, width - right, height - bottom, {opacity: 0.5});
  label(x.label, {x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle"});
  label(y.label, {x: 2, y: 10});

  series.forEach((one, i) => picture.append(...drawSeries(one, PLOT_COLORS[i % PLOT_COLORS.length], across, up)));
  for (const {x: place, y: level, text} of marks) {
    const dashed = {"stroke-dasharray": "4 3", opacity: 0.7};
    if (place !== undefined) line(across.at(place), top, across.at(place), height - bottom, dashed);
    else line(left, up.at(level), width - right, up.at(level), dashed);
    const isLeft = place !== undefined && across.at(place) < (left + width) / 2;
    label(text, place === undefined ? {x: width - right, y: up.at(level) - 4, "text-anchor": "end"}
      : {x: across.at(place) + (isLeft ? 4 : -4), y: top - 5, "text-anchor": isLeft ? "start" : "end"});
  }

  const said = node("span", {className: "plot-value"});
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    said.textContent = valuesAt(series, x, across, ((event.clientX - box.left) / box.width) * width);
  });
  picture.addEventListener("pointerleave", () => (said.textContent = ""));
  // The label of the axis says what a single series is.
  const legend = node("div", {className: "plot-legend"}, ...(series.length === 1 ? [] : series).map((one, i) => {
    const swatch = node("i");
    swatch.style.background = PLOT_COLORS[i % PLOT_COLORS.length];
    return node("span", {}, swatch, one.name);
  }), said);
  return node("figure", {}, node("figcaption", {textContent: heading}), legend, picture, numbersOf(x, series));
}

function drawSeries({kind, x, y, low, high}, color, across, up) {
  const floor = up.at(up.low);
  const points = y.map((value, i) => (value === null || x[i] === null ? null : [across.at(x[i]), up.at(value)])).filter(Boolean);
  const path = (places) => places.map(([px, py], i) => `${i ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");
  if (kind === "points") return points.map(([cx, cy]) => shape("circle", {cx, cy, r: 3.5, fill: color, "fill-opacity": 0.85}));
  if (kind === "bars") {
    const outline = y.flatMap((value, i) => [[across.at(x[i]), up.at(value)], [across.at(x[i + 1]), up.at(value)]]);
    const ends = [[across.at(x[0]), floor], ...outline, [across.at(x.at(-1)), floor]];
    return [shape("path", {d: path(ends), fill: color, "fill-opacity": 0.3, stroke: color, "stroke-width": 1.5})];
  }
  const band = low && [...high.map((value, i) => [across.at(x[i]), up.at(value)]),
    ...low.map((value, i) => [across.at(x[i]), up.at(value)]).reverse()];
  return [...(band ? [shape("path", {d: `${path(band)}Z`, fill: color, "fill-opacity": 0.2})] : []),
    shape("path", {d: path(points), fill: "none", stroke: color, "stroke-width": 1.8, "stroke-linejoin": "round"})];
}

/** What a screen reader says about a series. */
function describeSeries({name, x, y}) {
  const places = y.map((value, i) => [value, x[i]]).filter(([value]) => value !== null);
  if (!places.length) return `${name}: no values.`;
  const [most, at] = places.reduce((best, one) => (one[0] > best[0] ? one : best));
  const least = Math.min(...places.map(([value]) => value));
  return `${name}: ${places.length} values, ${numberText(least)} to ${numberText(most)}, the highest at ${numberText(at)}.`;
}

/** The values at a place of the diagram, in words. */
function valuesAt(series, axis, across, place) {
  const texts = [];
  let at = null;
  for (const {name, kind, x, y} of series) {
    const middle = (i) => across.at(kind === "bars" ? (x[i] + x[i + 1]) / 2 : x[i]);
    const known = y.map((_, i) => i).filter((i) => y[i] !== null && x[i] !== null);
    if (!known.length) continue;
    const i = known.reduce((best, one) => (Math.abs(middle(one) - place) < Math.abs(middle(best) - place) ? one : best));
    at ??= axis.ticks ? axis.ticks[x[i]] : kind === "bars" ? `${numberText(x[i])} to ${numberText(x[i + 1])}` : numberText(x[i]);
    texts.push(`${series.length > 1 ? `${name} ` : ""}${numberText(y[i])}`);
  }
  return texts.length ? `${at}: ${texts.join(", ")}` : "";
}

/** The numbers of a diagram, to open. */
function numbersOf(axis, series) {
  const box = node("details", {className: "plot-numbers"}, node("summary", {textContent: "Numbers"}));
  box.addEventListener("toggle", () => {
    if (box.querySelector("table")) return;
    const body = node("tbody");
    for (const {name, kind, x, y} of series) {
      y.forEach((value, i) => body.append(node("tr", {}, ...[name,
        axis.ticks ? axis.ticks[x[i]] : kind === "bars" ? `${numberText(x[i])} to ${numberText(x[i + 1])}` : numberText(x[i]),
        value === null ? "–" : numberText(value)].map((text) => node("td", {textContent: text})))));
    }
    const head = node("tr", {}, ...["series", axis.label, "value"].map((text) => node("th", {textContent: text})));
    box.append(node("div", {className: "scroll"}, node("table", {}, node("thead", {}, head), body)));
  });
  return box;
}

const MAX_LEAVES = 60;

/** The tree of merges, with the names of the clusters on the left; null for a single cluster. */
function drawTree({left, right, similarity}, nameOf, isEmpty) {
  const number = left.length + 1, first = Math.max(0, left.length - MAX_LEAVES + 1);
  const leaves = [], merges = [];
  const high = Math.min(1, 1.1 * Math.max(...similarity)) || 1;
  const inside = (tree) => (tree < number ? (isEmpty(tree) ? [] : [tree])
    : [...inside(left[tree - number]), ...inside(right[tree - number])]);
  const leaf = (clusters) => {
    if (!clusters.length) return null;
    leaves.push(clusters.length === 1 ? nameOf(clusters[0]) : `${clusters.length} clusters`);
    return {place: leaves.length - 0.5, at: high};
  };
  const put = (tree) => {
    if (tree < number + first) return leaf(inside(tree));
    const [one, other] = [put(left[tree - number]), put(right[tree - number])];
    if (!one || !other) return one ?? other;
    const at = similarity[tree - number];
    merges.push([one, other, at]);
    return {place: (one.place + other.place) / 2, at};
  };
  put(number + left.length - 1);
  if (!merges.length) return null;
  const {width, right: margin} = PLOT, names = 120, row = 15, bottom = leaves.length * row + 6;
  const across = axisScale([high, ...merges.map(([, , at]) => at)], {}, width - margin, names, true);
  const picture = shape("svg", {viewBox: `0 0 ${width} ${bottom + 36}`, role: "img",
    "aria-label": `Hierarchy: ${leaves.length} branches; the last merge joins clusters that share ${Math.round(100 * merges.at(-1)[2])}% of their votes.`});
  const text = (content, place) => picture.append(shape("text", {"font-size": 11, fill: "currentColor", ...place}, content));
  leaves.forEach((name, i) => text(name.length > 18 ? `${name.slice(0, 17)}…` : name, {x: names - 6, y: (i + 0.5) * row + 4, "text-anchor": "end"}));
  for (const [one, other, at] of merges) {
    const [a, b] = [one, other].map((side) => [across.at(side.at).toFixed(1), side.place * row]), x = across.at(at).toFixed(1);
    picture.append(shape("path", {d: `M${a[0]} ${a[1]}H${x}V${b[1]}H${b[0]}`, fill: "none", stroke: PLOT_COLORS[0], "stroke-width": 1.5}));
  }
  for (const value of roundNumbers(across.low, high, false, 5)) {
    picture.append(shape("line", {x1: across.at(value), x2: across.at(value), y1: 0, y2: bottom, stroke: "currentColor", opacity: 0.12}));
    text(`${Math.round(100 * value)}%`, {x: across.at(value), y: bottom + 14, "text-anchor": "middle"});
  }
  text("share of votes that two clusters have in common", {x: width / 2, y: bottom + 31, "text-anchor": "middle"});
  return node("figure", {}, node("figcaption", {textContent: "Hierarchy of clusters"}), picture);
}
