"use strict";

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const [rows, columns] = data.grid;
const patches = rows * columns;
const LABELS_SHARE = 2 / 3; // of the opacity: labels cover the whole picture
const SHEET_COLUMNS = 6;
const LIKES_SHOWN = 8; // where all layers are shown together
const TILE_PX = 192; // longer side of the small pictures, of which there may be hundreds
const state = { view: "pictures", picture: 0, layer: null }; // layer: its place, null for the best of all
const look = { threshold: 0, opacity: 0.9, colours: "viridis" };
const shown = { entries: [], index: 0 }; // what the dialog shows; an entry is a cluster on a picture

/** Return a new element, such as "span.soft"; strings among its children become text, whatever they contain. */
function element(kind, attributes = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const made = document.createElement(tag);
  made.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function button(kind, attributes, onClick, ...children) {
  const made = element(kind, { type: "button", ...attributes }, ...children);
  made.addEventListener("click", onClick);
  return made;
}

/** Return a name that stands among other text: it keeps its own direction of writing, and is broken at slashes first. */
const named = (text) => element("bdi", {}, ...text.split(/(?<=\/)/).flatMap((part) => [part, element("wbr")]));

/** Return a function that makes things once for every set of arguments. */
function once(make) {
  const made = new Map();
  return (...key) => {
    const text = key.join("/");
    if (!made.has(text)) made.set(text, make(...key));
    return made.get(text);
  };
}

const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const colourBytes = once((name) => bytesOf(data.colours[name]));
const mapBytes = once((image) => bytesOf(data.images[image].maps));
const labelBytes = once((image) => bytesOf(data.images[image].labels));
const labelsOf = (image, layer) => labelBytes(image).subarray(layer * patches, (layer + 1) * patches);

// ---------------------------------------------------------------------------------------------- drawing

const decoded = once(async (image) => {
  const picture = Object.assign(new Image(), { src: data.images[image].src });
  await picture.decode();
  return picture;
});

/** Return a picture in grey, no side longer than `limit` pixels. */
const greyOf = once(async (image, limit) => {
  const picture = await decoded(image);
  const sides = [picture.naturalWidth, picture.naturalHeight];
  const [width, height] = sides.map((side) => Math.max(1, Math.round(side * Math.min(1, limit / Math.max(...sides)))));
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height).data;
  const values = new Float32Array(width * height);
  for (let at = 0; at < values.length; at++) values[at] = (pixels[4 * at] + pixels[4 * at + 1] + pixels[4 * at + 2]) / 3;
  return { width, height, values };
});

/** Return between which of `length` values each of `size` pixels lies, as PyTorch does with align_corners=False. */
const between = once((length, size) => {
  const found = { first: new Uint16Array(size), second: new Uint16Array(size), share: new Float64Array(size) };
  for (let pixel = 0; pixel < size; pixel++) {
    const place = Math.max(0, ((pixel + 0.5) * length) / size - 0.5);
    found.first[pixel] = Math.min(Math.floor(place), length - 1);
    found.second[pixel] = Math.min(found.first[pixel] + 1, length - 1);
    found.share[pixel] = place - found.first[pixel];
  }
  return found;
});

/** Draw a grey picture with a cluster's strength over it, as `overlay` of gift.explain.render does. */
function fillOverlay(target, { width, height, values }, { image, layer, cluster }) {
  const start = (layer * data.clusters.length + cluster) * patches;
  const strength = mapBytes(image).subarray(start, start + patches);
  const [table, across, down] = [colourBytes(look.colours), between(columns, width), between(rows, height)];
  const line = new Float64Array(columns);
  for (let y = 0, pixel = 0; y < height; y++) {
    const [upper, lower, share] = [down.first[y] * columns, down.second[y] * columns, down.share[y]];
    for (let x = 0; x < columns; x++) line[x] = (strength[upper + x] * (1 - share) + strength[lower + x] * share) / 255;
    for (let x = 0; x < width; x++, pixel++) {
      const value = line[across.first[x]] * (1 - across.share[x]) + line[across.second[x]] * across.share[x];
      const alpha = value >= look.threshold ? look.opacity * value : 0;
      const colour = 3 * Math.min(255, Math.floor(256 * value));
      const grey = (1 - alpha) * values[pixel];
      target[4 * pixel] = grey + alpha * table[colour];
      target[4 * pixel + 1] = grey + alpha * table[colour + 1];
      target[4 * pixel + 2] = grey + alpha * table[colour + 2];
      target[4 * pixel + 3] = 255;
    }
  }
}

