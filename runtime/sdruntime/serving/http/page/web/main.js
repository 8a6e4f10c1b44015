/** The page: what its parts do for each other. */

import * as api from "./api.js";
import { watchServer } from "./connection.js";
import { byId } from "./dom.js";
import { Form } from "./form.js";
import { Gallery, stateOf } from "./gallery.js";
import { History } from "./history.js";
import { Jobs } from "./jobs.js";
import { Viewer } from "./viewer.js";

const history = new History(changedElsewhere);
const gallery = new Gallery({ open, cancel, finish, remove, use });
const jobs = new Jobs(history, show);
const form = new Form(generate);
const viewer = new Viewer(gallery, { use, remove });

async function generate() {
  form.clear();
  try {
    await jobs.submit(form.fields());
  } catch (error) {
    form.complain(error.message);
  }
}

function show(record, preview) {
  gallery.show(record, preview);
  if (!preview && (api.isOver(record) || record.state === "waiting")) byId("announcement").textContent = stateOf(record);
}

function open(record) {
  viewer.open(record);
}

/** End a job. An error, such as a job that the server has lost, shows in its card at the next look at it. */
async function end(call, record) {
  try {
    await call(record.id);
  } catch (error) {
    form.complain(error.message);
  }
}

function cancel(record) {
  return end(api.cancel, record);
}

function finish(record) {
  return end(api.finish, record);
}

async function remove(record) {
  jobs.forget(record.id);
  await history.remove(record.id);
  gallery.remove(record.id);
}

function use(record) {
  form.fill(record.request);
  byId("settings").prompt.focus();
}

/** Another tab has changed a record, or deleted it. */
async function changedElsewhere(id) {
  const record = await history.get(id);
  if (record) jobs.follow(record);
  else {
    jobs.forget(id);
    gallery.remove(id);
  }
}

/** Say whether the server is there, and which model it opens. */
function report(capabilities, reason) {
  const line = byId("connection");
  line.className = capabilities ? "ready" : "offline";
  if (!capabilities) {
    line.textContent = reason;
    return;
  }
  const { models } = capabilities;
  const fault = models.find((model) => model.fault);
  const opening = models.find(({ stage }) => stage === "opening");
  if (fault) line.className = "offline";
  else if (opening) line.className = "";
  line.textContent = fault ? `${fault.name}: ${fault.fault}` : opening ? `Opening ${opening.name}…` : "Ready";
  form.offer(capabilities);
}

addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter" && !viewer.record) byId("settings").requestSubmit();
});

for (const record of await history.all()) jobs.follow(record);
watchServer(report);
