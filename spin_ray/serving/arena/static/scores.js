// Log-probabilities of both answers under both iterates, and the margin.

import { call } from "./api.js";

const $ = (selector) => document.querySelector(selector);
const SIDES = ["a", "b"];

/** Scores what was said. Example: {models: ["sft", "iter-1"], messages: […], answers: [{content, finish_reason}, …]}. */
export async function scoresOf(asked) {
  return (await call("/v1/compare", { ...asked, logprobs: true })).json();
}

export function showScores({ answers, engine_margins: margins, note }) {
  for (const [index, side] of SIDES.entries()) {
    const line = $(`#side-${side} .scores`);
    const logps = Object.entries(answers[index].logps).map(([name, logp]) => `${name} ${inNats(logp)}`);
    line.textContent = `log p under ${logps.join(", ")} nats`;
    line.title = note;
    line.hidden = false;
  }
  const told = margins.map(
    ({ policy, opponent, beta, value }) => `SPIN margin of ${policy} against ${opponent}: ${inNats(value)} (beta ${beta})`,
  );
  $("#margin").textContent = told.join("; ");
  $("#margin").title = note;
}

export function clearScores() {
  for (const side of SIDES) $(`#side-${side} .scores`).hidden = true;
  $("#margin").textContent = "";
}

const inNats = (value) => value.toFixed(2).replace("-", "−");