/** Draw a grey picture under the colours of its labels. */
function fillLabels(target, { width, height, values }, { image, layer }) {
  const labels = labelsOf(image, layer);
  const palette = data.layers[layer].palette.map((text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)));
  const alpha = look.opacity * LABELS_SHARE;
  for (let y = 0, pixel = 0; y < height; y++) {
    const row = Math.floor((y * rows) / height) * columns;
    for (let x = 0; x < width; x++, pixel++) {
      const colour = palette[labels[row + Math.floor((x * columns) / width)]];
      for (let part = 0; part < 3; part++) target[4 * pixel + part] = (1 - alpha) * values[pixel] + alpha * colour[part];
      target[4 * pixel + 3] = 255;
    }
  }
}

const paintings = new WeakMap(); // of every canvas: what it shows
const visible = new Set();
const scratch = once((width, height) => new ImageData(width, height));

async function draw(canvas) {
  const { fill, entry, limit } = paintings.get(canvas);
  const grey = await greyOf(entry.image, limit);
  const pixels = scratch(grey.width, grey.height);
  fill(pixels.data, grey, entry);
  if (canvas.width !== grey.width || canvas.height !== grey.height) Object.assign(canvas, { width: grey.width, height: grey.height });
  canvas.getContext("2d", { willReadFrequently: true }).putImageData(pixels, 0, 0);
  canvas.dataset.drawn = "true";
}

/** Canvases are drawn when they come into view. */
function onSight(changes) {
  for (const { target, isIntersecting } of changes) {
    visible[isIntersecting ? "add" : "delete"](target);
    if (isIntersecting) draw(target);
  }
}
const watcher = new IntersectionObserver(onSight, { rootMargin: "150px" });

let frame = 0;
/** Draw all that is visible again, once before the next frame. */
function redraw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    visible.forEach(draw);
  });
}

function canvasOf(fill, entry, description, limit = Infinity) {
  const canvas = element("canvas", { role: "img", "aria-label": description, width: 1, height: 1 });
  paintings.set(canvas, { fill, entry, limit });
  watcher.observe(canvas);
  return canvas;
}

/** Return the overlay of a cluster on a picture, with its strongest patch outlined where that is known. */
function overlayOf(entry, limit) {
  const description = `Heatmap of ${titleText(entry)} over ${data.images[entry.image].name}`;
  const made = element("span.frame", {}, canvasOf(fillOverlay, entry, description, limit));
  if (entry.row === undefined) return made;
  const sides = { left: entry.column / columns, top: entry.row / rows, width: 1 / columns, height: 1 / rows };
  const patch = made.appendChild(element("span.patch"));
  for (const [side, share] of Object.entries(sides)) patch.style[side] = `${100 * share}%`;
  return made;
}

// ------------------------------------------------------------------------------------------------ words

