// Sections of all pages that hold every word that is asked for, those with it in their title first.
// (`unpack` is in explorer.js, which comes before.)

// How well a section [url, page, title, text] answers: words in its title count ten times
function score([, page, title, text], words) {
  const name = `${page} ${title}`.toLowerCase(), body = text.toLowerCase()
  const counts = words.map(w => 10*name.includes(w) + Math.min(5, body.split(w).length - 1))
  return counts.every(n => n > 0) ? counts.reduce((a, b) => a + b, 0) : 0
}

function entry([url, page, title, text], words) {
  const link = document.createElement("a"), line = document.createElement("p"), small = document.createElement("small")
  link.href = url
  link.textContent = title === page ? page : `${page}: ${title}`
  const at = Math.max(0, Math.min(...words.map(w => text.toLowerCase().indexOf(w)).filter(i => i >= 0)) - 60)
  small.textContent = Number.isFinite(at) ? `… ${text.slice(at, at + 200)} …` : text.slice(0, 200)
  line.append(link, document.createElement("br"), small)
  return line
}

const asked = new URLSearchParams(location.search).get("q") ?? ""
const words = asked.toLowerCase().split(/[\s"'“”‘’]+/).filter(Boolean)
const sections = await unpack(document.getElementById("sections").textContent)
const found = sections.map(s => [score(s, words), s]).filter(([n]) => words.length && n).sort((a, b) => b[0] - a[0])
document.querySelector("input[name=q]").value = asked
document.getElementById("found").replaceChildren(
  words.length ? `${found.length} ${found.length === 1 ? "section" : "sections"} with ${words.join(", ")}`
    + (found.length > 40 ? ", the best 40 of them" : "") : "Nothing was asked for",
  ...found.slice(0, 40).map(([, s]) => entry(s, words)))
