/** Control images: each for a ControlNet or T2I-Adapter of the model, with how much and when it counts. */

import { base64Of, byId, element } from "./dom.js";

const PREPROCESS = { "": "as it is", canny: "edges (canny)", gray: "gray", color: "grid of colours", invert: "inverted" };
const NUMBERS = { scale: [1, 10], start: [0, 1], end: [1, 1] }; // the default, and the largest

export class Controls {
  #place = byId("controls");
  #list = this.#place.querySelector("ul");
  #nets = [];
  #images = new WeakMap(); // row -> its image in base64

  constructor() {
    byId("add-control").addEventListener("change", async ({ target }) => {
      for (const file of target.files) this.#add({ image: await base64Of(file) });
      target.value = "";
    });
  }

  /** Offer the networks of a model. @param {string[]} nets */
  offer(nets) {
    this.#nets = nets;
    this.#place.hidden = nets.length === 0;
    for (const row of this.#list.children) {
      const choice = row.querySelector("[name=net]");
      choice.replaceChildren(...this.#choices(choice.value));
    }
  }

  /** The field of a job; none without an image. */
  fields() {
    if (this.#place.hidden || !this.#list.children.length) return {};
    return { controls: [...this.#list.children].map((row) => this.#control(row)) };
  }

  /** Show these control images in place of the present ones. @param {Object[]} controls as `fields` returns them */
  fill(controls) {
    this.#list.replaceChildren();
    for (const control of controls) this.#add(control);
  }

  #control(row) {
    const value = (name) => row.querySelector(`[name=${name}]`).value;
    const control = { image: this.#images.get(row), net: value("net") };
    if (value("preprocess")) control.preprocess = value("preprocess");
    for (const name of Object.keys(NUMBERS)) control[name] = Number(value(name));
    return control;
  }

  #choices(chosen) {
    return this.#nets.map((net) => element("option", { value: net, selected: net === chosen }, net));
  }

  #add({ image, net, preprocess = "", ...numbers }) {
    const remove = element("button", { type: "button", className: "quiet", "aria-label": "Remove the control image" }, "×");
    const kinds = Object.entries(PREPROCESS).map(([value, text]) => element("option", { value, selected: value === preprocess }, text));
    const row = element(
      "li",
      {},
      element(
        "div",
        { className: "row" },
        element("img", { src: `data:;base64,${image}`, alt: "Control image" }),
        element("select", { name: "net", "aria-label": "Network of the control image" }, ...this.#choices(net)),
        element("select", { name: "preprocess", "aria-label": "What it reads" }, ...kinds),
        remove,
      ),
      element(
        "div",
        { className: "pair three" },
        ...Object.entries(NUMBERS).map(([name, [normal, max]]) =>
          element(
            "label",
            { className: "field" },
            name[0].toUpperCase() + name.slice(1),
            element("input", { name, type: "number", min: 0, max, step: 0.05, value: numbers[name] ?? normal }),
          ),
        ),
      ),
    );
    remove.addEventListener("click", () => row.remove());
    this.#images.set(row, image);
    this.#list.append(row);
  }
}
