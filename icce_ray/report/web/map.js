// The map: every image on the page as a dot, drawn into the pixels of a canvas. A hundred thousand dots take a few
// milliseconds, so the map follows the pointer.

const MAP_CELLS = 256;       // the dots are sorted into this many columns and rows, to find those under the pointer
const MAX_LEGEND = 80;
const map = {by: "cluster", scale: 1, left: 0, top: 0, lasso: false, only: null};
let mapIndex = null;

/** Rows on the map, sorted by cell, and where each cell starts. */
function indexMap() {
  const rows = [];
  COLUMNS.on_map.forEach((on, row) => on && rows.push(row));
  const cell = (row) => (COLUMNS.y[row] >> 8) * MAP_CELLS + (COLUMNS.x[row] >> 8);
  const starts = new Int32Array(MAP_CELLS * MAP_CELLS + 1);
  for (const row of rows) starts[cell(row) + 1]++;
  for (let i = 1; i < starts.length; i++) starts[i] += starts[i - 1];
  const next = starts.slice(), sorted = new Int32Array(rows.length);
  for (const row of rows) sorted[next[cell(row)]++] = row;
  return {sorted, starts};
}

/** The number that decides the colour of a dot, and what the legend says. */
function coloring() {
  const clustering = COLUMNS[map.by];
  if (map.by.startsWith("clustering-")) return {of: (row) => clustering[row], name: (number) => (number === -2 ? "not trained on" : number < 0 ? "Noise" : `Cluster ${number}`)};
  if (map.by === "label") return {of: (row) => COLUMNS.label[row], name: (number) => CORE.images.labels[number] ?? "none"};
  return {of: (row) => now[row], name: nameOf};
}

function agreementColor(value) {
  if (value === UNKNOWN) return [140, 140, 140];
  const t = value / 250, low = [214, 64, 52], middle = [232, 190, 70], high = [38, 140, 110];
  const [from, to, part] = t < 0.5 ? [low, middle, 2 * t] : [middle, high, 2 * t - 1];
  return from.map((channel, i) => Math.round(channel + (to[i] - channel) * part));
}