const percent = (share) => (share > 0 && share < 0.005 ? "< 1 %" : `${Math.round(100 * share)} %`);
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(1)}`;
const layerName = (place) => `L${data.layers[place].number}`;
const layerText = (place) => `${layerName(place)} · ${data.layers[place].name}`;
const refOf = ({ layer, cluster }) => `${layerName(layer)}/C${data.clusters[cluster]}`;

/** Return what to call a label: the name that people gave it, if any, and the label. */
const labelNodes = (label) => (Object.hasOwn(data.names, label) ? [named(data.names[label]), ` (${label})`] : [label]);
const titleNodes = (entry) => labelNodes(refOf(entry));
const titleText = (entry) => element("span", {}, ...titleNodes(entry)).textContent;

/** Return the word of the first limit that is not above the value; the last word has none. */
const wordFor = (value, ...words) => words.find(([, limit]) => limit === undefined || value >= limit)[0];

/** Return why a cluster is listed: words, and the figure behind them. */
function reasonsOf({ image, criteria: { concentration, contrast, agreement } }) {
  const usual = wordFor(agreement, ["more than usual for ", 0.3], ["as usual for ", -0.3], ["less than usual for "]);
  return [
    [[wordFor(concentration, ["concentrated", 0.5], ["fairly concentrated", 0.3], ["spread out"])],
      `${percent(concentration)} of its strength lies in a tenth of the patches`],
    [[wordFor(contrast, ["stands out strongly", 3], ["stands out", 1.5], ["hardly stands out"])],
      `its peak lies ${contrast.toFixed(1)} standard deviations above its mean here`],
    [[usual, named(data.images[image].with[0][0])],
      `its strength in pictures predicted so lies ${signed(agreement)} standard deviations from its mean over all pictures`],
  ];
}

const isNoBetter = (part) => part.chance !== null && part.iou <= part.chance;

/** Return of which parts a cluster is the best map, as `gift score` found. */
function partFlags(entry) {
  const learned = (data.scores?.rows ?? []).filter((row) => row.maps === "learned");
  return learned.flatMap((row) => row.parts.filter((part) => part.map === refOf(entry)).map((part) => {
    const reading = row.reading && row.reading !== data.reading ? `, read as ${row.reading}` : "";
    const [kind, warning] = isNoBetter(part) ? ["span.flag.poor", ": no better than random clusters"] : ["span.flag", ""];
    return element(kind, {}, "best map of ", named(part.part), ` (IoU ${part.iou.toFixed(2)}${reading})${warning}`);
  }));
}

/** Return a number from 0 to 1 with a bar. */
function measure(share, text) {
  const track = element("span.track");
  track.style.setProperty("--share", share);
  return element("span.measure", {}, track, element("span.number", {}, text));
}

const scoreOf = ({ score }) => measure(score, score.toFixed(2));

// --------------------------------------------------------------------------------------- view: pictures

function rankedOf(image) {
  const { best, ranked } = data.images[image];
  const all = state.layer === null ? best : ranked[state.layer].map((one) => [state.layer, ...one]);
  return all.map(([layer, cluster, score, criteria]) => ({ image, layer, cluster, score, criteria }));
}

function buildStrip() {
  const thumbnails = data.images.map(({ src, name }, picture) => button("button", { title: name }, () => go({ picture }),
    element("img", { alt: name, loading: "lazy", decoding: "async", src })));
  byId("strip").append(...thumbnails);
}

function showInStrip() {
  const strip = byId("strip");
  const hadFocus = strip.contains(document.activeElement);
  const chosen = strip.children[state.picture];
  for (const each of strip.children) {
    each.tabIndex = each === chosen ? 0 : -1;
    each.setAttribute("aria-current", each === chosen);
  }
  strip.scrollLeft = chosen.offsetLeft + (chosen.offsetWidth - strip.clientWidth) / 2;
  if (hadFocus) chosen.focus({ preventScroll: true });
}

function predictionsOf(image, heading, predictions) {
  if (!predictions) return element("div", {}, element("h4", {}, heading), element("p.soft", {}, "Not known: the adapter was merged."));
  const items = predictions.map(([name, share], place) => {
    const isRight = name === image.group;
    const mark = isRight ? element("span.right", {}, "✓ right") : element("span.wrong", {}, "✗ wrong");
    return element("li", {}, named(name), ...(place === 0 && image.is_class ? [" ", mark] : []), measure(share, percent(share)));
  });
  return element("div", {}, element("h4", {}, heading), element("ol", {}, ...items));
}

function showChange(image) {
  const [after, before] = [image.with[0][0], image.without?.[0][0]];
  const isChanged = before !== undefined && before !== after;
  const change = ["The adapter changed the prediction from ", named(before ?? ""), " to ", named(after), "."];
  const same = before === undefined ? [] : ["The adapter did not change the prediction."];
  byId("change").replaceChildren(...(isChanged ? change : same));
  byId("change").classList.toggle("changed", isChanged);
}

function card(entries, index) {
  const entry = entries[index];
  const words = reasonsOf(entry).flatMap(([reason], place) => (place ? [" · ", ...reason] : reason));
  return button("button.card", { "data-ref": refOf(entry) }, () => enlarge(entries, index), overlayOf(entry),
    element("span.title", {}, ...titleNodes(entry)), scoreOf(entry), element("span.soft", {}, ...words), ...partFlags(entry));
}

function showRanked() {
  const entries = rankedOf(state.picture);
  const hadFocus = byId("ranked").contains(document.activeElement);
  const cards = entries.map((_, index) => element("li", {}, card(entries, index)));
  byId("ranked-heading").textContent = `Best clusters of ${state.layer === null ? "all layers" : `layer ${layerName(state.layer)}`}`;
  byId("ranked").replaceChildren(...(cards.length ? cards : [element("li.soft", {}, "No cluster is worth a look here.")]));
  if (hadFocus) byId("ranked").querySelector("button")?.focus();
}

/** Return the item of the label map's legend; a label of many clusters is folded. */
function legendItem(layer, label, share) {
  const text = data.layers[layer].labels[label];
  const members = text.split("+");
  const swatch = element("span.swatch");
  swatch.style.background = data.layers[layer].palette[label];
  const summary = element("summary", {}, `${members[0]} and ${members.length - 1} that look alike`);
  const name = members.length < 4 ? element("span", {}, ...labelNodes(text)) : element("details", {}, summary, text);
  return element("li", {}, swatch, name, element("span.number", {}, percent(share)));
}

function showLabels() {
  const layer = state.layer ?? data.images[state.picture].best[0]?.[0] ?? data.layers.length - 1;
  const counts = new Map();
  for (const label of labelsOf(state.picture, layer)) counts.set(label, (counts.get(label) ?? 0) + 1);
  const labels = [...counts].sort((one, other) => other[1] - one[1]);
  const description = `Label map of layer ${layerName(layer)} over ${data.images[state.picture].name}, ${labels.length} labels`;
  const canvas = canvasOf(fillLabels, { image: state.picture, layer }, description);
  canvas.id = "labels-canvas";
  const why = state.layer === null ? ", where the best cluster is" : "";
  byId("labels-heading").textContent = `Label map of layer ${layerName(layer)}${why}`;
  byId("labels-frame").replaceChildren(canvas);
  byId("labels-legend").replaceChildren(...labels.map(([label, count]) => legendItem(layer, label, count / patches)));
}

function showPictures() {
  const image = data.images[state.picture];
  showInStrip();
  Object.assign(byId("picture"), { src: image.src, alt: image.name });
  byId("picture-place").textContent = `Picture ${state.picture + 1} of ${data.images.length}`;
  byId("picture-name").textContent = image.name;
  const kind = image.is_class ? "Class: " : "Folder: ";
  byId("picture-group").replaceChildren(...(image.group ? [kind, named(image.group)] : ["In no folder"]));
  const sides = [["With the adapter", image.with], ["Without it", image.without]];
  byId("predictions").replaceChildren(...sides.map(([heading, predictions]) => predictionsOf(image, heading, predictions)));
  showChange(image);
  showRanked();
  showLabels();
}

// ------------------------------------------------------------------------------------------- the dialog

function enlarge(entries, index) {
  Object.assign(shown, { entries, index });
  showEnlarged();
  if (!byId("enlarged").open) byId("enlarged").showModal();
}

const stepEnlarged = (step) => enlarge(shown.entries, (shown.index + step + shown.entries.length) % shown.entries.length);
const figure = (picture, ...caption) => element("figure", {}, picture, element("figcaption", {}, ...caption));

function showEnlarged() {
  const entry = shown.entries[shown.index];
  const { src, name } = data.images[entry.image];
  const reasons = entry.criteria ? reasonsOf(entry) : [];
  const items = reasons.map(([words, figures]) => element("li", {}, element("strong", {}, ...words), `: ${figures}.`));
  const plain = element("img", { src, alt: name });
  byId("enlarged-heading").replaceChildren(...titleNodes(entry));
  byId("enlarged-place").textContent = `${shown.index + 1} of ${shown.entries.length}`;
  byId("enlarged-body").replaceChildren(
    element("p.soft", {}, layerText(entry.layer)),
    element("div.pair", {}, figure(overlayOf(entry), "Where the cluster responds"), figure(plain, named(name))),
    ...(entry.score === undefined ? [] : [element("div.score-line", {}, "Score", scoreOf(entry))]),
    element("ul.reasons", {}, ...items), ...partFlags(entry));
  byId("enlarged-likes").replaceChildren(...likesOf(entry));
}

/** Return the pictures that a cluster responds to most, where they are known. */
function likesOf({ layer, cluster }) {
  const like = data.layers[layer].likes.find((one) => one.cluster === cluster);
  if (!like) return [];
  const pictures = responsesOf(layer, like).map((one) => figure(overlayOf(one, TILE_PX), named(data.images[one.image].name)));
  return [element("h3", {}, "Pictures it responds to most"), element("div.tiles", {}, ...pictures), classesLiked(like)];
}

// ----------------------------------------------------------------------------- views: likes and classes

function responsesOf(layer, { cluster, score, responses }) {
  return responses.map(([image, row, column]) => ({ image, row, column, layer, cluster, score }));
}

function classesLiked({ classes }) {
  const items = classes.map(([name, deviations]) => element("li", {}, named(name), ` ${signed(deviations)} sd`));
  return element("div.soft", {}, items.length ? "Prefers" : "Prefers no class", element("ul.tags", {}, ...items));
}

function tile(entries, index, ...caption) {
  const overlay = overlayOf(entries[index], TILE_PX);
  return button("button.tile", { "data-ref": refOf(entries[index]) }, () => enlarge(entries, index), overlay, ...caption);
}

function likeRow(layer, like) {
  const entry = { layer, cluster: like.cluster };
  const entries = responsesOf(layer, like);
  const tiles = entries.map(({ image }, index) => tile(entries, index, element("span.soft", {}, named(data.images[image].name))));
  const about = [element("h3", {}, ...titleNodes(entry)), scoreOf(like), classesLiked(like), ...partFlags(entry)];
  const parts = [element("div.about-cluster", {}, ...about), element("div.tiles", {}, ...tiles)];
  return element("article.like", { "data-ref": refOf(entry) }, ...parts);
}

function showLikes() {
  const places = state.layer === null ? [...data.layers.keys()] : [state.layer];
  const likes = places.flatMap((layer) => data.layers[layer].likes.map((like) => [layer, like]));
  if (state.layer === null) likes.sort((one, other) => other[1].score - one[1].score).splice(LIKES_SHOWN);
  const which = state.layer === null ? "best clusters of all layers" : `clusters of layer ${layerName(state.layer)}`;
  byId("heading-likes").textContent = `What the ${which} like`;
  byId("likes").replaceChildren(...likes.map((like) => likeRow(...like)));
}

const groupOf = (image) => image.group || image.with[0][0];
const groups = [...new Set(data.images.map(groupOf))];
const firstOf = (group) => data.images.findIndex((image) => groupOf(image) === group);

/** Return the clusters that rank best for some pictures together: the sum of 1 / (1 + rank) is highest. */
function bestTogether(pictures) {
  const found = new Map();
  for (const picture of pictures)
    rankedOf(picture).forEach(({ layer, cluster }, rank) => {
      const sum = found.get(refOf({ layer, cluster }))?.sum ?? 0;
      found.set(refOf({ layer, cluster }), { layer, cluster, sum: sum + 1 / (1 + rank) });
    });
  return [...found.values()].sort((one, other) => other.sum - one.sum).slice(0, SHEET_COLUMNS);
}

function sheetRow(image, clusters) {
  const { src, name, with: predictions } = data.images[image];
  const ranked = new Map(rankedOf(image).map((entry) => [refOf(entry), entry]));
  const entries = clusters.map(({ layer, cluster }) => ranked.get(refOf({ layer, cluster })) ?? { image, layer, cluster });
  const prediction = element("span.soft", {}, "Predicted: ", named(predictions[0][0]));
  const head = element("th", { scope: "row" }, element("img", { src, alt: "", decoding: "async" }), named(name), prediction);
  return element("tr", {}, head, ...entries.map((_, index) => element("td", {}, tile(entries, index))));
}

function showClasses() {
  const group = groupOf(data.images[state.picture]);
  const pictures = [...data.images.keys()].filter((picture) => groupOf(data.images[picture]) === group);
  const clusters = bestTogether(pictures);
  const heads = clusters.map((entry) => element("th", { scope: "col" }, ...titleNodes(entry), ...partFlags(entry)));
  byId("group").selectedIndex = groups.indexOf(group);
  byId("sheet").tHead.replaceChildren(element("tr", {}, element("th", { scope: "col" }, "Picture"), ...heads));
  byId("sheet").tBodies[0].replaceChildren(...pictures.map((picture) => sheetRow(picture, clusters)));
}

// ----------------------------------------------------------------------------- views: scores and about

function partCell(part, maps) {
  if (!part) return element("td", {}, "–");
  const number = element("strong", {}, part.iou.toFixed(2) + (isNoBetter(part) ? " ★" : ""));
  const interval = element("span.number", {}, `[${part.low.toFixed(2)}, ${part.high.toFixed(2)}]`);
  const cell = element("td.part", {}, number, " ", interval);
  const label = maps === "learned" ? labelNodes(part.map) : [part.map]; // people name only these
  if (part.map) cell.append(element("span.soft", {}, ...label));
  if (isNoBetter(part)) cell.append(element("span.flag.poor", {}, "no better than random clusters"));
  return cell;
}

function buildScores({ rows: all, data: source, images, seed, adapter }) {
  const parts = [...new Set(all.flatMap((row) => row.parts.map((part) => part.part)))];
  const extra = ["deletion", "insertion", "importance"].filter((name) => all.some((row) => (row[name] ?? null) !== null));
  const heads = [["maps"], ["reading"], ["of"], ...parts.map((part) => ["IoU ", named(part)]), ...extra.map((name) => [name])];
  const lines = all.map((row) => [
    element("th", { scope: "row" }, row.maps), element("td", {}, row.reading || "–"), element("td", {}, String(row.candidates)),
    ...parts.map((name) => partCell(row.parts.find((part) => part.part === name), row.maps)),
    ...extra.map((name) => element("td", {}, row[name]?.toFixed(2) ?? "–"))]);
  byId("scores-source").append(named(adapter), " on ", named(source), `: ${images} pictures, seed ${seed}, as gift score measured it.`);
  byId("scores").tHead.append(element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, ...head))));
  byId("scores").tBodies[0].append(...lines.map((cells) => element("tr", {}, ...cells)));
  byId("scores-extra").hidden = !extra.length;
}

/** Return a heading and a list, or nothing where the list is empty. */
function listed(heading, items) {
  return items.length ? [element("h3", {}, heading), element("ul", {}, ...items.map((item) => element("li", {}, ...item)))] : [];
}

function buildAbout() {
  const dropped = data.all_clusters - data.clusters.length;
  const leftOut = [
    ...(data.left_out ? [[`${data.left_out} more pictures, as there are too many.`]] : []),
    ...(dropped ? [[`${dropped} of ${data.all_clusters} clusters a layer: kept are the named ones and those that rank best.`]] : []),
  ];
  byId("about-grid").textContent = `${rows} × ${columns}`;
  for (const item of document.querySelectorAll("[data-reading]")) item.hidden = item.dataset.reading !== data.reading;
  byId("about").append(
    ...listed("Left out", leftOut),
    ...listed("Pictures that cannot be shown", data.problems.map(([name, reason]) => [named(name), ": ", named(reason)])),
    ...listed("Names of clusters", Object.entries(data.names).map(([label, name]) => [named(name), ` (${label})`])),
    ...listed("Combinations", data.combinations.map(({ name, how, members }) => [named(name), `: ${how} of ${members.join(", ")}`])),
    ...listed("Layers", data.layers.map((_, place) => [layerText(place)])),
    ...listed("Versions", [[Object.entries(data.versions).map((pair) => pair.join(" ")).join(", ")]]),
    ...listed("Classes", [data.classes.flatMap((name, place) => (place ? [", ", named(name)] : [named(name)]))]));
}

// -------------------------------------------------------------------------------------- the page itself

const showers = { pictures: showPictures, likes: showLikes, classes: showClasses, scores() {}, about() {} };

async function show() {
  for (const each of document.querySelectorAll("[data-view]")) {
    const isChosen = each.dataset.view === state.view;
    each.setAttribute("aria-current", isChosen && "page");
    byId(`view-${each.dataset.view}`).hidden = !isChosen;
  }
  byId("layer").selectedIndex = state.layer === null ? 0 : state.layer + 1;
  byId("toolbar").hidden = state.view === "scores" || state.view === "about";
  showers[state.view]();
  const first = byId(`view-${state.view}`).querySelector("canvas");
  if (first) await draw(first);
  document.documentElement.dataset.ready = "true";
}

/** Change what is shown, and the address with it; another view is a step in the browser's history. */
function go(changes) {
  const isStep = "view" in changes && changes.view !== state.view;
  Object.assign(state, changes);
  const address = `#view=${state.view}&picture=${state.picture + 1}&layer=${state.layer ?? "best"}`;
  show();
  history[isStep ? "pushState" : "replaceState"](null, "", address); // last: browsers refuse too many in a second
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const view = given.get("view");
  const place = (text, count) => (/^\d{1,9}$/.test(text) && Number(text) < count ? Number(text) : null);
  state.view = Object.hasOwn(showers, view) && (view !== "scores" || data.scores) ? view : "pictures";
  state.picture = place(given.get("picture") - 1, data.images.length) ?? 0;
  state.layer = place(given.get("layer"), data.layers.length);
  byId("enlarged").close();
  show();
}

