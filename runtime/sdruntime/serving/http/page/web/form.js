/** The form: the settings of the next images, as the fields of `POST /v1/jobs`. */

import { byId, element } from "./dom.js";

const DRAFT = "sdruntime.draft";
const TEXTS = ["prompt", "negative", "model", "sampler", "schedule"];
const NUMBERS = ["steps", "guidance", "width", "height", "seed", "n"];

export class Form {
  #form = byId("settings");
  #problem = byId("problem");
  #capabilities = null;
  #others = {}; // fields of "use these" that have no control here
  #wanted = {}; // choices that wait for the lists

  /** @param {function(): void} onSubmit */
  constructor(onSubmit) {
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      onSubmit();
    });
    this.#form.addEventListener("input", () => {
      this.clear();
      this.#keep();
    });
    this.#form.model.addEventListener("change", () => this.#showModel());
    byId("loras").querySelector("button").addEventListener("click", () => this.#addLora());
    try {
      this.fill(JSON.parse(localStorage.getItem(DRAFT)) ?? {});
    } catch {
      localStorage.removeItem(DRAFT);
    }
  }

  /** Offer what the server has. @param {Object} capabilities as `/v1/capabilities` answers */
  offer(capabilities) {
    const before = this.fields();
    this.#capabilities = capabilities;
    const own = [["", "default"]];
    this.#options("model", capabilities.models.map(({ name }) => [name, name]), before.model);
    this.#options("sampler", [...own, ...capabilities.samplers.map((name) => [name, name])], before.sampler);
    this.#options("schedule", [...own, ...capabilities.schedules.map((name) => [name, name])], before.schedule);
    this.#form.steps.max = capabilities.limits.steps;
    this.#form.n.max = capabilities.limits.images;
    byId("loras").hidden = capabilities.loras.length === 0;
    if (capabilities.loras.length) this.#showLoras(before.loras ?? []);
    this.#wanted = {};
    this.#showModel();
  }

  /** What the server says of the chosen model, if it has been open. */
  get abilities() {
    return this.#capabilities?.models.find(({ name }) => name === this.#form.model.value)?.abilities ?? null;
  }

  /** What the sizes of its images are multiples of, and the most pixels that one may have. */
  get sizes() {
    return { multiple: this.abilities?.multiple ?? 64, pixels: this.#capabilities?.limits.pixels ?? 1024 * 1024 };
  }

  /** The fields of the form that are not empty. */
  fields() {
    const fields = { ...this.#others };
    for (const name of TEXTS) if (this.#form[name].value) fields[name] = this.#form[name].value;
    for (const name of NUMBERS) if (this.#form[name].value !== "") fields[name] = Number(this.#form[name].value);
    const loras = [...byId("loras").querySelectorAll("li")].map((row) => ({
      name: row.querySelector("select").value,
      scale: Number(row.querySelector("input").value),
    }));
    if (loras.length) fields.loras = loras;
    return { prompt: "", ...this.#wanted, ...fields };
  }

  /** Set the form to these fields; a field that is missing becomes empty. */
  fill(fields) {
    this.#others = {};
    this.#wanted = {};
    for (const name of ["model", "sampler", "schedule", "loras"]) if (fields[name]) this.#wanted[name] = fields[name];
    byId("loras").querySelector("ul").replaceChildren();
    for (const name of TEXTS) this.#form[name].value = fields[name] ?? "";
    for (const name of NUMBERS) this.#form[name].value = fields[name] ?? (name === "n" ? 1 : "");
    for (const [name, value] of Object.entries(fields)) {
      if (![...TEXTS, ...NUMBERS, "loras"].includes(name)) this.#others[name] = value;
    }
    if (this.#capabilities) this.offer(this.#capabilities);
    this.#keep();
  }

  /** Show an error of the server, at the field that it names. */
  complain(message) {
    this.clear();
    this.#problem.textContent = message;
    const named = [...TEXTS, ...NUMBERS].find((name) => new RegExp(`\\b${name}\\b`).test(message.split(":")[0]) || message.startsWith(name));
    const field = named && this.#form[named];
    if (!field) return;
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-describedby", "problem");
    field.closest(".field").after(this.#problem);
    field.focus();
  }

  /** Take the last error away. */
  clear() {
    this.#problem.textContent = "";
    this.#form.querySelector(".submit").append(this.#problem);
    for (const field of this.#form.querySelectorAll("[aria-invalid]")) {
      field.removeAttribute("aria-invalid");
      field.removeAttribute("aria-describedby");
    }
  }

  #keep() {
    localStorage.setItem(DRAFT, JSON.stringify(this.fields()));
  }

  #options(name, rows, wanted) {
    this.#form[name].replaceChildren(...rows.map(([value, text]) => element("option", { value }, text)));
    this.#form[name].value = rows.some(([value]) => value === wanted) ? wanted : rows[0][0];
  }

  #showModel() {
    const abilities = this.abilities;
    for (const [k, name] of ["width", "height"].entries()) {
      this.#form[name].step = abilities?.multiple ?? 8;
      this.#form[name].placeholder = abilities?.size[k] ?? "default";
    }
    this.#form.sampler.options[0].textContent = abilities ? `${abilities.sampler} (default)` : "default";
    this.#form.steps.placeholder = abilities?.steps ?? "default";
    this.#form.guidance.placeholder = abilities?.guidance ?? "default";
  }

  #showLoras(loras) {
    byId("loras").querySelector("ul").replaceChildren();
    for (const lora of loras) this.#addLora(lora);
  }

  #addLora({ name = this.#capabilities.loras[0], scale = 1 } = {}) {
    const choices = this.#capabilities.loras.map((value) => element("option", { value, selected: value === name }, value));
    const remove = element("button", { type: "button", className: "quiet", "aria-label": "Remove the LoRA" }, "×");
    const row = element(
      "li",
      { className: "row" },
      element("select", { "aria-label": "LoRA" }, ...choices),
      element("input", { type: "number", step: "0.05", value: scale, "aria-label": "Scale of the LoRA" }),
      remove,
    );
    remove.addEventListener("click", () => {
      row.remove();
      this.#keep();
    });
    byId("loras").querySelector("ul").append(row);
    this.#keep();
  }
}
