// The arena page. What models say is only ever set as text.

import { KEY, Refused, call, streamed } from "./api.js";
import { download, loadLeaderboard } from "./leaderboard.js";
import { clearScores, scoresOf, showScores } from "./scores.js";

const $ = (selector) => document.querySelector(selector);
const BLIND_ANY = "";
const VERDICTS = { a: "A is better", b: "B is better", tie: "a tie", both_bad: "both bad" };

const page = { models: [], battle: null, stopper: null, said: null };

// --- Messages and the key --------------------------------------------------------------------------------------------

function showError(error) {
  if (error?.name === "AbortError") return;
  const box = $("#error");
  box.hidden = !error || error.status === 401;
  box.textContent = error ? error.message : "";
  if (error && !(error instanceof Refused)) throw error; // a mistake of this page: also to the console
}

function askForKey() {
  const form = $("#key-form");
  form.hidden = false;
  form.querySelector("label").textContent = sessionStorage.getItem(KEY)
    ? "The server does not know this API key; another one?"
    : "This server asks for an API key";
  $("#key").focus();
}

async function useKey(event) {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("#key").value.trim());
  $("#key").value = "";
  $("#key-form").hidden = true;
  await openPage();
}

// --- Comparing -------------------------------------------------------------------------------------------------------

const blind = () => $("#ask").elements.mode.value === "blind";

async function loadModels() {
  const { data } = await (await call("/v1/models")).json();
  page.models = data.map((model) => model.id).filter((id) => id !== "latest"); // a second name
  fillChoices();
  if (page.models.length < 2)
    throw new Refused(`A comparison needs two iterates; this server has ${page.models.length}. It serves more with --models.`);
}

/** In blind mode either both iterates are named or neither is. */
function fillChoices() {
  const names = blind() ? [BLIND_ANY, ...page.models] : page.models;
  const before = [$("#first").value, $("#second").value];
  const wanted = blind() ? [BLIND_ANY, BLIND_ANY] : [page.models[0], page.models.at(-1)];
  for (const [index, select] of [$("#first"), $("#second")].entries()) {
    select.replaceChildren(...names.map((name) => new Option(name === BLIND_ANY ? "any iterate" : name, name)));
    select.value = names.includes(before[index]) && before[index] !== BLIND_ANY ? before[index] : (wanted[index] ?? "");
  }
  keepPair($("#first"), $("#second"));
}

function keepPair(changed, other) {
  if (!blind()) return;
  if (changed.value === BLIND_ANY) other.value = BLIND_ANY;
  else if (other.value === BLIND_ANY || other.value === changed.value)
    other.value = page.models.filter((name) => name !== changed.value).at(-1) ?? BLIND_ANY;
}

function changeMode() {
  fillChoices();
  reset();
}

function reset() {
  page.battle = null;
  page.said = null;
  clearScores();
  showError(null);
  $("#ballot").hidden = !blind();
  $("#again").hidden = true;
  $("#outcome").textContent = blind() ? "" : "Names are shown, so there is no vote.";
  allowVotes(false);
  for (const side of ["a", "b"]) {
    const card = $(`#side-${side}`);
    card.classList.remove("won", "failed", "named", "writing");
    card.querySelector(".answer").textContent = "";
    card.querySelector(".status").textContent = "";
    nameSide(side, blind() ? null : $(side === "a" ? "#first" : "#second").value);
  }
  for (const button of document.querySelectorAll("[data-verdict]")) button.setAttribute("aria-pressed", "false");
}

function nameSide(side, name, digest) {
  const card = $(`#side-${side}`);
  card.classList.toggle("named", Boolean(name));
  card.querySelector(".name").textContent = name || "hidden";
  card.querySelector(".name").title = digest ? `checkpoint ${digest}` : "";
}

async function compare(event) {
  event?.preventDefault();
  if (page.stopper || !$("#ask").reportValidity()) return;
  if (!$("#prompt").value.trim()) return $("#prompt").focus();
  reset();
  $("#main").focus({ preventScroll: true }); // so that 1 to 4 are votes; hides a phone's keyboard
  busy(true);
  try {
    const sides = blind() ? await drawBattle() : openPair();
    const request = {
      messages: [{ role: "user", content: $("#prompt").value.trim() }],
      temperature: $("#temperature").valueAsNumber,
      max_tokens: $("#max-tokens").valueAsNumber,
      seed: sides.seed,
    };
    const answers = await Promise.all(["a", "b"].map((side) => answer(side, { ...request, model: sides[side] })));
    const whole = answers.every(Boolean);
    if (whole) page.said = { messages: request.messages, answers };
    if (!blind()) return await score([sides.a, sides.b]);
    if (whole) allowVotes(true);
    else $("#outcome").textContent = "No vote without two whole answers.";
  } catch (error) {
    showError(error);
  } finally {
    busy(false);
    $("#again").hidden = false;
  }
}

async function drawBattle() {
  const models = [$("#first").value, $("#second").value];
  const wish = models.includes(BLIND_ANY) ? {} : { models };
  page.battle = await (await call("/v1/battles", wish, page.stopper.signal)).json();
  return page.battle;
}

