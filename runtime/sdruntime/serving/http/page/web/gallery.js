/** The gallery: a card for each record, with the progress of those that are not over. */

import { isOver } from "./api.js";
import { byId, element } from "./dom.js";

export class Gallery {
  #list = byId("gallery");
  #cards = new Map(); // by id: { record, item, url }
  #actions;

  /** @param {{open, cancel, finish, remove}} actions each called with a record */
  constructor(actions) {
    this.#actions = actions;
  }

  /** The records that have an image, the newest first. */
  get pictured() {
    return [...this.#list.children].map((item) => this.#cards.get(item.dataset.id).record).filter(({ blob }) => blob);
  }

  /** Return the URL of a record's image. */
  url(id) {
    return this.#cards.get(id)?.url ?? "";
  }

  /** Show a record, or what changed of it. @param {string} [preview] a data URL */
  show(record, preview) {
    let card = this.#cards.get(record.id);
    if (!card) {
      card = { item: element("li", { className: "card" }), url: "", preview: "" };
      card.item.dataset.id = record.id;
      this.#cards.set(record.id, card);
      const older = [...this.#list.children].find((item) => this.#cards.get(item.dataset.id).record.order < record.order);
      this.#list.insertBefore(card.item, older ?? null);
    }
    const changed = card.item.dataset.state !== record.state || Boolean(record.blob) !== Boolean(card.url);
    card.record = record;
    card.preview = preview ?? card.preview;
    if (record.blob && !card.url) card.url = URL.createObjectURL(record.blob);
    if (changed) {
      card.item.dataset.state = record.state;
      card.item.replaceChildren(...(isOver(record) ? this.#ended(card) : this.#unfinished(card)));
    }
    if (!isOver(record)) this.#advance(card);
    byId("empty").hidden = true;
  }

  /** Take a record away. */
  remove(id) {
    const card = this.#cards.get(id);
    if (!card) return;
    if (card.url) URL.revokeObjectURL(card.url);
    card.item.remove();
    this.#cards.delete(id);
    byId("empty").hidden = this.#cards.size > 0;
  }

  #ended({ record, url }) {
    const prompt = element("p", {}, record.label || record.request.prompt || "no prompt");
    if (record.blob) {
      const open = element("button", { type: "button", "aria-label": `Open: ${record.request.prompt}, seed ${record.seed}` });
      open.append(element("img", { src: url, alt: "", loading: "lazy" }));
      open.addEventListener("click", () => this.#actions.open(record));
      return [open, element("div", { className: "caption" }, prompt)];
    }
    const text = record.error?.message ?? "Cancelled";
    const why = element("p", { className: record.state === "cancelled" ? "" : "problem" }, record.state === "cancelled" ? "Cancelled" : text);
    const actions = element(
      "div",
      { className: "actions" },
      this.#button("Use these", "use", record),
      this.#button("Delete", "remove", record),
    );
    return [element("div", { className: "caption" }, prompt, why, actions)];
  }

  #unfinished({ record }) {
    const actions = element("div", { className: "actions" }, this.#button("Stop", "cancel", record));
    if (record.state === "running") actions.append(this.#button("Finish now", "finish", record));
    return [
      element("div", { className: "blank" }),
      element(
        "div",
        { className: "caption" },
        element("p", {}, record.label || record.request.prompt || "no prompt"),
        element("progress", { max: 1, value: 0, "aria-label": "Progress" }),
        element("span", { className: "state" }),
        actions,
      ),
    ];
  }

  #advance({ record, item, preview }) {
    item.querySelector("progress").value = record.steps ? record.step / record.steps : 0;
    item.querySelector(".state").textContent = stateOf(record);
    const place = item.firstElementChild;
    if (preview && place.localName !== "img") place.replaceWith(element("img", { src: preview, alt: "Preview" }));
    else if (preview) place.src = preview;
  }

  #button(text, action, record) {
    const button = element("button", { type: "button" }, text);
    button.addEventListener("click", () => this.#actions[action](record));
    return button;
  }
}

/** Return what a job does, in words. */
export function stateOf(record) {
  if (record.state === "waiting") return record.position ? `Waiting: ${record.position} before it` : "Waiting";
  if (record.state === "running") return record.steps ? `Step ${record.step} of ${record.steps}` : "Starting";
  return { done: "Done", cancelled: "Cancelled" }[record.state] ?? "Failed";
}
