/* How maps are read and drawn, in every page that has some. */
const make = (tag, attributes = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
};
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const floats = text => new Float32Array(bytes(text).buffer);
/* A map as `page.pack` packs it: value = scale (byte / 255)^2. */
const unpacked = (cells, scale) => Float32Array.from(cells, v => scale * v * v / 65025);
const sum = (map, start = 0, end = map.length) => { let s = 0; for (let i = start; i < end; i++) s += map[i]; return s; };
/* Colours from dark violet over red to pale yellow. */
const stops = [[20, 11, 52], [84, 15, 109], [140, 41, 99], [193, 58, 80], [237, 105, 37], [251, 163, 14], [249, 226, 110], [252, 250, 200]];
/* The same for values with signs: blue below zero, orange above. */
const twoSidedStops = [[8, 69, 134], [74, 144, 198], [236, 234, 228], [235, 128, 48], [150, 56, 8]];
function blend(colours, v) {
  const x = Math.min(Math.max(v, 0), 1) * (colours.length - 1), i = Math.min(Math.floor(x), colours.length - 2), t = x - i;
  return colours[i].map((c, k) => Math.round(c + t * (colours[i + 1][k] - c)));
}
const heat = v => blend(stops, v);
const twoSided = v => blend(twoSidedStops, (v + 1) / 2);
/* Values from 0 to 1, or with signs from -1 to 1, over a picture. */
function paint(canvas, values, [rows, columns], signs = false) {
  const small = make("canvas", {width: columns, height: rows}), brush = small.getContext("2d");
  const pixels = brush.createImageData(columns, rows);
  const pixel = signs ? v => [...twoSided(v), Math.round(230 * Math.abs(v) ** .7)] : v => [...heat(v), Math.round(255 * (.68 - .34 * v))];
  values.forEach((v, i) => pixels.data.set(pixel(v), 4 * i));
  brush.putImageData(pixels, 0, 0);
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}
/* A canvas over the region of a picture that a map covers: left, top, width and height as shares. */
function cover(region, [rows, columns]) {
  const canvas = make("canvas", {width: columns * 24, height: rows * 24});
  const [left, top, width, height] = region.map(v => 100 * v + "%");
  Object.assign(canvas.style, {left, top, width, height});
  return canvas;
}
const percent = v => v > 0 && v < .0995 ? `${(100 * v).toFixed(1)}\u00a0%` : `${Math.round(100 * v)}\u00a0%`;
