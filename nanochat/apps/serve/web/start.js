// ----- the page

function showView() {
  const links = [...document.querySelectorAll("nav a")];
  const current = links.find((link) => link.hash === location.hash) ?? links[0];
  for (const link of links) {
    $(link.hash.slice(1)).hidden = link !== current;
    if (link === current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  tip.hide();
  $("connection").textContent = "";
  if (current.hash === "#watch") poll();
  if (current.hash === "#heat") heat.begin();
}

document.addEventListener("keydown", (event) => {
  if ($("ask").open) return;
  if (event.key === "Escape") {
    // a choice of alternatives is closed first
    if (!tip.pinned) stopAll();
    tip.hide();
  }
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("play").hidden) {
    event.preventDefault();
    if (chat.isOn) chat.send();
    else runAll();
  }
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("heat").hidden) {
    event.preventDefault();
    heat.run();
  }
});
document.addEventListener("pointerdown", (event) => {
  if (tip.pinned && !tip.node.contains(event.target)) tip.hide();
});
document.addEventListener("visibilitychange", poll);
addEventListener("hashchange", showView);

$("run").addEventListener("click", runAll);
$("stop").addEventListener("click", stopAll);
$("prompt").addEventListener("change", keepSettings);
$("compare").addEventListener("change", () => {
  if ($("compare").checked) startComparing();
  showPanes();
  keepSettings();
});
$("shade").addEventListener("change", () => { showShade(); keepSettings(); });
$("mode").addEventListener("change", (event) => {
  chat.wanted = event.target.value === "chat";
  chat.show();
  keepSettings();
});
$("composer").addEventListener("submit", (event) => { event.preventDefault(); chat.send(); });
$("message").addEventListener("keydown", (event) => {
  // an input method uses Enter for itself
  if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.metaKey || event.isComposing) return;
  event.preventDefault();
  chat.send();
});
$("chat-stop").addEventListener("click", () => chat.stop());
$("chat-new").addEventListener("click", () => chat.clear());
$("system").addEventListener("change", keepSettings);
$("filter").addEventListener("input", showRuns);
$("axis").addEventListener("change", drawAll);
$("smooth").addEventListener("change", drawAll);
$("none").addEventListener("click", () => { watching.chosen.clear(); showRuns(); drawAll(); });
$("sample-prompt").addEventListener("change", () => { watching.prompt = watching.prompts[$("sample-prompt").selectedIndex]; showSamples(); });
$("sample-step").addEventListener("input", () => {
  const at = Number($("sample-step").value);
  watching.step = at === watching.steps.length - 1 ? null : watching.steps[at];
  showSamples();
});
$("give-key").addEventListener("click", async () => {
  try {
    await askForKey(false);
    await loadModels();
    poll();
  } catch {
    // cancelled again
  }
});
$("charts").append(...charts.map((chart) => chart.node));

recallSettings();
showPanes();
showShade();
showView();
loadModels().then(() => { if ($("compare").checked) showPanes(); });
if (!$("play").hidden) $("prompt").focus();
