// Lists of images to look at, and how the clusters relate to each other.

function page(view, heading, text, ...children) {
  view.append(el("h2", {}, heading), el("p", {className: "soft"}, text), ...children.filter((child) => child !== null));
}

function showLeastCertain(view) {
  page(view, "Least certain images", "The images on which the clusterings agree least: look here for what the clusters miss.",
    grid(CORE.least_certain, {caption: (row) => `${percent(share(COLUMNS.agreement[row]))}: ${now[row]} or ${COLUMNS.second[row]}`}));
}

function showOutliers(view) {
  const total = CORE.counts.outliers;
  page(view, "Outliers", `${count(total, "image")} far from the images that the classifier was trained on`
    + (total > CORE.outliers.length ? `; the farthest ${CORE.outliers.length} are here.` : "."),
    grid(CORE.outliers, {caption: (row) => COLUMNS.distance[row].toFixed(1)}));
}

function showDuplicates(view) {
  page(view, "Near-duplicates", CORE.duplicates.length
    ? "Groups of images that are almost the same, the largest first. Only the first image of a group was trained on."
    : "None were found.",
    ...CORE.duplicates.map((group) => el("div", {className: "strip boxed"},
      ...group.map((row) => tile(row, group, {selectable: true})))));
}

function showErrors(view) {
  const {errors} = CORE, total = CORE.counts.errors;
  page(view, "Errors", !total ? "None. Every image could be used."
    : `${count(total, "image")} could not be used${total > errors.length ? `; the first ${errors.length} are listed` : ""}.`,
    errors.length ? table(["id", "image", "reason"], errors) : null);
}

function table(head, rows) {
  return el("div", {className: "scroll"}, el("table", {},
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", {}, text)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(
      (cell) => el("td", {}, cell instanceof Node ? cell : String(cell))))))));
}

async function showSearch(view, text) {
  const found = await findPaths(text, 5000);
  page(view, `Images with “${text}” in their path`, sampleNote(), grid(found));
}

async function showSimilar(view, row) {
  const first = await details(Number(row));
  const found = new Set([Number(row), ...first.similar.map((one) => one.row)]);
  for (const {row: other} of first.similar) {
    for (const one of (await details(other)).similar) found.add(one.row);
  }
  page(view, "Similar images", `To ${first.uri}: its most similar images on the page, then those similar to them.`,
    grid([...found]));
}

function showSelected(view) {
  page(view, "Selected images", "", grid([...selected]));
}

const MAX_MATRIX = 40;

function showConfusion(view) {
  const numbers = clusterNumbers();
  const pairs = new Map();
  for (const [one, other, part] of CORE.confusion) {
    const key = [resolve(one), resolve(other)];
    if (key[0] !== key[1]) pairs.set(key.join(), Math.max(part, pairs.get(key.join()) ?? 0));
  }
  const listed = [...pairs].map(([key, part]) => [...key.split(",").map(Number), part]).sort((a, b) => b[2] - a[2]);
  page(view, "Confusion between clusters",
    "The share of the votes in a cluster (row) that went to another (column). A click shows the images that the other would take.");
  if (numbers.length <= MAX_MATRIX) {
    const parts = numbers.map((one) => numbers.map((other) => pairs.get(`${one},${other}`) ?? 0));
    const link = (part, i, j) => (part < 0.005 ? "" : el("a", {
      href: `#cluster/${numbers[i]}/${numbers[j]}`, title: `${nameOf(numbers[i])} → ${nameOf(numbers[j])}: ${percent(part, 1)}`,
    }, percent(part)));
    view.append(matrix(numbers.map(clusterLink), numbers.map(String), parts, link, Math.max(0.01, ...pairs.values())));
  }
  view.append(el("h3", {}, "Most confused"), table(["cluster", "goes to", "share of votes"], listed.slice(0, 30).map(
    ([one, other, part]) => [clusterLink(one), el("a", {href: `#cluster/${one}/${other}`}, nameOf(other)), percent(part, 1)])));
  if (COLUMNS.label) view.append(el("h3", {}, "Clusters and true labels"), labelTable(numbers));
}

function labelTable(numbers) {
  const rows = numbers.map((cluster) => {
    const found = tally(members.get(cluster), (row) => COLUMNS.label[row]);
    const total = members.get(cluster).length || 1;
    const text = found.slice(0, 4).map(([label, number]) => `${CORE.images.labels[label] ?? "none"} ${percent(number / total)}`);
    return [clusterLink(cluster), text.join(", ")];
  });
  return table(["cluster", "true labels of its images"], rows);
}

let numGroups = null;

