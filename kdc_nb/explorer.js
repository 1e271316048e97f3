// Explorers without a kernel: every picture of a grid of values has been drawn before. A file holds each piece of
// a picture once (`pieces`), and for each combination of values (`pictures`, the last control changes fastest)
// which pieces it is made of, or why there is none.

async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), c => c.charCodeAt(0))
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))
  return new Response(stream).json()
}

function readControl(input) {
  return input.type === "checkbox" ? Number(input.checked) : Number(input.value)
}

function setControl(input, index) {
  if (input.type === "checkbox") input.checked = index === 1
  else input.value = index
  const text = JSON.parse(input.dataset.texts)[index]
  if (input.type === "range") {
    input.nextElementSibling.value = text
    input.setAttribute("aria-valuetext", text)
  }
}

// The value at a place of an axis {from, to, low, high, log, percent}, as its labels count
function valueAt(axis, place) {
  const share = (place - axis.from)/(axis.to - axis.from)
  const value = axis.log ? axis.low*(axis.high/axis.low)**share : axis.low + share*(axis.high - axis.low)
  return axis.percent ? 100*value : value
}

// The mark nearest to a place of a panel, as {distance, text}
function nearestMark(panel, x, y) {
  let best = { distance: Infinity }
  for (const piece of panel.querySelectorAll("[data-axes]")) {
    const axes = JSON.parse(piece.dataset.axes)
    for (const mark of piece.querySelectorAll("use")) {
      const at = [mark.x.baseVal.value, mark.y.baseVal.value]
      const distance = Math.hypot(at[0] - x, at[1] - y)
      const beside = at[0] < axes.x.from - 1 || at[0] > axes.x.to + 1
      if (distance >= best.distance || beside || at[1] > axes.y.from + 1 || at[1] < axes.y.to - 1) continue
      const words = ["x", "y"].map((k, i) => `${axes[k].label} ${Number(valueAt(axes[k], at[i]).toPrecision(4))}`)
      best = { distance, text: words.join("\n") }
    }
  }
  return best
}

function tellMarks(root, note) {
  const hide = () => { note.hidden = true }
  const tell = event => {
    const panel = event.target.closest("svg")
    if (!panel) return hide()
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(panel.getScreenCTM().inverse())
    const { distance, text } = nearestMark(panel, place.x, place.y)
    note.hidden = !(distance < 8)
    if (note.hidden) return
    note.textContent = text
    note.style.left = `${Math.min(event.clientX + 12, innerWidth - note.offsetWidth - 4)}px`
    note.style.top = `${event.clientY + 12}px`
  }
  const panels = root.querySelector(".kdc-panels")
  panels.addEventListener("pointermove", tell)
  panels.addEventListener("pointerdown", tell)
  panels.addEventListener("pointerleave", event => event.pointerType === "mouse" && hide())
  document.addEventListener("pointerdown", event => panels.contains(event.target) || hide())
}

// The panels side by side, as one drawing
function asSvg(panels) {
  const parts = [...panels.querySelectorAll("svg")], boxes = parts.map(p => p.viewBox.baseVal)
  const width = boxes.reduce((sum, b) => sum + b.width, 0), height = boxes[0].height
  const write = new XMLSerializer(), inside = parts.flatMap(p => [...p.childNodes]) // all in the figure's coordinates
    .map(node => write.serializeToString(node)).join("")
  return `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="${width}pt"
    height="${height}pt" viewBox="0 0 ${width} ${height}"><rect width="100%" height="100%" fill="white"/>${inside}</svg>`
}

function download(url, name) {
  const link = document.createElement("a")
  link.href = url
  link.download = name
  link.click()
}

async function savePng(svg, name) {
  const image = new Image()
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(svg)
  await image.decode()
  const canvas = document.createElement("canvas")
  canvas.width = 2*image.width
  canvas.height = 2*image.height
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height)
  download(canvas.toDataURL("image/png"), name)
}

async function start(root) {
  const { pieces, pictures } = await unpack(root.querySelector(".kdc-pictures").textContent)
  const inputs = [...root.querySelectorAll("[data-texts]")], panels = root.querySelector(".kdc-panels")
  const places = panels.querySelectorAll("[data-piece]")
  const refusal = root.querySelector(".kdc-refusal"), shown = []

  function show() {
    const sizes = inputs.map(i => JSON.parse(i.dataset.texts).length)
    const picture = pictures[inputs.reduce((index, input, k) => index*sizes[k] + readControl(input), 0)]
    const refused = typeof picture === "string"
    refusal.textContent = refused ? `${picture} (the picture is of the values before)` : ""
    panels.classList.toggle("kdc-stale", refused)
    if (refused) return
    places.forEach(place => {
      const k = place.dataset.piece
      if (shown[k] !== picture[k]) place.innerHTML = pieces[shown[k] = picture[k]]
    })
  }

  for (const input of inputs) {
    input.addEventListener("input", () => { setControl(input, readControl(input)); show() })
  }
  for (const button of root.querySelectorAll("[data-set]")) {
    button.addEventListener("click", () => {
      for (const [k, index] of Object.entries(JSON.parse(button.dataset.set))) setControl(inputs[k], index)
      show()
    })
  }
  const name = root.dataset.name
  root.querySelector(".kdc-svg").addEventListener("click", () =>
    download(URL.createObjectURL(new Blob([asSvg(panels)], { type: "image/svg+xml" })), `${name}.svg`))
  root.querySelector(".kdc-png").addEventListener("click", () =>
    savePng(asSvg(panels), `${name}.png`).catch(e => { refusal.textContent = `not saved: ${e.message}` }))
  tellMarks(root, root.querySelector(".kdc-note"))
  inputs.forEach(input => setControl(input, readControl(input))) // a browser may have kept older ones
  show()
  root.classList.add("kdc-ready")
}

for (const root of document.querySelectorAll(".kdc-page")) {
  start(root).catch(e => { root.querySelector(".kdc-refusal").textContent = `the controls do not work here: ${e.message}` })
}
