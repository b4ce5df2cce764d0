// <attention-view data='{"image": URL, "captions": [{"words", "text", "alphas", "away", "log_prob"}, …]}'>: a
// photograph, its caption, and a panel a word that shows where the model looked, as caption.py draws
// them. Hovering over a word or panel shows it on the photograph; a click keeps it there; the arrow
// keys step. Of several captions one is chosen by a click. Its colours are those of the page around.
//
// alphas: base64 of T rows of L = size² numbers of 16 bits, the lower byte first, one row a word, row
// by row over the image, 65535 at the greatest of each word; null of a model without attention, which
// then has no panels. away: how much of each word's attention is at no place of the image, 0 to 1; null
// of a model that always looks.
(() => {
  const AMBER = [255, 184, 28];
  const PANEL = 220, PHOTO = 600; // pixels along the longer side; shown at half of that, or less

  const STYLE = `
    :host { display: block; font: 15px/1.45 system-ui, sans-serif; color: inherit; }
    .view { display: flex; flex-wrap: wrap; gap: 18px; outline-offset: 6px; }
    .photo { flex: 0 1 300px; min-width: min(180px, 100%); }
    .photo canvas { display: block; max-width: 100%; max-height: 480px; border-radius: 4px; }
    .side { flex: 1 1 min(360px, 100%); min-width: 0; }
    .caption { display: flex; flex-wrap: wrap; gap: 2px; margin: 0 0 6px -5px; font-size: 18px; }
    .word { font: inherit; color: inherit; background: none; border: 0; border-radius: 4px;
            padding: 1px 5px; cursor: pointer; }
    .steps { display: flex; align-items: center; gap: 8px; margin-bottom: 12px; font-size: 13px; }
    .steps[hidden] { display: none; }
    .steps button { font: inherit; color: inherit; background: none; cursor: pointer;
                    border: 1px solid currentColor; border-radius: 4px; padding: 1px 9px; }
    .steps span, .legend, .numbers { opacity: 0.8; }
    .legend { margin: 0 0 10px; font-size: 13px; }
    .numbers { margin: 6px 0 0; font-size: 13px; min-height: 2.9em; } /* nothing moves as it changes */
    .numbers.rest { min-height: 4.35em; }
    .legend > span { display: inline-block; margin-right: 4px; }
    .legend .line { display: inline-block; width: 22px; height: 11px; border-radius: 2px;
                    background: linear-gradient(#444 37%, rgb(${AMBER}) 37% 63%, #444 63%); }
    .legend .ring { display: inline-block; width: 5px; height: 5px; margin: 0 2px; border-radius: 50%;
                    border: 2px solid white; box-shadow: 0 0 0 1px black, inset 0 0 0 1px black;
                    background: #888; }
    .caption .p { align-self: center; padding-left: 8px; font-size: 14px; white-space: nowrap; }
    .strip { display: grid; gap: 8px 8px; grid-template-columns: repeat(auto-fill, 98px); }
    figure { margin: 0; cursor: pointer; }
    figcaption { font-size: 13px; padding: 0 3px; border-radius: 4px; white-space: nowrap;
                 overflow: hidden; text-overflow: ellipsis; }
    .away { font-size: 10.5px; line-height: 1.2; padding: 1px 0; opacity: 0.8; }
    figure canvas { display: block; max-width: 100%; max-height: 120px; border-radius: 3px; }
    .word.shown, .shown figcaption { background: rgb(${AMBER}); color: #1a1a1a; }
    .captions { margin: 14px 0 0; padding: 0 0 0 22px; font-size: 14px; }
    .captions button { font: inherit; color: inherit; background: none; border: 0; cursor: pointer;
                       padding: 1px 4px; text-align: left; border-radius: 4px;
                       vertical-align: top; }
    .captions .chosen { background: rgb(${AMBER.join(" ")} / 0.35); }
    .p { opacity: 0.8; font-variant-numeric: tabular-nums; }
    .pinned { text-decoration: underline 2px; text-underline-offset: 3px; }
  `;

  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };

  const signed = (number) => number.toFixed(2).replace("-", "−");

  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;

  // what the panels show, in words
  const legend = (away) =>
    element("p", { className: "legend" },
      "Full colour: the caption's strongest attention; gray: little or none. ",
      element("span", {}, element("span", { className: "line" }), " Line: half of the word’s own maximum. "),
      element("span", {}, element("span", { className: "ring" }), " Ring: its strongest place."),
      ...(away ? [" “Does not look”: the share of a word’s attention that is at no place; the rest is shown."] : []));

  // rows of L numbers -> each word's attention at L places, 1 where it is as strong as if it were even
  const decode = (text, count) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const levels = new Uint16Array(bytes.buffer), places = levels.length / count;
    return Array.from({ length: count }, (_, t) => {
      const row = Float32Array.from(levels.subarray(t * places, (t + 1) * places));
      const sum = row.reduce((a, b) => a + b);
      return row.map((level) => (places * level) / sum);
    });
  };

  const greatest = (values) => values.reduce((a, b) => (a > b ? a : b));

  // Centre [x, y] of the greatest of the places, or the mean of those that share it, as fractions of
  // width and height; null where the attention is even.
  const peak = (grid) => {
    const most = greatest(grid), size = Math.round(Math.sqrt(grid.length));
    if (grid.every((value) => most <= 1.001 * value)) return null;
    const places = Array.from(grid.keys()).filter((i) => grid[i] === most);
    const mean = (along) => places.reduce((sum, i) => sum + along(i) + 0.5, 0) / places.length / size;
    return [mean((i) => i % size), mean((i) => Math.floor(i / size))];
  };

  // Over what share of the image the attention is spread: e to the entropy, by the places.
  const spread = (grid) =>
    Math.exp(-grid.reduce((sum, value) => sum + (value ? value * Math.log(value) : 0), 0) / grid.length);

  // How much each of `size` places counts for each of `length` pixels: a Gaussian of the distance.
  const weights = (length, size) =>
    Array.from({ length }, (_, pixel) => {
      const at = ((pixel + 0.5) * size) / length;
      const row = Array.from({ length: size }, (_, i) => Math.exp(-0.5 * ((at - i - 0.5) / 0.65) ** 2));
      const sum = row.reduce((a, b) => a + b);
      return row.map((value) => value / sum);
    });

  // A square grid blown up to width × height pixels, with round peaks.
  const smooth = (grid, width, height) => {
    const size = Math.round(Math.sqrt(grid.length));
    const across = weights(width, size), down = weights(height, size);
    const columns = down.map((row) => // height × size
      Float32Array.from({ length: size }, (_, x) =>
        row.reduce((sum, weight, y) => sum + weight * grid[y * size + x], 0)));
    const out = new Float32Array(width * height);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        let sum = 0;
        for (let i = 0; i < size; i++) sum += across[x][i] * columns[y][i];
        out[y * width + x] = sum;
      }
    }
    return out;
  };

  // Dark photographs are lightened, on which dim and lit places would look alike.
  const brighten = (pixels) => {
    let sum = 0;
    for (let i = 0; i < pixels.length; i += 4) sum += pixels[i] + pixels[i + 1] + pixels[i + 2];
    const mean = Math.min(Math.max(sum / (pixels.length / 4) / 765, 0.01), 0.99);
    const gamma = Math.min(Math.max(Math.log(0.4) / Math.log(mean), 0.45), 1);
    const table = Float32Array.from({ length: 256 }, (_, i) => (i / 255) ** gamma);
    return (level) => table[level];
  };

  const shape = (image, longer) =>
    [image.naturalWidth, image.naturalHeight].map((side) =>
      Math.max(1, Math.round((side * longer) / Math.max(image.naturalWidth, image.naturalHeight))));

  // How far a stroke of half that width, at some distance in pixels from its middle, covers a pixel.
  const stroke = (distance, thick) => Math.min(Math.max(thick + 0.5 - Math.abs(distance), 0), 1);

  // Draws a ring into pixels around a place [x, y], as fractions; white in black shows on any ground.
  const drawRing = ({ data, width, height }, place, thick) => {
    const [left, top] = [place[0] * width, place[1] * height], reach = 8 * thick;
    for (let y = Math.max(0, Math.floor(top - reach)); y < Math.min(height, top + reach); y++) {
      for (let x = Math.max(0, Math.floor(left - reach)); x < Math.min(width, left + reach); x++) {
        const away = Math.hypot(x + 0.5 - left, y + 0.5 - top) - 5 * thick;
        const black = stroke(away, 2 * thick), white = stroke(away, thick);
        for (let at = 4 * (y * width + x), i = 0; i < 3; i++) {
          data[at + i] = (1 - white) * (1 - black) * data[at + i] + white * 255;
        }
      }
    }
  };

  // Draws the image as it is. Given a word's grid, with `most`, the strongest attention of the caption:
  // in full where the attention is as strong, dim and gray where it is little, with a line where it is
  // half of its own maximum and a ring around its peak.
  const draw = (canvas, image, longer, grid, most, attention) => {
    const [width, height] = ([canvas.width, canvas.height] = shape(image, longer));
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, width, height);
    if (!grid) return;
    attention ??= smooth(grid, width, height);
    const picture = context.getImageData(0, 0, width, height);
    const pixels = picture.data, light = brighten(pixels), centre = peak(grid);
    const half = greatest(attention) / 2, full = Math.log1p(most), thick = 0.6 + longer / 350;
    const lined = centre && attention.some((value) => value < half);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const at = y * width + x, share = Math.min(Math.log1p(attention[at]) / full, 1);
        const slope = Math.hypot(
          attention[at + (x + 1 < width)] - attention[at - (x > 0)],
          attention[y + 1 < height ? at + width : at] - attention[y > 0 ? at - width : at]) / 2;
        const line = lined ? stroke((attention[at] - half) / (slope + 1e-9), thick) : 0;
        const [r, g, b] = [0, 1, 2].map((i) => light(pixels[4 * at + i]));
        const dim = 0.4 * (0.299 * r + 0.587 * g + 0.114 * b);
        [r, g, b].forEach((value, i) => {
          const lit = 255 * (dim + share * (value - dim));
          pixels[4 * at + i] = lit + line * (AMBER[i] - lit);
        });
      }
    }
    if (centre) drawRing(picture, centre, thick);
    context.putImageData(picture, 0, 0);
  };

  class AttentionView extends HTMLElement {
    static observedAttributes = ["data"];

    attributeChangedCallback() {
      const { image, captions } = JSON.parse(this.getAttribute("data"));
      this.captions = captions;
      this.image = element("img", { src: image });
      this.image.decode().then(() => this.choose(0));
    }

    choose(i) {
      const { words, alphas, away } = this.captions[i];
      Object.assign(this, { words, away });
      this.grids = alphas && decode(alphas, words.length);
      this.pinned = null;
      const attentions = (this.grids ?? []).map((grid) => smooth(grid, ...shape(this.image, PANEL)));
      this.most = Math.max(...attentions.map(greatest));
      this.build(i);
      this.panels.forEach((panel, t) =>
        draw(panel.querySelector("canvas"), this.image, PANEL, this.grids[t], this.most, attentions[t]));
      this.show(null);
    }

    build(chosen) {
      this.photo = element("canvas");
      const watch = (part, t) => {
        part.addEventListener("mouseenter", () => this.show(t));
        part.addEventListener("mouseleave", () => this.show(this.pinned));
        part.addEventListener("click", () => this.pin(this.pinned === t ? null : t));
        return part;
      };
      this.labels = this.words.map((word, t) =>
        watch(element("button", { className: "word", textContent: word, tabIndex: -1 }), t));
      this.panels = (this.grids ? this.words : []).map((word, t) =>
        watch(element("figure", { title: word },
          element("figcaption", { textContent: word }), element("canvas"),
          ...(this.away ? [element("div", { className: "away", textContent: `does not look: ${percent(this.away[t])}` })] : [])), t));
      this.where = element("span", { ariaLive: "polite" });
      this.numbers = element("p", { className: this.away ? "numbers rest" : "numbers", hidden: !this.grids });
      const step = (text, label, by) =>
        element("button", { textContent: text, ariaLabel: label, onclick: () => this.step(by) });
      const others = this.captions.map(({ text, log_prob }, i) =>
        element("li", {}, element("button", {
          className: i === chosen ? "chosen" : "", ariaPressed: i === chosen,
          onclick: () => this.choose(i),
        }, `${text} `,
        element("span", { className: "p", textContent: signed(log_prob) }))));
      const sure = element("span", { className: "p",
        textContent: `log p ${signed(this.captions[chosen].log_prob)}`,
        title: "natural logarithm of the caption's probability" });
      const view = element("div", { className: "view", tabIndex: 0, onkeydown: (event) => {
        const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (event.key === "Escape") this.pin(null);
        if (by) { event.preventDefault(); this.step(by); }
      } },
        element("div", { className: "photo" }, this.photo, this.numbers),
        element("div", { className: "side" },
          element("div", { className: "caption" }, ...this.labels, sure),
          element("div", { className: "steps", hidden: !this.grids },
            step("◀", "word before", -1), step("▶", "next word", 1), this.where),
          ...(this.grids ? [legend(this.away)] : []),
          element("div", { className: "strip" }, ...this.panels),
          ...(others.length > 1 ? [element("ol", { className: "captions" }, ...others)] : [])));
      const root = this.shadowRoot || this.attachShadow({ mode: "open" });
      root.replaceChildren(element("style", { textContent: STYLE }), view);
    }

    step(by) {
      const count = this.words.length;
      this.pin(this.pinned === null ? (by > 0 ? 0 : count - 1) : (this.pinned + by + count) % count);
    }

    pin(t) {
      this.pinned = t;
      this.labels.forEach((label, i) => label.classList.toggle("pinned", i === t));
      this.show(t);
    }

    show(t) {
      const grid = t === null || !this.grids ? null : this.grids[t];
      draw(this.photo, this.image, PHOTO, grid, this.most);
      const [before, of] = this.away && grid ? [`${percent(this.away[t])} at no place, the rest `, " of it"] : ["", ""];
      this.numbers.textContent = grid && `Attention: ${before}spread over ${percent(spread(grid))}` +
        ` of the image, ${percent(greatest(grid) / grid.length)}${of} at its strongest place`;
      for (const parts of [this.labels, this.panels]) {
        parts.forEach((part, i) => part.classList.toggle("shown", i === t));
      }
      this.where.textContent = t === null
        ? "hover over a word, or step through them"
        : `word ${t + 1} of ${this.words.length}: ${this.words[t]}`;
    }
  }

  if (!customElements.get("attention-view")) customElements.define("attention-view", AttentionView);
})();
