// Which view is shown: it follows the address after #, so that links and the back button work.

const VIEWS = {
  clusters: ["Clusters", showWall],
  map: ["Map", showMap],
  uncertain: ["Least certain", showLeastCertain],
  outliers: ["Outliers", showOutliers],
  noise: ["Noise", showNoise],
  duplicates: ["Near-duplicates", showDuplicates],
  confusion: ["Confusion", showConfusion],
  hierarchy: ["Hierarchy", showHierarchy],
  methods: ["Methods", showMethods],
  plots: ["Plots", showPlots],
  errors: ["Errors", showErrors],
  corrections: ["Corrections", showEdits],
  run: ["Run", showRun],
  cluster: [null, showCluster],
  search: [null, showSearch],
  similar: [null, showSimilar],
  selected: [null, showSelected],
};

function go(place) {
  document.getElementById("viewer").close();
  if (location.hash === `#${place}`) show();
  else location.hash = place;
}

async function show() {
  const [name, ...rest] = location.hash.slice(1).split("/");
  const key = name in VIEWS ? name : "clusters";
  document.getElementById("hover").hidden = true;
  for (const link of document.querySelectorAll("#tabs a")) {
    link.toggleAttribute("aria-current", link.hash === `#${key === "cluster" ? "clusters" : key}`);
  }
  const made = el("div"), place = location.hash;
  try {
    const about = decodeURIComponent(rest.join("/"));
    document.getElementById("search").elements.text.value = key === "search" ? about : "";
    await VIEWS[key][1](made, about);
  } catch (error) {
    made.append(el("p", {className: "problem", role: "alert"}, error.message));
  }
  if (location.hash !== place) return;  // another view was opened while this one was loading
  document.getElementById("view").replaceChildren(made);
  document.querySelector("#tabs [aria-current]")?.scrollIntoView({block: "nearest", inline: "center"});
  document.body.dataset.view = location.hash.slice(1);
  document.dispatchEvent(new Event("shown"));
}

function drawTabs() {
  const numbers = {outliers: CORE.counts.outliers, noise: figures(NOISE).size, duplicates: CORE.duplicates.length, errors: CORE.counts.errors, corrections: numEdits()};
  const isEmpty = {noise: !numbers.noise, methods: !CORE.methods.rows.length};
  document.getElementById("tabs").replaceChildren(...Object.entries(VIEWS).filter(([key, [text]]) => text && !isEmpty[key]).map(
    ([key, [text]]) => el("a", {href: `#${key}`}, text, numbers[key] ? el("small", {}, numbers[key].toLocaleString("en")) : null)));
}

function switchTheme() {
  const isDark = getComputedStyle(document.documentElement).colorScheme === "dark"
    || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = isDark ? "light" : "dark";
  document.dispatchEvent(new Event("themed"));
}

async function start() {
  document.title = CORE.title;
  document.getElementById("title").textContent = CORE.title;
  document.getElementById("theme").addEventListener("click", switchTheme);
  document.getElementById("search").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = event.target.elements.text.value.trim();
    go(text ? `search/${encodeURIComponent(text)}` : "clusters");
  });
  try {
    await loadColumns();
  } catch (error) {
    document.getElementById("view").append(el("p", {className: "problem", role: "alert"}, error.message));
    return;
  }
  loadEdits();
  drawTabs();
  addEventListener("hashchange", () => { scrollTo(0, 0); show(); });
  document.addEventListener("edited", () => {
    drawTabs();
    show();
    if (document.getElementById("viewer").open) showViewed();
  });
  await show();
  document.documentElement.dataset.ready = "true";
}

start();
