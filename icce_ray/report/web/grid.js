// Many images, page by page, with an order, filters and a selection.

const PAGE_SIZE = 120;
const selected = new Set();
let lastSelected = null;

const ORDERS = {
  given: ["as listed", null],
  agreement: ["agreement, lowest first", (a, b) => COLUMNS.agreement[a] - COLUMNS.agreement[b]],
  falling: ["agreement, highest first", (a, b) => voted(b) - voted(a)],
  probability: ["what another cluster would take", (a, b) => COLUMNS.probability[a] - COLUMNS.probability[b]],
  far: ["distance, farthest first", (a, b) => COLUMNS.distance[b] - COLUMNS.distance[a]],
  near: ["distance, nearest first", (a, b) => COLUMNS.distance[a] - COLUMNS.distance[b]],
};
const voted = (row) => (COLUMNS.agreement[row] === UNKNOWN ? -1 : COLUMNS.agreement[row]);

const CAPTIONS = {
  agreement: (row) => percent(share(COLUMNS.agreement[row])),
  falling: (row) => percent(share(COLUMNS.agreement[row])),
  probability: (row) => `${percent(share(COLUMNS.probability[row]))} → ${COLUMNS.second[row]}`,
  far: (row) => COLUMNS.distance[row].toFixed(1),
  near: (row) => COLUMNS.distance[row].toFixed(1),
};

/** Images with controls. `order` is the first order; `filters` are the first filters. */
function grid(rows, {order = "given", filters = {}, caption = null} = {}) {
  const state = {order, page: 0, second: "", label: "", most: 100, outliers: false, ...filters};
  const area = el("div", {className: "tiles"});
  const pages = el("nav", {className: "pages", ariaLabel: "Pages"});
  const status = el("span", {className: "soft grow", role: "status"});
  let kept = rows;

  const pageRows = () => kept.slice(state.page * PAGE_SIZE, (state.page + 1) * PAGE_SIZE);

  function update() {
    kept = rows.filter((row) => (state.second === "" || COLUMNS.second[row] === Number(state.second))
      && (state.label === "" || COLUMNS.label[row] === Number(state.label))
      && (state.most === 100 || voted(row) <= 2.5 * state.most)
      && (!state.outliers || COLUMNS.outlier[row]));
    const compare = ORDERS[state.order][1];
    if (compare) kept = [...kept].sort((a, b) => compare(a, b) || a - b);
    state.page = 0;
    status.textContent = kept.length === rows.length
      ? count(rows.length, "image") : `${kept.length.toLocaleString("en")} of ${count(rows.length, "image")}`;
    show();
  }

  function show() {
    const say = CAPTIONS[state.order] ?? caption ?? (() => "");
    area.replaceChildren(...pageRows().map(
      (row) => tile(row, kept, {selectable: true, caption: say(row)})));
    if (!kept.length) area.append(el("p", {className: "soft"}, "No images."));
    const last = Math.max(0, Math.ceil(kept.length / PAGE_SIZE) - 1);
    const turn = (page) => { state.page = page; show(); area.scrollIntoView({block: "nearest"}); };
    pages.hidden = last === 0;
    pages.replaceChildren(
      el("button", {onclick: () => turn(state.page - 1), disabled: state.page === 0}, "Previous"),
      el("span", {}, `page ${state.page + 1} of ${last + 1}`),
      el("button", {onclick: () => turn(state.page + 1), disabled: state.page === last}, "Next"));
  }

  const choose = (name, title, options) => el("label", {}, title, " ", el("select", {
    name, onchange: (event) => { state[name] = event.target.value; update(); },
  }, ...options.map(([value, text]) => el("option", {value, selected: String(value) === String(state[name])}, text))));
  const seconds = tally(rows, (row) => COLUMNS.second[row]).filter(([second]) => second >= 0);
  const controls = el("div", {className: "controls"},
    choose("order", "Sort by", Object.entries(ORDERS).map(([key, [text]]) => [key, text])),
    status,
    el("button", {onclick: () => { pageRows().forEach((row) => selected.add(row)); selectionChanged(); }}, "Select page"),
    el("button", {onclick: () => { kept.forEach((row) => selected.add(row)); selectionChanged(); }}, "Select all"));
  const isFiltered = Object.keys(filters).length > 0;
  const filterBox = el("details", {className: "filters", open: isFiltered}, el("summary", {}, "Filters"), el("div", {className: "controls"},
    choose("second", "Second choice", [["", "any"], ...seconds.slice(0, 50).map(
      ([second, number]) => [second, `${nameOf(second)} (${number})`])]),
    COLUMNS.label ? choose("label", "True label", [["", "any"], ...tally(rows, (row) => COLUMNS.label[row]).map(
      ([label, number]) => [label, `${CORE.images.labels[label] ?? "none"} (${number})`])]) : null,
    el("label", {}, "Agreement up to ", el("input", {
      type: "range", name: "most", min: 0, max: 100, step: 5, value: state.most,
      oninput: (event) => { state.most = Number(event.target.value); event.target.nextSibling.textContent = ` ${state.most}%`; update(); },
    }), el("output", {}, ` ${state.most}%`)),
    el("label", {}, el("input", {
      type: "checkbox", name: "outliers", checked: state.outliers,
      onchange: (event) => { state.outliers = event.target.checked; update(); },
    }), " outliers only")));
  update();
  return el("div", {className: "grid"}, controls, filterBox, area, pages);
}

