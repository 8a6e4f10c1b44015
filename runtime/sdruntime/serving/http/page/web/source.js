/** The start image: chosen, dropped or of the gallery; with the mask painted on it, and what to add around it. */

import { base64Of, byId } from "./dom.js";
import { Mask } from "./mask.js";

const SIDES = ["left", "top", "right", "bottom"];

export class Source {
  #place = byId("source");
  #canvas = byId("canvas");
  #mask = new Mask(this.#canvas, () => {});
  #image = null; // OffscreenCanvas

  constructor() {
    byId("brush").addEventListener("input", () => this.#setBrush());
    byId("zoom").addEventListener("input", () => this.#setZoom());
    byId("undo").addEventListener("click", () => this.#mask.undo());
    byId("invert").addEventListener("click", () => this.#mask.invert());
    byId("clear").addEventListener("click", () => this.#mask.clear());
    byId("remove").addEventListener("click", () => this.remove());
  }

  /**
   * Take an image, at the nearest size that is a multiple of `multiple`.
   * @param {Blob} file
   * @param {number} multiple in pixels
   * @param {number} pixels the most that the server takes
   */
  async load(file, multiple, pixels) {
    const bitmap = await createImageBitmap(file);
    const shrink = Math.min(1, Math.sqrt(pixels / (bitmap.width * bitmap.height)));
    const [width, height] = [bitmap.width, bitmap.height].map((side) => {
      const round = shrink < 1 ? Math.floor : Math.round;
      return Math.max(1, round((side * shrink) / multiple)) * multiple;
    });
    this.#image = new OffscreenCanvas(width, height);
    this.#image.getContext("2d").drawImage(bitmap, 0, 0, width, height);
    this.#mask.load(this.#image);
    for (const side of SIDES) byId(`extend-${side}`).step = multiple;
    byId("painting").hidden = false;
    this.#place.open = true;
    this.#setBrush();
    this.#setZoom();
  }

  /** Generate without a start image. */
  remove() {
    this.#image = null;
    byId("painting").hidden = true;
    byId("file").value = "";
    for (const side of SIDES) byId(`extend-${side}`).value = 0;
  }

  /** Return the fields of a job for it; none without an image. */
  async fields() {
    if (!this.#image) return {};
    const extend = SIDES.map((side) => Number(byId(`extend-${side}`).value));
    const fields = { image: await png(this.#image), strength: Number(byId("strength").value) };
    if (!this.#mask.empty) fields.mask = await png(this.#mask.painted());
    if (extend.some(Boolean)) fields.extend = extend;
    return fields;
  }

  #setBrush() {
    this.#mask.brush = (Number(byId("brush").value) / 100) * Math.min(this.#canvas.width, this.#canvas.height);
  }

  #setZoom() {
    this.#canvas.style.width = `${byId("zoom").value}%`;
  }
}

const png = async (canvas) => base64Of(await canvas.convertToBlob({ type: "image/png" }));
