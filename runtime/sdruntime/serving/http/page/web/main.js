/** The page: what its parts do for each other. */

import * as api from "./api.js";
import { Controls } from "./controls.js";
import { base64Of, byId, imageIn } from "./dom.js";
import { Form } from "./form.js";
import { Gallery, stateOf } from "./gallery.js";
import { History } from "./history.js";
import { Jobs } from "./jobs.js";
import { Source } from "./source.js";
import { Viewer } from "./viewer.js";

const history = new History(changedElsewhere);
const gallery = new Gallery({ open, cancel, finish, remove, use });
const jobs = new Jobs(history, show);
const form = new Form(generate);
const source = new Source();
const controls = new Controls();
const viewer = new Viewer(gallery, { use, start, remove });

async function generate() {
  form.clear();
  try {
    const fields = { ...form.fields(), ...(await source.fields()), ...controls.fields() };
    if (fields.image) ["width", "height"].forEach((name) => delete fields[name]); // they are the image's
    await jobs.submit(fields);
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

/** Put the settings and control images of a record into the form; its start image stays where it is. */
function use({ request }) {
  const { image, mask, strength, extend, controls: images = [], ...settings } = request;
  form.fill(settings);
  offerControls();
  controls.fill(images);
  if (image) byId("strength").value = strength;
  byId("settings").prompt.focus();
}

/** Start from an image of the gallery. */
function start({ blob }) {
  return load(blob);
}

async function load(file) {
  try {
    const { multiple, pixels } = form.sizes;
    await source.load(file, multiple, pixels);
  } catch (error) {
    byId("read").textContent = `${file.name ?? "The image"} cannot be read: ${error.message}`;
  }
}

/** Take a file as the start image, and offer the settings that it holds. */
async function read(file) {
  const line = byId("read");
  line.replaceChildren();
  await load(file);
  try {
    const { fields, parameters } = await api.readSettings(await base64Of(file));
    if (!parameters) return;
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Use the settings in this file" });
    button.addEventListener("click", () => {
      use({ request: fields });
      source.remove();
      line.replaceChildren();
    });
    line.replaceChildren(button);
  } catch (error) {
    line.textContent = error.message;
  }
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
  offerControls();
}

/** Offer the control networks of the chosen model. */
function offerControls() {
  controls.offer(form.abilities?.controlnets ?? []);
}

addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter" && !viewer.record) byId("settings").requestSubmit();
});

byId("settings").model.addEventListener("change", offerControls);
byId("file").addEventListener("change", ({ target }) => target.files.length && read(target.files[0]));
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const file = imageIn(event.dataTransfer);
  if (file) read(file);
});

for (const record of await history.all()) jobs.follow(record);
api.watchServer(report);
