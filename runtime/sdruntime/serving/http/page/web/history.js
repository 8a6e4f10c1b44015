/**
 * The images of this browser, in IndexedDB. All tabs share them; a change in one is announced to the others.
 *
 * A record is a job of the server as `/v1/jobs/ID` describes it, and: `request`, the fields that it was submitted with;
 * `order`, milliseconds since 1970; `blob`, its image file.
 */

const DATABASE = "sdruntime";
const STORE = "images";

/** Return the result of an IndexedDB request. */
const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

export class History {
  #database;
  #channel = new BroadcastChannel(DATABASE);

  /** @param {function(string): void} onChange called with the id of a record that another tab has changed */
  constructor(onChange) {
    const opening = indexedDB.open(DATABASE, 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id" });
    this.#database = settled(opening);
    this.#channel.onmessage = (event) => onChange(event.data);
  }

  async #store(mode) {
    return (await this.#database).transaction(STORE, mode).objectStore(STORE);
  }

  /** Return all records, the newest first. */
  async all() {
    const records = await settled((await this.#store("readonly")).getAll());
    return records.sort((a, b) => b.order - a.order);
  }

  async get(id) {
    return settled((await this.#store("readonly")).get(id));
  }

  async put(record) {
    await settled((await this.#store("readwrite")).put(record));
    this.#channel.postMessage(record.id);
  }

  async remove(id) {
    await settled((await this.#store("readwrite")).delete(id));
    this.#channel.postMessage(id);
  }
}
