// The arena page. What models say is only ever set as text.

import { KEY, Refused, answerOf, battle, call, newestOf } from "./api.js";
import { download, loadLeaderboard } from "./leaderboard.js";
import { clearScores, scoresOf, showScores } from "./scores.js";

const $ = (selector) => document.querySelector(selector);
const BLIND_ANY = "";
const LOOK_MS = 5000; // between two looks at iterates that start
const VERDICTS = { a: "A is better", b: "B is better", tie: "a tie", both_bad: "both bad" };

const page = { models: [], battle: null, stopper: null, said: null, look: null };

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

const loadModels = newestOf(
  () => Promise.all(["/v1/models", "/v1/arena"].map(async (path) => (await call(path)).json())),
  showModels,
);

function showModels([{ data }, limits]) {
  limit($("#max-tokens"), limits.max_tokens);
  limit($("#temperature"), limits.temperature);
  page.models = data.map((model) => model.id).filter((id) => id !== "latest"); // a second name
  fillChoices();
  const few = page.models.length < 2;
  tellStart(few && limits.more_start);
  if (few && !limits.more_start)
    throw new Refused(`A comparison needs two iterates; this server has ${page.models.length}. It serves more with --models.`);
}

/** Says that iterates start, and looks again until two serve. */
function tellStart(starts) {
  clearTimeout(page.look);
  $("#starting").hidden = !starts;
  if (!starts) return;
  $("#starting").textContent = `Models start; ${page.models.length} of the 2 that a comparison needs can answer. This page looks again by itself.`;
  page.look = setTimeout(guarded(lookAgain), LOOK_MS);
}

async function lookAgain() {
  try {
    await loadModels();
  } catch (error) {
    tellStart(false);
    throw error;
  }
}

function limit(field, most) {
  field.max = most;
  if (field.valueAsNumber > most) field.value = most;
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
  $("#names-told").textContent = blind() ? "Their names stay hidden until you have voted." : "Their names are shown, so there is no vote.";
  $("#outcome").textContent = "";
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
  $("#prompt").value = $("#prompt").value.trim(); // what is asked is what is shown
  const request = {
    messages: [{ role: "user", content: $("#prompt").value }],
    temperature: $("#temperature").valueAsNumber,
    max_tokens: $("#max-tokens").valueAsNumber,
  };
  const models = [$("#first").value, $("#second").value]; // now: the lists may be loaded again meanwhile
  try {
    const answers = await (blind() ? fight(request, models) : bothOpen(request, models));
    const whole = answers.every(Boolean);
    if (whole) page.said = { messages: request.messages, answers };
    if (!blind()) return await score(models);
    if (whole) allowVotes(true);
    else $("#outcome").textContent = "No vote without two whole answers.";
  } catch (error) {
    showError(error);
  } finally {
    busy(false);
    $("#again").hidden = false;
  }
}

/** Has the server ask both sides; returns both answers, null for one that failed. */
async function fight(request, models) {
  const cards = [new Card("a"), new Card("b")];
  try {
    const events = battle(models.includes(BLIND_ANY) ? request : { ...request, models }, page.stopper.signal);
    for await (const event of events) {
      if (event.side) cards[event.side === "a" ? 0 : 1].take(event);
      else page.battle = event;
    }
  } catch (error) {
    if (!page.battle && error.name !== "AbortError") {
      for (const card of cards) card.fail("not asked");
      throw error;
    }
    for (const card of cards) card.interrupt(error);
  }
  return cards.map((card) => card.close());
}

function bothOpen(request, models) {
  const seed = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  return Promise.all(["a", "b"].map(async (side, index) => {
    const card = new Card(side);
    try {
      for await (const event of answerOf({ ...request, seed, model: models[index] }, side, page.stopper.signal))
        card.take(event);
    } catch (error) {
      card.interrupt(error);
    }
    return card.close();
  }));
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

/** The card of a side while its answer comes. */
class Card {
  constructor(side) {
    this.card = $(`#side-${side}`);
    this.text = this.card.querySelector(".answer");
    this.status = this.card.querySelector(".status");
    this.node = this.text.appendChild(document.createTextNode(""));
    this.ended = false;
    this.whole = null;
    this.card.classList.add("writing");
    this.status.textContent = "writing…";
  }

  take({ text, finish_reason: reason, error }) {
    if (text) this.append(text);
    else if (error) this.fail(error.message ?? "The server broke the answer off.");
    else if (reason) this.finish(reason);
  }

  append(piece) {
    const atEnd = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 8;
    this.node.appendData(piece);
    if (atEnd) this.text.scrollTop = this.text.scrollHeight;
  }

  finish(reason) {
    this.status.textContent =
      reason === "length" ? "cut off at the most tokens allowed" : this.node.data === "" ? "said nothing" : "finished";
    this.whole = { content: this.node.data, finish_reason: reason === "length" ? "length" : "stop" };
    this.end();
  }

  fail(words) {
    if (this.ended) return;
    this.card.classList.add("failed");
    this.status.textContent = words;
    this.end();
  }

  /** Ends the side in an error of the connection, or in the voter's stop. */
  interrupt(error) {
    if (error.name !== "AbortError" && !(error instanceof Refused)) throw error;
    this.fail(error instanceof Refused ? error.message : "stopped");
  }

  end() {
    this.ended = true;
    this.card.classList.remove("writing");
  }

  /** Returns the answer; null if it is not whole. */
  close() {
    this.fail("The server broke the answer off.");
    return this.whole;
  }
}

function busy(streaming) {
  page.stopper = streaming ? new AbortController() : null;
  $("#stop").hidden = !streaming;
  $("#go").hidden = streaming; // Stop takes its place
  for (const control of document.querySelectorAll("#ask select, [name=mode]")) control.disabled = streaming;
}

// --- Voting ----------------------------------------------------------------------------------------------------------

function allowVotes(allowed) {
  for (const button of document.querySelectorAll("[data-verdict]")) button.disabled = !allowed;
}

async function vote(verdict) {
  const battle = page.battle;
  if (!battle) return;
  allowVotes(false);
  showError(null);
  try {
    const result = await (await call("/v1/votes", { battle: battle.battle, verdict })).json();
    if (page.battle !== battle) return; // the next comparison has begun
    page.battle = null;
    reveal(result);
    guarded(score)([result.a.model, result.b.model]);
  } catch (error) {
    if (page.battle !== battle) return;
    showError(error);
    allowVotes(![404, 409, 410].includes(error.status)); // the same vote may pass later
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
  tellStart(false);
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
