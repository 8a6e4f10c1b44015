/** A second image over the one that is shown, from the left up to a slider. */

import { byId, element } from "./dom.js";

export class Comparison {
  #over = element("img", { className: "over", alt: "" });
  #slider = element("input", { type: "range", min: 0, max: 100, value: 50, className: "split", "aria-label": "Where the two images meet" });
  #figure;

  /** @param {HTMLElement} figure of the image that is shown */
  constructor(figure) {
    this.#figure = figure;
    this.#slider.addEventListener("input", () => this.#split());
  }

  get running() {
    return this.#over.isConnected;
  }

  /** Compare with this image. @param {string} url @param {string} name */
  start(url, name) {
    this.#over.src = url;
    this.#over.alt = `Compared with: ${name}`;
    this.#slider.value = 50;
    this.#figure.append(this.#over, this.#slider);
    this.#split();
    byId("compare").setAttribute("aria-pressed", "true");
  }

  end() {
    this.#over.remove();
    this.#slider.remove();
    byId("compare").setAttribute("aria-pressed", "false");
  }

  #split() {
    this.#over.style.clipPath = `inset(0 ${100 - this.#slider.value}% 0 0)`;
  }
}