function setLook(changes) {
  Object.assign(look, changes);
  for (const input of document.querySelectorAll("[data-look]")) input.value = look[input.dataset.look];
  for (const output of document.querySelectorAll("[data-value]")) output.textContent = look[output.dataset.value].toFixed(2);
  const stops = Array.from({ length: 18 }, (_, stop) => `rgb(${colourBytes(look.colours).subarray(45 * stop, 45 * stop + 3).join(" ")})`);
  byId("legend").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  byId("legend").style.setProperty("--threshold", look.threshold);
  byId("legend").setAttribute("aria-label", `Colours from weak to strong: ${look.colours}. Nothing is drawn below ${look.threshold}.`);
  byId("colours-note").textContent = look.colours === "jet" ? "Jet is not readable by colour-blind people." : "";
  redraw();
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  byId("theme").textContent = isDark() ? "☀ Light theme" : "☾ Dark theme";
}

const stepPicture = (step) => go({ picture: (state.picture + step + data.images.length) % data.images.length });

function stepLayer(step) {
  const place = Math.min((state.layer ?? -1) + step, data.layers.length - 1);
  go({ layer: place < 0 ? null : place });
}

/** Arrow keys choose picture and layer, and in the dialog the cluster, unless a field needs them. */
function onKey(event) {
  const [step, isAcross] = { ArrowLeft: [-1, true], ArrowRight: [1, true], ArrowUp: [-1, false], ArrowDown: [1, false] }[event.key] ?? [];
  const isOpen = byId("enlarged").open;
  const isMeant = step && !(event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || event.target.closest("input, select"));
  if (!isMeant || (isOpen ? !isAcross : state.view !== "pictures")) return;
  event.preventDefault();
  if (isOpen) stepEnlarged(step);
  else if (isAcross) stepPicture(step);
  else stepLayer(step);
}

