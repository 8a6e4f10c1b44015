/** One image in full, with its settings. Arrow keys go on to the next one, Escape closes. */

import { Comparison } from "./compare.js";
import { byId } from "./dom.js";

export class Viewer {
  #dialog = byId("viewer");
  #image = this.#dialog.querySelector("img");
  #comparison = new Comparison(this.#dialog.querySelector("figure"));
  #gallery;
  #record = null;

  /**
   * @param {Gallery} gallery
   * @param {{use, start, remove}} actions each called with the record that is shown
   */
  constructor(gallery, actions) {
    this.#gallery = gallery;
    byId("previous").addEventListener("click", () => this.#move(-1));
    byId("next").addEventListener("click", () => this.#move(1));
    byId("compare").addEventListener("click", () => this.#compare());
    this.#dialog.addEventListener("close", () => this.#comparison.end());
    byId("close").addEventListener("click", () => this.#dialog.close());
    for (const name of ["use", "start"]) {
      byId(name).addEventListener("click", () => {
        this.#dialog.close();
        actions[name](this.#record);
      });
    }
    byId("delete").addEventListener("click", () => {
      const record = this.#record;
      if (!this.#move(1) && !this.#move(-1)) this.#dialog.close();
      actions.remove(record);
    });
    this.#dialog.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (way && event.target.localName !== "input") this.#move(way);
    });
    this.#dialog.addEventListener("click", (event) => {
      if (event.target === this.#dialog) this.#dialog.close();
    });
  }

  /** The record that is shown, null if the viewer is closed. */
  get record() {
    return this.#dialog.open ? this.#record : null;
  }

  open(record) {
    this.#record = record;
    this.#image.src = this.#gallery.url(record.id);
    this.#image.alt = record.request.prompt || "Image without a prompt";
    byId("parameters").textContent = record.parameters;
    byId("warnings").replaceChildren(...(record.warnings ?? []).map((text) => Object.assign(document.createElement("li"), { textContent: text })));
    byId("download").href = this.#image.src;
    byId("download").download = `${record.model}-${record.seed}.png`;
    const [place, records] = this.#place();
    byId("previous").disabled = place === 0;
    byId("next").disabled = place === records.length - 1;
    if (!this.#dialog.open) this.#dialog.showModal();
  }

  /** Keep this image over the next one, and over all that are opened until it is pressed again. */
  #compare() {
    if (this.#comparison.running) {
      this.#comparison.end();
      return;
    }
    const { id, request } = this.#record;
    if (this.#move(1) || this.#move(-1)) this.#comparison.start(this.#gallery.url(id), request.prompt);
  }

  #place() {
    const records = this.#gallery.pictured;
    return [records.findIndex(({ id }) => id === this.#record.id), records];
  }

  /** Go to a neighbour. Returns whether there is one. */
  #move(way) {
    const [place, records] = this.#place();
    const next = records[place + way];
    if (next) this.open(next);
    return Boolean(next);
  }
}
