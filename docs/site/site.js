// What is wider than the screen can be reached and scrolled with the keyboard; its copy buttons have names (axe-core).
function reach() {
  for (const one of document.querySelectorAll(".md-typeset pre > code, .md-typeset__scrollwrap"))
    if (one.scrollWidth > one.clientWidth) one.setAttribute("tabindex", "0")
    else one.removeAttribute("tabindex")
  document.querySelectorAll(".md-code__nav").forEach((one, number) => one.setAttribute("aria-label", `Code ${number + 1}`))
}
addEventListener("load", reach)
addEventListener("resize", reach)