/** How often each value of `of(row)` occurs among some rows, the most frequent first. */
function tally(rows, of) {
  const counts = new Map();
  for (const row of rows) counts.set(of(row), (counts.get(of(row)) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
}

/** Select an image or deselect it; with `isRange` all from the last one on. */
function selectRange(row, rows, isRange) {
  const adds = !selected.has(row);
  const from = isRange && lastSelected !== null ? rows.indexOf(lastSelected) : -1;
  const to = rows.indexOf(row);
  const range = from < 0 ? [row] : rows.slice(Math.min(from, to), Math.max(from, to) + 1);
  for (const one of range) adds ? selected.add(one) : selected.delete(one);
  lastSelected = row;
  selectionChanged();
}

function clearSelection() {
  selected.clear();
  selectionChanged();
}

function selectionChanged() {
  for (const figure of document.querySelectorAll("figure.tile")) {
    const isSelected = selected.has(Number(figure.dataset.row));
    figure.classList.toggle("selected", isSelected);
    const box = figure.querySelector("input");
    if (box) box.checked = isSelected;
  }
  const bar = document.getElementById("selection");
  bar.hidden = selected.size === 0;
  if (!bar.hidden) {
    const rows = [...selected];
    bar.replaceChildren(
      el("strong", {}, `${rows.length.toLocaleString("en")} selected`),
      moveMenu(rows),
      el("button", {onclick: async () => { const made = await splitOff(rows); clearSelection(); go(`cluster/${made}`); }}, "Split off"),
      el("button", {onclick: async () => { await move(rows, null); clearSelection(); }}, "Drop"),
      el("button", {onclick: () => go("selected")}, "Show"),
      el("button", {className: "quiet", onclick: clearSelection}, "Clear"));
  }
  document.dispatchEvent(new Event("selected"));
}

/** A menu that moves images to a cluster. */
function moveMenu(rows) {
  return el("select", {
    ariaLabel: "Move to", className: "move",
    onchange: async (event) => {
      const cluster = Number(event.target.value);
      await move(rows, cluster);
      if (rows.length > 1 || selected.has(rows[0])) clearSelection();
    },
  }, el("option", {value: "", disabled: true, selected: true}, "Move to …"),
  ...clusterNumbers().map((cluster) => el("option", {value: cluster}, nameOf(cluster))));
}