function openPair() {
  return { a: $("#first").value, b: $("#second").value, seed: crypto.getRandomValues(new Uint32Array(1))[0] >>> 1 };
}

/** Has both answers scored under both iterates, if wanted, once the names are known. */
async function score(models) {
  const said = page.said;
  if (!said || !$("#score").checked || models[0] === models[1]) return;
  $("#margin").textContent = "scoring…";
  try {
    const scores = await scoresOf({ ...said, models });
    if (page.said === said) showScores(scores); // unless the next comparison has begun
  } catch (error) {
    if (page.said !== said) return;
    clearScores();
    throw error;
  }
}

/** Streams one side into its card; returns the answer, or null if it failed. */
async function answer(side, request) {
  const card = $(`#side-${side}`);
  const [text, status] = [card.querySelector(".answer"), card.querySelector(".status")];
  const node = text.appendChild(document.createTextNode(""));
  card.classList.add("writing");
  status.textContent = "writing…";
  try {
    const stream = streamed(request, page.stopper.signal);
    for (;;) {
      const { value, done } = await stream.next();
      if (done) {
        const empty = node.data === "" ? "said nothing" : "finished";
        status.textContent = value === "length" ? "cut off at the most tokens allowed" : empty;
        return { content: node.data, finish_reason: value === "length" ? "length" : "stop" };
      }
      const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 8;
      node.appendData(value);
      if (atEnd) text.scrollTop = text.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof Refused)) throw error;
    card.classList.add("failed");
    status.textContent = error instanceof Refused ? error.message : "stopped";
    return null;
  } finally {
    card.classList.remove("writing");
  }
}

function busy(streaming) {
  page.stopper = streaming ? new AbortController() : null;
  $("#stop").hidden = !streaming;
  $("#go").disabled = streaming;
  for (const control of document.querySelectorAll("#ask select, [name=mode]")) control.disabled = streaming;
}

// --- Voting ----------------------------------------------------------------------------------------------------------

function allowVotes(allowed) {
  for (const button of document.querySelectorAll("[data-verdict]")) button.disabled = !allowed;
}

async function vote(verdict) {
  if (!page.battle) return;
  allowVotes(false);
  showError(null);
  try {
    const result = await (await call("/v1/votes", { battle: page.battle.id, verdict })).json();
    page.battle = null;
    reveal(result);
    guarded(score)([result.a.model, result.b.model]);
  } catch (error) {
    showError(error);
    allowVotes(error.status !== 404 && error.status !== 409 && error.status !== 410); // the same vote may pass later
  }
}

function reveal({ verdict, a, b }) {
  nameSide("a", a.model, a.digest);
  nameSide("b", b.model, b.digest);
  if (verdict === "a" || verdict === "b") $(`#side-${verdict}`).classList.add("won");
  $(`[data-verdict=${verdict}]`).setAttribute("aria-pressed", "true");
  $("#outcome").textContent = `Your vote: ${VERDICTS[verdict]}. A was ${a.model}, B was ${b.model}.`;
  $("#again").focus();
}

function again() {
  reset();
  $("#prompt").focus();
  $("#prompt").select();
  guarded(loadModels)(); // a run that still trains may have published another one
}

// --- Pages and keys --------------------------------------------------------------------------------------------------

async function openPage() {
  showError(null);
  const here = location.hash === "#leaderboard" ? "leaderboard" : "compare";
  for (const name of ["compare", "leaderboard"]) {
    $(`#${name}`).hidden = name !== here;
    const link = $(`nav [href="#${name}"]`);
    if (name === here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  await guarded(here === "leaderboard" ? loadLeaderboard : loadModels)();
}

const guarded = (action) => async (...given) => {
  try {
    return await action(...given);
  } catch (error) {
    showError(error);
  }
};

function pressed(event) {
  if (event.key === "Escape") return page.stopper?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("#compare").hidden) return compare(event);
  const typing = event.target.closest("textarea, input, select");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || $("#compare").hidden) return;
  const button = { 1: "[data-verdict=a]", 2: "[data-verdict=tie]", 3: "[data-verdict=both_bad]", 4: "[data-verdict=b]", n: "#again" }[event.key];
  if (!button || $(button).hidden || $(button).disabled) return;
  event.preventDefault();
  $(button).click();
}

$("#ask").addEventListener("submit", compare);
$("#stop").addEventListener("click", () => page.stopper?.abort());
$("#again").addEventListener("click", again);
$("#key-form").addEventListener("submit", useKey);
$("#export").addEventListener("click", guarded(download));
$("#first").addEventListener("change", () => keepPair($("#first"), $("#second")));
$("#second").addEventListener("change", () => keepPair($("#second"), $("#first")));
for (const radio of document.querySelectorAll("[name=mode]")) radio.addEventListener("change", changeMode);
for (const button of document.querySelectorAll("[data-verdict]"))
  button.addEventListener("click", () => vote(button.dataset.verdict));
document.addEventListener("keydown", pressed);
document.addEventListener("key-needed", askForKey);
addEventListener("hashchange", openPage);
reset();
openPage();
