// The wall of clusters, and the page of one cluster.

const EXEMPLARS_ON_WALL = 8;
const wall = {order: "size", text: ""};

const WALL_ORDERS = {
  size: ["largest first", (a, b) => b.size - a.size],
  agreement: ["lowest agreement first", (a, b) => (a.agreement ?? 2) - (b.agreement ?? 2)],
  outliers: ["most outliers first", (a, b) => b.outliers - a.outliers],
  number: ["by number", (a, b) => a.cluster - b.cluster],
};

function showWall(view) {
  const cards = el("div", {className: "wall"});
  const fillIn = () => {
    const text = wall.text.toLowerCase();
    const shown = clusterNumbers().map((cluster) => ({cluster, ...figures(cluster)}))
      .filter(({cluster}) => !text || nameOf(cluster).toLowerCase().includes(text))
      .sort((a, b) => WALL_ORDERS[wall.order][1](a, b) || a.cluster - b.cluster);
    if (members.get(NOISE).length && "noise".includes(text)) shown.push({cluster: NOISE, ...figures(NOISE)});
    cards.replaceChildren(...shown.map(card));
    if (!shown.length) cards.append(el("p", {className: "soft"}, "No cluster has such a name."));
  };
  view.append(
    summaryTiles(),
    changesNote(),
    el("div", {className: "controls"},
      el("label", {}, "Order ", el("select", {name: "wall-order", onchange: (event) => { wall.order = event.target.value; fillIn(); }},
        ...Object.entries(WALL_ORDERS).map(([key, [text]]) => el("option", {value: key, selected: key === wall.order}, text)))),
      el("input", {type: "search", name: "cluster-name", placeholder: "Find a cluster", ariaLabel: "Find a cluster", value: wall.text,
        oninput: (event) => { wall.text = event.target.value; fillIn(); }}),
      el("span", {className: "soft grow"}, sampleNote())),
    cards);
  fillIn();
}

/** What became of a cluster since the run whose numbers this one keeps: words, or none. */
function changeOf(cluster) {
  const {new: added = [], split = [], merged = [], renumbered = []} = CORE.changes ?? {};
  return [
    ...(added.includes(cluster) ? ["new"] : []),
    ...split.filter(([number]) => number === cluster).map(([, old]) => `split off from ${old}`),
    ...merged.filter(([, number]) => number === cluster).map(([old]) => `took in ${old}`),
    ...renumbered.filter(([, number]) => number === cluster).map(([old]) => `was ${old}`),
  ].join(", ");
}

/** What changed in all clusters, with links to those that are here; nothing if no run came before. */
function changesNote() {
  if (!CORE.changes) return "";
  const {num_kept: kept, gone, run} = CORE.changes;
  const changed = [...BASE.keys()].filter(changeOf).sort((a, b) => a - b);
  return el("p", {className: "soft changes"},
    `Since the run ${run}: ${count(kept, "cluster keeps its number", "clusters keep their numbers")}`,
    ...changed.flatMap((cluster) => [", ", clusterLink(cluster), ` ${changeOf(cluster)}`]),
    gone.length ? `, gone: ${gone.join(", ")}` : "");
}

function sampleNote() {
  const {assigned, shown} = CORE.counts;
  return shown < assigned
    ? `The page shows ${shown.toLocaleString("en")} of ${count(assigned, "image")}: a uniform sample of each large cluster.`
    : "";
}

function card({cluster, size, agreement}) {
  const rows = members.get(cluster);
  return el("article", {className: "card"},
    el("a", {className: "card-head", href: cluster === NOISE ? "#noise" : `#cluster/${cluster}`},
      dot(cluster), el("strong", {}, nameOf(cluster)), el("span", {className: "soft"}, [count(size, "image"), changeOf(cluster)].filter(Boolean).join(", ")),
      el("span", {className: "soft end", title: "mean share of the clusterings that agree with an image's cluster"}, agreement == null ? "" : `${percent(agreement)} agreement`),
      meter(agreement, "agreement")),
    el("div", {className: "row8"}, ...rows.slice(0, EXEMPLARS_ON_WALL).map((row) => tile(row, rows))));
}

function summaryTiles() {
  const {scores, counts} = CORE;
  const one = (value, name, title = "") => el("div", {className: "figure", title}, el("b", {}, value), el("span", {}, name));
  const estimate = scores.estimate;
  return el("section", {className: "figures"},
    one(counts.assigned.toLocaleString("en"), counts.assigned === 1 ? "image" : "images"),
    one(clusterNumbers().length.toLocaleString("en"), "clusters"),
    one(percent(scores.agreement), "agreement", "mean share of the clusterings that agree with an image's cluster"),
    estimate ? one(`≈ ${percent(estimate)}`, "estimated accuracy", "made without labels; it was within 9 points on seven of nine real sets, 17 to 22 too high on the others") : null,
    one(scores.anmi.toFixed(3), "ANMI", "mean normalised mutual information of the consensus with each clustering"),
    ...scores.true.slice(0, 1).map(([name, value]) => one(percent(value, 1), `${name}, true labels`)),
    one(counts.outliers.toLocaleString("en"), "outliers"),
    counts.noise ? one(counts.noise.toLocaleString("en"), "noise", "images without a cluster") : null,
    one(counts.errors.toLocaleString("en"), "errors"));
}

function showCluster(view, argument) {
  const [number, second] = argument.split("/");
  const cluster = resolve(Number(number));
  const rows = members.get(cluster);
  if (!rows) {
    view.append(el("p", {}, `There is no cluster ${number} with images.`));
    return;
  }
  const {size, agreement, probability, outliers} = figures(cluster);
  const others = clusterNumbers().filter((other) => other !== cluster);
  const confused = CORE.confusion.filter(([one, , part]) => one === cluster && part >= 0.005).slice(0, 3);
  view.append(
    el("a", {href: "#clusters", className: "back"}, "‹ All clusters"),
    el("div", {className: "heading"},
      dot(cluster),
      el("input", {className: "name-input", value: edits.names[cluster] ?? "", placeholder: `Cluster ${cluster}`, ariaLabel: "Name of the cluster",
        maxLength: 200, onchange: (event) => rename(cluster, event.target.value)}),
      el("select", {ariaLabel: "Merge into", onchange: (event) => { const into = Number(event.target.value); merge(cluster, into); go(`cluster/${into}`); }},
        el("option", {value: "", disabled: true, selected: true}, "Merge into …"),
        ...others.map((other) => el("option", {value: other}, nameOf(other))))),
    el("p", {className: "soft"},
      `${count(size, "image")}${rows.length < size ? `, ${rows.length.toLocaleString("en")} of them here: a uniform sample` : ""}; `
      + `${changeOf(cluster) && `${changeOf(cluster)}; `}agreement ${percent(agreement)}, consensus probability ${percent(probability)}, ${count(outliers, "outlier")}`,
      ...(confused.length ? ["; most confused with ", ...confused.flatMap(([, other, part], i) => [
        i ? ", " : "", el("a", {href: `#cluster/${cluster}/${other}`}, `${nameOf(other)} (${percent(part)})`)])] : [])),
    second === undefined ? grid(rows) : grid(rows, {order: "probability", filters: {second}}));
}
