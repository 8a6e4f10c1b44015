/** Whether the server can be reached, and what it can do: asked for every few seconds while the page is visible. */

import { Offline, capabilities } from "./api.js";
import { pause } from "./dom.js";

const EVERY = 4000; // milliseconds
const EVERY_OFFLINE = 1000;

/**
 * Report the server's capabilities whenever they change, and `null` when it cannot be reached.
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