async function showMap(view) {
  mapIndex ??= indexMap();
  if (CORE.images.clusterings.length) await loadClusterings();
  const canvas = el("canvas", {tabIndex: 0, ariaLabel: "Map of the images"});
  const legend = el("aside", {className: "legend"});
  const buttons = {};
  let colors = null, box = canvas.getBoundingClientRect(), queued = false, path = null, image = null;
  const choices = [["cluster", "cluster"], ["agreement", "agreement"],
    ...CORE.images.clusterings.map((name, i) => [`clustering-${i}`, `method ${name}`]),
    ...(COLUMNS.label ? [["label", "true label"]] : [])];

  function recolor() {
    const {of} = coloring();
    colors = new Uint32Array(CORE.counts.shown);
    const cached = new Map();
    for (const row of mapIndex.sorted) {
      let color;
      if (map.by === "agreement") color = agreementColor(COLUMNS.agreement[row]);
      else {
        const number = of(row);
        if (!cached.has(number)) cached.set(number, colorOf(number));
        color = cached.get(number);
        if (map.only !== null && number !== map.only) color = null;
      }
      colors[row] = color ? ((255 << 24) | (color[2] << 16) | (color[1] << 8) | color[0]) >>> 0 : 0;
    }
    drawLegend();
    draw();
  }

  function drawLegend() {
    if (map.by === "agreement") {
      legend.replaceChildren(el("h3", {}, "Agreement"), el("div", {className: "ramp"}),
        el("p", {className: "soft ramp-ends"}, el("span", {}, "0%"), el("span", {}, "100% of the clusterings")));
      return;
    }
    const {of, name} = coloring();
    const entries = tally(mapIndex.sorted, of);
    legend.replaceChildren(el("h3", {}, choices.find(([key]) => key === map.by)[1]),
      ...entries.slice(0, MAX_LEGEND).map(([number, images]) => el("button", {
        className: "legend-entry", ariaPressed: String(map.only === number),
        onclick: () => { map.only = map.only === number ? null : number; recolor(); },
      }, dot(number), el("span", {className: "grow"}, name(number)), el("span", {className: "soft"}, images.toLocaleString("en")))));
  }

  // Places: 0..65535 in both directions fill the shorter side of the canvas at scale 1.
  const unit = () => (Math.min(canvas.width, canvas.height) / 65536) * map.scale;
  const toX = (row) => COLUMNS.x[row] * unit() + map.left;
  const toY = (row) => (65535 - COLUMNS.y[row]) * unit() + map.top;

  function draw() {
    if (queued) return;
    queued = true;
    requestAnimationFrame(() => { queued = false; drawNow(); });
  }

  function drawNow() {
    const {width, height} = canvas;
    if (!width || !height || !colors) return;
    const context = canvas.getContext("2d");
    if (image?.width !== width || image.height !== height) image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer).fill(0);
    const u = unit(), ratio = devicePixelRatio;
    const radius = Math.max(1, Math.round(ratio * Math.min(3.5, 1 + 0.6 * Math.sqrt(map.scale) * (mapIndex.sorted.length < 20000 ? 1.8 : 1))));
    const isDark = getComputedStyle(document.documentElement).getPropertyValue("--is-dark").trim() === "1";
    const faint = isDark ? 0xff3d3833 : 0xffdedbd8, ink = isDark ? 0xffffffff : 0xff000000;
    const put = (row, color, r) => {
      const x = Math.round(COLUMNS.x[row] * u + map.left), y = Math.round((65535 - COLUMNS.y[row]) * u + map.top);
      if (x < -r || y < -r || x >= width + r || y >= height + r) return;
      for (let dy = -r; dy <= r; dy++) {
        const line = y + dy;
        if (line < 0 || line >= height) continue;
        const half = r < 2 ? r : Math.round(Math.sqrt(r * r + 0.5 - dy * dy));
        for (let at = Math.max(0, x - half); at <= Math.min(width - 1, x + half); at++) pixels[line * width + at] = color;
      }
    };
    if (map.only !== null) for (const row of mapIndex.sorted) if (!colors[row]) put(row, faint, radius);
    for (const row of mapIndex.sorted) if (colors[row]) put(row, colors[row], radius);
    for (const row of selected) if (COLUMNS.on_map[row]) { put(row, ink, radius + 2); put(row, colors[row] || faint, radius); }
    context.putImageData(image, 0, 0);
    if (path) {
      context.beginPath();
      path.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.closePath();
      context.fillStyle = "rgb(90 110 240 / 18%)";
      context.strokeStyle = "rgb(90 110 240)";
      context.lineWidth = 2 * ratio;
      context.fill();
      context.stroke();
    }
  }

  function resize() {
    box = canvas.getBoundingClientRect();
    const width = Math.round(box.width * devicePixelRatio), height = Math.round(box.height * devicePixelRatio);
    if (!width || (width === canvas.width && height === canvas.height)) return;
    canvas.width = width;
    canvas.height = height;
    home();
  }

  function home() {
    map.scale = 1;
    map.left = (canvas.width - Math.min(canvas.width, canvas.height)) / 2;
    map.top = (canvas.height - Math.min(canvas.width, canvas.height)) / 2;
    draw();
  }

  function zoom(factor, x, y) {
    const next = Math.min(200, Math.max(0.5, map.scale * factor)), ratio = next / map.scale;
    map.left = x - (x - map.left) * ratio;
    map.top = y - (y - map.top) * ratio;
    map.scale = next;
    draw();
  }

  /** The dot nearest to a place on the canvas, if one is near. */
  function under(x, y) {
    const u = unit(), reach = 10 * devicePixelRatio;
    const cellOf = (value) => Math.min(MAP_CELLS - 1, Math.max(0, Math.floor(value / 256)));
    const x0 = cellOf((x - reach - map.left) / u), x1 = cellOf((x + reach - map.left) / u);
    const y0 = cellOf(65535 - (y + reach - map.top) / u), y1 = cellOf(65535 - (y - reach - map.top) / u);
    let best = null, nearest = reach * reach;
    for (let line = y0; line <= y1; line++) {
      for (let i = mapIndex.starts[line * MAP_CELLS + x0]; i < mapIndex.starts[line * MAP_CELLS + x1 + 1]; i++) {
        const row = mapIndex.sorted[i];
        const distance = (toX(row) - x) ** 2 + (toY(row) - y) ** 2;
        if (distance < nearest && (map.only === null || colors[row])) [best, nearest] = [row, distance];
      }
    }
    return best;
  }

  function selectWithin(polygon) {
    for (const row of mapIndex.sorted) {
      if (map.only !== null && !colors[row]) continue;
      const x = toX(row), y = toY(row);
      let inside = false;
      for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
        const [xi, yi] = polygon[i], [xj, yj] = polygon[j];
        if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) inside = !inside;
      }
      if (inside) selected.add(row);
    }
    selectionChanged();
  }

  const pointers = new Map();
  const place = (event) => [(event.clientX - box.left) * devicePixelRatio, (event.clientY - box.top) * devicePixelRatio];
  let moved = 0;
  canvas.addEventListener("pointerdown", (event) => {
    box = canvas.getBoundingClientRect();
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, place(event));
    moved = 0;
    if (pointers.size === 1 && (map.lasso || event.shiftKey)) path = [place(event)];
    else path = null;
  });
  canvas.addEventListener("pointermove", (event) => {
    box = canvas.getBoundingClientRect();
    const at = place(event), before = pointers.get(event.pointerId);
    if (!before) { hover(event, under(...at)); return; }
    moved += Math.hypot(at[0] - before[0], at[1] - before[1]);
    // Browsers join the moves of a frame to one event.
    if (path) path.push(...(event.getCoalescedEvents().length ? event.getCoalescedEvents() : [event]).map(place));
    else if (pointers.size === 2) {
      const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
      zoom(Math.hypot(at[0] - other[0], at[1] - other[1]) / (Math.hypot(before[0] - other[0], before[1] - other[1]) || 1), ...other);
    } else {
      map.left += at[0] - before[0];
      map.top += at[1] - before[1];
    }
    pointers.set(event.pointerId, at);
    draw();
  });
  const release = (event) => {
    if (!pointers.delete(event.pointerId)) return;
    const polygon = path;
    path = null;
    if (polygon && polygon.length > 2 && moved > 10) selectWithin(polygon);
    else if (moved < 5 && event.type === "pointerup") {
      const row = under(...place(event));
      if (row !== null) {
        if (!event.ctrlKey && !event.metaKey) selected.clear();
        selected.add(row);
        selectionChanged();
        hover(event, row);
      } else if (selected.size) clearSelection();
    }
    draw();
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => hover(null, null));
  canvas.addEventListener("dblclick", (event) => { const row = under(...place(event)); if (row !== null) openViewer(row, [row]); });
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(Math.exp(-event.deltaY / 300), ...place(event)); }, {passive: false});

  buttons.lasso = el("button", {ariaPressed: String(map.lasso), onclick: () => {
    map.lasso = !map.lasso;
    buttons.lasso.ariaPressed = String(map.lasso);
    canvas.classList.toggle("lasso", map.lasso);
  }}, "Lasso");
  canvas.classList.toggle("lasso", map.lasso);
  const onMap = mapIndex.sorted.length;
  view.append(
    el("div", {className: "controls"},
      el("label", {}, "Colour by ", el("select", {name: "color", onchange: (event) => { map.by = event.target.value; map.only = null; recolor(); }},
        ...choices.map(([key, text]) => el("option", {value: key, selected: key === map.by}, text)))),
      buttons.lasso,
      el("button", {ariaLabel: "Zoom in", onclick: () => zoom(1.6, canvas.width / 2, canvas.height / 2)}, "+"),
      el("button", {ariaLabel: "Zoom out", onclick: () => zoom(1 / 1.6, canvas.width / 2, canvas.height / 2)}, "−"),
      el("button", {onclick: home}, "Whole map"),
      el("span", {className: "soft grow"}, `${count(onMap, "image")}, laid out by ${CORE.images.map === "umap" ? "UMAP" : "their first two principal components"}. `
        + "Drag to move, scroll to zoom, click or lasso to select, double-click to open.")),
    el("div", {className: "map"}, canvas, legend));
  const watcher = new ResizeObserver(resize);
  watcher.observe(canvas);
  const gone = new AbortController();
  document.addEventListener("selected", draw, {signal: gone.signal});
  document.addEventListener("themed", draw, {signal: gone.signal});
  document.addEventListener("shown", () => {
    if (canvas.isConnected) { resize(); return; }
    watcher.disconnect();
    gone.abort();
  }, {signal: gone.signal});
  recolor();
}

/** The picture of the image under the pointer, beside it. */
async function hover(event, row) {
  const card = document.getElementById("hover");
  if (row === null) {
    card.hidden = true;
    delete card.dataset.row;
    return;
  }
  if (card.dataset.row !== String(row)) {
    card.dataset.row = row;
    const picture = el("div", {className: "picture"});
    if (COLUMNS.has_picture[row]) paint(picture, row);
    const name = el("span");
    card.replaceChildren(...(COLUMNS.has_picture[row] ? [picture] : []), name,
      el("span", {className: "soft"}, `${nameOf(now[row])}, ${percent(share(COLUMNS.agreement[row]))}`));
    details(row).then(({uri}) => (name.textContent = baseName(uri)));
  }
  card.hidden = false;
  const {width, height} = card.getBoundingClientRect();
  card.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 4))}px`;
  card.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - height - 4))}px`;
}
