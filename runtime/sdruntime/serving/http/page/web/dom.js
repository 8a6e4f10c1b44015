/** Elements: making them, and what several modules do with files. */

/**
 * Return a new element. Text children become text nodes, so nothing is ever read as HTML.
 * @param {string} name
 * @param {Object} properties of the element; a name with a dash, or "role", is an attribute
 * @param {...(Node|string)} children
 */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

/** Return the element with this id. */
export const byId = (id) => document.getElementById(id);

/** Return a file in base64. @param {Blob} blob @returns {Promise<string>} */
export function base64Of(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** Return the first image among the files of a drop or a paste, if there is one. @param {DataTransfer} transfer */
export function imageIn(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));
}

/** Resolve after some milliseconds. */
export const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
