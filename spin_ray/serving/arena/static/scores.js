// Log-probabilities of both answers under both iterates, and the margin.

import { call } from "./api.js";

const $ = (selector) => document.querySelector(selector);
const SIDES = ["a", "b"];
const MARGIN =
  "SPIN margin of p against q = beta · [log p(y)/q(y) − log p(y′)/q(y′)], y the answer of p and y′ that of q. " +
  "Above 0, p prefers its own answer over that of q by more than q does. The";

/** Scores what was said. Example: {models: ["sft", "iter-1"], messages: […], answers: [{content, finish_reason}, …]}. */
export async function scoresOf(asked) {
  return (await call("/v1/compare", { ...asked, logprobs: true })).json();
}

export function showScores({ answers, engine_margins: margins, note }) {
  for (const [index, side] of SIDES.entries()) {
    const line = $(`#side-${side} .scores`);
    const logps = Object.entries(answers[index].logps).map(([name, logp]) => `${name} ${inNats(logp)}`);
    line.textContent = `log p under ${logps.join(", ")} nats`;
    line.hidden = false;
  }
  const told = margins.map(
    ({ policy, opponent, beta, value, length_normalised: perToken }) =>
      `SPIN margin of ${policy} against ${opponent}: ${inNats(value)} (beta ${beta}${perToken ? ", log-ratios per token" : ""})`,
  );
  $("#margin").textContent = told.join("; ");
  $("#margin-told").hidden = !told.length;
  $("#margin-told").textContent = `${MARGIN} ${note}.`;
}

export function clearScores() {
  for (const side of SIDES) $(`#side-${side} .scores`).hidden = true;
  $("#margin").textContent = "";
  $("#margin-told").hidden = true;
}

const inNats = (value) => value.toFixed(2).replace("-", "−");