function buildHead() {
  const facts = {
    Backbone: data.backbone, Method: data.method, Reading: data.reading, Layers: data.layers.length,
    Pictures: `${data.images.length}${data.left_out ? ` (${data.left_out} more left out)` : ""}`, Classes: data.classes.length,
    "Clusters a layer": `${data.clusters.length < data.all_clusters ? `${data.clusters.length} of ` : ""}${data.all_clusters}`,
    Patches: `${rows} × ${columns}`, "Picture size": `${data.image_size_px} px`,
  };
  document.title = `${data.adapter} – GIFT report`;
  byId("adapter").textContent = data.adapter;
  const pairs = Object.entries(facts).map(([name, value]) => [element("dt", {}, name), element("dd", { dir: "auto" }, value)]);
  byId("facts").append(...pairs.map((pair) => element("div", {}, ...pair)));
  byId("layer").append(new Option("best of all layers"), ...data.layers.map((_, place) => new Option(layerText(place), place)));
  byId("colours").append(...Object.keys(data.colours).map((name) => new Option(name)));
  byId("group").append(...groups.map((group) => new Option(group)));
  document.querySelector("[data-view=scores]").hidden = !data.scores;
}

function openPicture() {
  const { image, layer } = shown.entries[shown.index];
  byId("enlarged").close();
  go({ view: "pictures", picture: image, layer });
}

