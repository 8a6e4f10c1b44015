/** A mask that is painted over an image, with mouse, pen or finger. White is regenerated. */

const TINT = "rgb(214 51 108 / 55%)";

export class Mask {
  #canvas;
  #image = null;
  #operations = []; // strokes and inversions, which are replayed: so the last one can be undone

  /** Width of the brush, in pixels of the image. */
  brush = 32;

  /**
   * @param {HTMLCanvasElement} canvas
   * @param {function(): void} onChange
   */
  constructor(canvas, onChange) {
    this.#canvas = canvas;
    let stroke = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !event.isPrimary) return;
      canvas.setPointerCapture(event.pointerId);
      stroke = { brush: this.brush, points: [this.#pointOf(event)] };
      this.#operations.push(stroke);
      this.#draw();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!stroke || !event.isPrimary) return;
      stroke.points.push(this.#pointOf(event));
      this.#draw();
    });
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, () => {
        if (stroke) onChange();
        stroke = null;
      });
    }
  }

  /** Start on another image. @param {HTMLCanvasElement} image */
  load(image) {
    this.#image = image;
    this.#canvas.width = image.width;
    this.#canvas.height = image.height;
    this.clear();
  }

  get empty() {
    return this.#operations.length === 0;
  }

  undo() {
    this.#operations.pop();
    this.#draw();
  }

  invert() {
    this.#operations.push("invert");
    this.#draw();
  }

  clear() {
    this.#operations = [];
    this.#draw();
  }

  /** Return the mask alone: white on black. */
  painted() {
    const layer = this.#layer("#fff");
    const whole = new OffscreenCanvas(layer.width, layer.height);
    const context = whole.getContext("2d");
    context.fillRect(0, 0, whole.width, whole.height);
    context.drawImage(layer, 0, 0);
    return whole;
  }

  #pointOf(event) {
    const box = this.#canvas.getBoundingClientRect();
    const scale = this.#canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }

  /** Return the painted part in one colour, on transparency. */
  #layer(colour) {
    const layer = new OffscreenCanvas(this.#canvas.width, this.#canvas.height);
    const context = layer.getContext("2d");
    context.lineCap = context.lineJoin = "round";
    context.strokeStyle = context.fillStyle = "#fff";
    for (const operation of this.#operations) {
      if (operation === "invert") {
        context.globalCompositeOperation = "source-out";
        context.fillRect(0, 0, layer.width, layer.height);
        context.globalCompositeOperation = "source-over";
        continue;
      }
      const [first, ...rest] = operation.points;
      context.lineWidth = operation.brush;
      context.beginPath();
      context.moveTo(...first);
      for (const point of rest.length ? rest : [first]) context.lineTo(...point);
      context.stroke();
    }
    context.globalCompositeOperation = "source-in";
    context.fillStyle = colour;
    context.fillRect(0, 0, layer.width, layer.height);
    return layer;
  }

  #draw() {
    const context = this.#canvas.getContext("2d");
    context.drawImage(this.#image, 0, 0);
    context.drawImage(this.#layer(TINT), 0, 0);
  }
}
