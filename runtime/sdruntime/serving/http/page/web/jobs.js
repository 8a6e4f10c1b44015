/** The jobs of this browser: submitting them, and following them to their end, also those of an earlier visit. */

import * as api from "./api.js";
import { pause } from "./dom.js";

const EVERY = 700; // milliseconds between two looks at the jobs that have no event stream

/** Return a key that no other request has. (crypto.randomUUID needs a secure context.) */
const newKey = () => [...crypto.getRandomValues(new Uint32Array(4))].map((part) => part.toString(16)).join("-");

export class Jobs {
  #history;
  #show;
  #unfinished = new Map();
  #following = false;
  #stream = null; // of one job: browsers allow few connections to a server
  #unanswered = { fields: "", key: "" };

  /**
   * @param {History} history
   * @param {function(Object, string=): void} show called with a record that changed, and its preview
   */
  constructor(history, show) {
    this.#history = history;
    this.#show = show;
  }

  /** Submit `fields.n` images. Rejects as the API does; the same fields after a lost connection repeat no work. */
  async submit(fields, label = "") {
    const text = JSON.stringify(fields);
    if (this.#unanswered.fields !== text) this.#unanswered = { fields: text, key: newKey() };
    let jobs;
    try {
      jobs = await api.submit({ ...fields, preview: true }, this.#unanswered.key);
    } catch (error) {
      if (!(error instanceof api.Offline)) this.#unanswered = { fields: "", key: "" };
      throw error;
    }
    this.#unanswered = { fields: "", key: "" };
    const order = Date.now();
    for (const [k, job] of jobs.entries()) {
      const record = { ...job, label, order: order + k / 100, request: { ...fields, n: 1, seed: job.seed } };
      await this.#history.put(record);
      this.follow(record);
    }
  }

  /** Follow a record until its job is over. */
  follow(record) {
    this.#show(record);
    if (api.isOver(record) && !(record.state === "done" && !record.blob)) return;
    this.#unfinished.set(record.id, record);
    this.#run();
  }

  /** Forget a record whose image the user deleted. */
  forget(id) {
    this.#unfinished.delete(id);
  }

  async #run() {
    if (this.#following) return;
    this.#following = true;
    while (this.#unfinished.size) {
      for (const record of [...this.#unfinished.values()]) {
        if (this.#stream?.id !== record.id) await this.#look(record);
      }
      this.#listen();
      await pause(EVERY);
    }
    this.#following = false;
  }

  /** Ask for the state of a job. */
  async #look(record) {
    try {
      await this.#update(record, await api.job(record.id));
    } catch (error) {
      await this.#failed(record, error);
    }
  }

  /** Listen to the first running job, for its preview. */
  #listen() {
    if (this.#stream || document.visibilityState !== "visible") return;
    const record = [...this.#unfinished.values()].find(({ state }) => state === "running");
    if (!record) return;
    const end = api.events(record.id, {
      onJob: (job) => this.#update(record, job),
      onPreview: (preview) => this.#unfinished.has(record.id) && this.#show(record, preview),
      onEnd: () => {
        this.#stream = null;
      },
    });
    this.#stream = { id: record.id, end };
  }

  async #update(record, job) {
    if (!this.#unfinished.has(record.id)) return;
    Object.assign(record, job);
    if (api.isOver(record)) {
      try {
        if (record.state === "done") record.blob = await api.image(record.id);
      } catch (error) {
        await this.#failed(record, error);
        return;
      }
      if (!this.#unfinished.delete(record.id)) return;
      await this.#history.put(record);
    }
    this.#show(record);
  }

  /** A job that the server does not know any more is lost; after other errors it is asked again. */
  async #failed(record, error) {
    if (error.status !== 404) return;
    this.#unfinished.delete(record.id);
    record.state = "failed";
    record.error = { code: "lost", message: "The server has been restarted, or no longer keeps this image." };
    await this.#history.put(record);
    this.#show(record);
  }
}