function listen() {
  const on = (id, type, act) => byId(id).addEventListener(type, (event) => act(event.target));
  on("skip", "click", () => byId("main").focus());
  on("theme", "click", () => setTheme(isDark() ? "light" : "dark"));
  on("previous", "click", () => stepPicture(-1));
  on("next", "click", () => stepPicture(1));
  on("enlarged-close", "click", () => byId("enlarged").close());
  on("enlarged-previous", "click", () => stepEnlarged(-1));
  on("enlarged-next", "click", () => stepEnlarged(1));
  on("enlarged-open", "click", openPicture);
  on("colours", "change", (select) => setLook({ colours: select.value }));
  on("layer", "change", (select) => go({ layer: select.selectedIndex ? select.selectedIndex - 1 : null }));
  on("group", "change", (select) => go({ picture: firstOf(groups[select.selectedIndex]) }));
  for (const each of document.querySelectorAll("[data-view]")) each.addEventListener("click", () => go({ view: each.dataset.view }));
  for (const input of document.querySelectorAll("[data-look]"))
    input.addEventListener("input", () => setLook({ [input.dataset.look]: Number(input.value) }));
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", readAddress);
  prefersDark.addEventListener("change", () => setTheme());
}

buildHead();
buildStrip();
buildAbout();
if (data.scores) buildScores(data.scores);
listen();
setTheme();
setLook({});
readAddress();