/** The clusters in each of `number` groups, by the merges of the hierarchy, and the similarity of the next merge. */
function cutTree(number) {
  const {left, right, similarity} = CORE.tree;
  const groups = new Map();
  for (let cluster = 0; cluster <= left.length; cluster++) groups.set(cluster, BASE.get(cluster).size ? [cluster] : []);
  const filled = () => [...groups.values()].filter((group) => group.length);
  let step = 0;
  for (; step < left.length && filled().length > number; step++) {
    groups.set(left.length + 1 + step, [...groups.get(left[step]), ...groups.get(right[step])]);
    groups.delete(left[step]);
    groups.delete(right[step]);
  }
  return {groups: filled(), next: similarity[step]};
}

function showHierarchy(view) {
  const most = CORE.clusters.filter((cluster) => cluster.size).length;
  numGroups = Math.min(numGroups ?? Math.max(1, Math.ceil(most / 2)), most);
  const area = el("div", {className: "wall"});
  const status = el("strong");
  const fillIn = () => {
    status.textContent = count(numGroups, "group");
    const {groups: cut, next} = cutTree(numGroups);
    note.textContent = next === undefined || numGroups === 1 ? "" : `The next merge joins clusters that share ${percent(next)} of their votes.`;
    const groups = cut.map((group) => [...new Set(group.map(resolve))].filter((cluster) => members.has(cluster)))
      .filter((group) => group.length);
    const size = (group) => group.reduce((sum, cluster) => sum + figures(cluster).size, 0);
    groups.sort((a, b) => size(b) - size(a));
    area.replaceChildren(...groups.map((group) => el("article", {className: "card"},
      el("div", {className: "card-head"}, el("strong", {}, count(size(group), "image")), el("span", {className: "soft"}, count(group.length, "cluster"))),
      ...group.slice(0, 12).map((cluster) => el("div", {className: "branch"}, clusterLink(cluster),
        el("div", {className: "row8"}, ...members.get(cluster).slice(0, 8).map((row) => tile(row, members.get(cluster))))))))); 
  };
  const note = el("span", {className: "soft grow"});
  page(view, "Hierarchy", "The clusters that the clusterings confuse most are joined first. Cut the tree where you like the groups.",
    el("div", {className: "controls"},
      el("input", {type: "range", name: "cut", min: 1, max: most, value: numGroups, ariaLabel: "Number of groups",
        oninput: (event) => { numGroups = Number(event.target.value); fillIn(); }}),
      status, note,
      el("button", {onclick: () => {
        for (const group of cutTree(numGroups).groups) {
          const [first, ...rest] = [...new Set(group.map(resolve))].filter((cluster) => members.has(cluster));
          for (const other of rest) edits.merged[other] = first;
        }
        edited();
      }}, "Merge these groups")),
    area);
  fillIn();
}

function showPlots(view) {
  const tree = drawTree(CORE.tree, nameOf, (cluster) => !BASE.get(cluster).size);
  page(view, "Plots", CORE.choice ?? "", el("div", {className: "plots"}, ...CORE.plots.map(drawPlot), ...(tree ? [tree] : [])));
}

function showRun(view) {
  const {run, scores} = CORE;
  const scoreTable = (rows) => table(["score", "value"], rows.map(([name, value]) => [name, value.toFixed(3)]));
  page(view, "Run", `${CORE.source} → ${CORE.output}`,
    el("h3", {}, "Scores without labels"), scoreTable([["ANMI", scores.anmi], ...scores.label_free]),
    scores.true.length ? el("h3", {}, "Scores against the true labels") : null,
    scores.true.length ? scoreTable(scores.true) : null,
    el("h3", {}, "Consensus"),
    table(["consensus function", "ANMI"], [
      ...run.consensus.map(([name, anmi]) => [`${name}${name === run.chosen ? " (chosen)" : ""}`, anmi.toFixed(4)]),
      ...run.skipped.map(([name, reason]) => [name, `not tried: ${reason}`])]),
    el("p", {className: "soft"}, `Classifier: learning rate ${run.classifier.learning_rate}; it agrees with the consensus on `
      + `${percent(run.classifier.holdout_agreement, 1)} of ${count(run.classifier.num_holdout, "held-out image")}; calibration error ${run.classifier.ece.toFixed(3)}.`),
    el("h3", {}, `Time: ${run.total}`), table(["stage", "time"], run.seconds),
    el("details", {}, el("summary", {}, "Settings"), el("pre", {}, run.settings)),
    el("details", {}, el("summary", {}, "Versions"), el("pre", {}, run.libraries.map((pair) => pair.join(" ")).join("\n"))));
}
