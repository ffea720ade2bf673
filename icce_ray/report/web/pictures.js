// Elements, and thumbnails that are cut from sheets and loaded when they come into view.

/** An element. Text is always set as text: no name of a file or cluster can become markup. */
function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const percent = (value, digits = 0) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)}%`);
const count = (value, one, many = `${one}s`) => `${value.toLocaleString("en")} ${value === 1 ? one : many}`;
const share = (value) => (value === UNKNOWN ? null : value / 250);
const baseName = (uri) => uri.split("/").pop();

const sheetUrls = new Map();

/** The address of a sheet of thumbnails. */
function sheetUrl(number) {
  const name = `sheet-${String(number).padStart(5, "0")}`;
  if (CORE.folder !== null) return `${CORE.folder}/${name}.jpg`;
  if (!sheetUrls.has(name)) {
    const bytes = unpack(INLINE_SHEETS[name], "uint8");
    sheetUrls.set(name, URL.createObjectURL(new Blob([bytes], {type: "image/jpeg"})));
  }
  return sheetUrls.get(name);
}

/** Show the thumbnail of an image as the background of an element. */
function paint(element, row) {
  const {sheet_cells: cells, sheet_columns: columns} = CORE.images;
  const cell = row % cells, number = Math.floor(row / cells);
  const inSheet = Math.min(cells, CORE.counts.shown - number * cells);
  const rows = Math.ceil(inSheet / columns);
  element.style.backgroundImage = `url("${sheetUrl(number)}")`;
  element.style.backgroundSize = `${columns * 100}% ${rows * 100}%`;
  const x = (100 * (cell % columns)) / (columns - 1);
  const y = rows > 1 ? (100 * Math.floor(cell / columns)) / (rows - 1) : 0;
  element.style.backgroundPosition = `${x}% ${y}%`;
}

const comingIntoView = new IntersectionObserver((entries) => {
  for (const {isIntersecting, target} of entries) {
    if (!isIntersecting) continue;
    comingIntoView.unobserve(target);
    fill(target, Number(target.dataset.row));
  }
}, {rootMargin: "300px"});

async function fill(tile, row) {
  if (COLUMNS.has_picture[row]) paint(tile, row);
  try {
    const {uri} = await details(row);
    tile.setAttribute("aria-label", baseName(uri));
    tile.title = uri;
    if (!COLUMNS.has_picture[row]) tile.append(el("span", {className: "name"}, baseName(uri)));
  } catch (error) {
    tile.title = error.message;
  }
}

/** A thumbnail. A click opens the image; `rows` are those that the viewer goes through. */
function tile(row, rows, {selectable = false, caption = ""} = {}) {
  const picture = el("button", {
    className: COLUMNS.has_picture[row] ? "picture" : "picture empty",
    onclick: (event) => {
      if (selectable && (event.shiftKey || event.ctrlKey || event.metaKey)) selectRange(row, rows, event.shiftKey);
      else openViewer(row, rows);
    },
  });
  picture.dataset.row = row;
  comingIntoView.observe(picture);
  const figure = el("figure", {className: "tile"}, picture);
  figure.dataset.row = row;
  if (selectable) {
    const box = el("input", {
      type: "checkbox", checked: selected.has(row), ariaLabel: "Select",
      onclick: (event) => selectRange(row, rows, event.shiftKey),
    });
    figure.append(el("label", {className: "check"}, box));
    figure.classList.toggle("selected", selected.has(row));
  }
  if (caption) figure.append(el("figcaption", {}, caption));
  return figure;
}

/** The colour of a cluster or class: red, green, blue; grey for noise. Hues are spread by the golden angle. */
function colorOf(number) {
  if (number < 0) return [140, 140, 140];
  const hue = (number * 137.508) % 360, light = [0.52, 0.64, 0.42][Math.floor(number / 12) % 3], saturation = 0.62;
  const chroma = saturation * Math.min(light, 1 - light);
  return [0, 8, 4].map((offset) => {
    const k = (offset + hue / 30) % 12;
    return Math.round(255 * (light - chroma * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  });
}

function dot(number) {
  const element = el("span", {className: "dot"});
  element.style.background = `rgb(${colorOf(number).join(" ")})`;
  return element;
}

/** A bar that shows a share. */
function meter(value, title) {
  const bar = el("span", {className: "meter", title}, el("i"));
  bar.firstChild.style.width = percent(value ?? 0);
  return bar;
}
