/** The server's API, and whether it can be reached. Every call resolves with its JSON, or rejects with Problem or Offline. */

import { pause } from "./dom.js";

const EVERY = 4000; // milliseconds between two questions what the server can do
const EVERY_OFFLINE = 1000;

/** An error that the server answered. */
export class Problem extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered with status ${status}`);
    this.status = status;
    this.code = error?.code ?? null;
  }
}

/** No answer: the server is not running, or cannot be reached. */
export class Offline extends Error {}

async function answer(method, path, body, headers = {}) {
  let response;
  try {
    const options = { method, headers, cache: "no-store" };
    if (body !== undefined) {
      options.body = JSON.stringify(body);
      options.headers = { "Content-Type": "application/json", ...headers };
    }
    response = await fetch(path, options);
  } catch {
    throw new Offline("The server cannot be reached.");
  }
  if (!response.ok) throw new Problem(response.status, (await response.json().catch(() => ({}))).error);
  return response;
}

const json = async (...call) => (await answer(...call)).json();
const jobPath = (id) => `/v1/jobs/${encodeURIComponent(id)}`;

export const capabilities = () => json("GET", "/v1/capabilities");

/** Read the settings of an image file. @param {string} image in base64 */
export const readSettings = (image) => json("POST", "/v1/settings", { image });

/** Submit images. A call with the key of an earlier one returns its jobs again. */
export const submit = async (fields, key) => (await json("POST", "/v1/jobs", fields, { "Idempotency-Key": key })).jobs;

export const job = (id) => json("GET", jobPath(id));
export const cancel = (id) => json("DELETE", jobPath(id));
export const finish = (id) => json("POST", `${jobPath(id)}/finish`, {});

/** Return the image file of a finished job. @returns {Promise<Blob>} */
export const image = async (id) => (await answer("GET", `${jobPath(id)}/image`)).blob();

/**
 * Listen to a job: `onJob` with its state, `onPreview` with a PNG as a data URL. Ends with the job or at a lost connection.
 * @returns {function(): void} ends it
 */
export function events(id, { onJob, onPreview, onEnd }) {
  const source = new EventSource(`${jobPath(id)}/events`);
  const close = () => {
    source.close();
    onEnd();
  };
  source.addEventListener("job", (event) => {
    const state = JSON.parse(event.data);
    onJob(state);
    if (isOver(state)) close();
  });
  source.addEventListener("preview", (event) => onPreview(`data:image/png;base64,${JSON.parse(event.data).png}`));
  source.onerror = close;
  return () => source.close();
}

/** Whether a job has ended. */
export const isOver = ({ state }) => state !== "waiting" && state !== "running";

/**
 * Report the server's capabilities whenever they change, and `null` when it cannot be reached, while the page is visible.
 * @param {function(?Object, string): void} report with the capabilities, and the reason if there are none
 */
export async function watchServer(report) {
  let last;
  for (;;) {
    let now = null;
    let reason = "";
    if (document.visibilityState === "visible") {
      try {
        now = await capabilities();
      } catch (error) {
        reason = error instanceof Offline ? "Offline: trying again…" : error.message;
      }
      const state = JSON.stringify(now) + reason;
      if (state !== last) report(now, reason);
      last = state;
    }
    await pause(now || document.visibilityState !== "visible" ? EVERY : EVERY_OFFLINE);
  }
}
