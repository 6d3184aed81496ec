// The leaderboard.

import { call, newestOf } from "./api.js";

const $ = (selector) => document.querySelector(selector);
const SVG = "http://www.w3.org/2000/svg";

export const loadLeaderboard = newestOf(async () => (await call("/v1/leaderboard")).json(), showLeaderboard);

function showLeaderboard(board) {
  const some = board.votes > 0;
  $("#votes-counted").textContent = some
    ? `${board.votes} ${board.votes === 1 ? "vote" : "votes"} so far.`
    : "No votes yet. Compare two answers and vote: ratings appear here.";
  for (const id of ["#ratings-card", "#pairs-card", "#method"]) $(id).hidden = !some;
  $("#told-apart-from").textContent = shareOf(board.told_apart_from);
  $("#by-chance").textContent = Math.round(200 * (1 - board.told_apart_from));
  const low = Math.min(...board.ratings.map((row) => row.low));
  const high = Math.max(...board.ratings.map((row) => row.high));
  const names = namer(board.ratings);
  $("#apart").replaceChildren(...board.ratings.slice(0, -1).map((row, index) => apart(row, board, index + 1, names)));
  fill("#ratings", board.ratings, (row) => [
    iterate(row.model, row.digest, names),
    cell(Math.round(row.rating), "n"),
    cell(intervalOf(row), "n"),
    cell(intervalChart(row, low, high), "plot"),
    cell(row.wins, "n"),
    cell(row.losses, "n"),
    cell(row.ties, "n"),
  ]);
  fill("#pairs", board.pairs, (row) => [
    iterate(row.a, row.a_digest, names),
    cell(row.a_wins, "n"),
    cell(shareChart(row), "plot"),
    cell(row.b_wins, "n"),
    iterate(row.b, row.b_digest, names),
    cell(row.ties, "n"),
    cell(row.both_bad, "n"),
    cell(shareOf(row.a_above), "n"),
  ]);
}

/** Says how sure it is that an iterate is above the next one of the ranking. */
function apart(row, board, next, ambiguous) {
  const called = ({ model, digest }) => (ambiguous(model) ? `${model} (${digest.slice(0, 12)})` : model);
  const line = document.createElement("li");
  const sure = row.above_next >= board.told_apart_from;
  line.textContent =
    `${called(row)} above ${called(board.ratings[next])} in ${shareOf(row.above_next)} of draws: ` +
    (sure ? "told apart." : `not told apart (from ${shareOf(board.told_apart_from)} on).`);
  return line;
}

/** Rounds down, so that nothing looks told apart that is not. */
const shareOf = (share) => `${(Math.floor(share * 1000 + 1e-6) / 10).toFixed(1)} %`;

/** Digests are shown where one name stands for two checkpoints. */
function namer(rows) {
  const seen = rows.map((row) => row.model);
  return (model) => seen.indexOf(model) !== seen.lastIndexOf(model);
}

function fill(table, rows, cells) {
  $(`${table} tbody`).replaceChildren(
    ...rows.map((row) => {
      const line = document.createElement("tr");
      line.append(...cells(row));
      return line;
    }),
  );
}

function iterate(model, digest, ambiguous) {
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = model;
  head.title = `checkpoint ${digest}`;
  if (ambiguous(model)) {
    const small = head.appendChild(document.createElement("span"));
    small.className = "digest";
    small.textContent = digest.slice(0, 12);
  }
  return head;
}

function cell(content, kind) {
  const data = document.createElement("td");
  data.className = kind;
  data.append(content);
  return data;
}

function chart(label, shapes) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("class", "chart");
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", label);
  for (const [kind, attributes] of shapes) {
    const shape = drawing.appendChild(document.createElementNS(SVG, kind));
    for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
  }
  return drawing;
}

const intervalOf = (row) => `${Math.round(row.low)} to ${Math.round(row.high)}`.replaceAll("-", "−");

function intervalChart(row, low, high) {
  const at = (rating) => `${high > low ? 2 + (96 * (rating - low)) / (high - low) : 50}%`;
  return chart(intervalOf(row), [
    ["line", { x1: "0", x2: "100%", y1: "50%", y2: "50%", class: "axis" }],
    ["line", { x1: at(row.low), x2: at(row.high), y1: "50%", y2: "50%", class: "range" }],
    ["circle", { cx: at(row.rating), cy: "50%", r: "5", class: "point" }],
  ]);
}

function shareChart(row) {
  const shares = [
    [row.a_wins, "share-a"],
    [row.ties + row.both_bad, "share-tie"],
    [row.b_wins, "share-b"],
  ];
  const total = shares.reduce((sum, [count]) => sum + count, 0);
  let start = 0;
  const bars = shares.map(([count, kind]) => {
    const bar = ["rect", { x: `${start}%`, width: `${(100 * count) / total}%`, y: "35%", height: "30%", class: kind }];
    start += (100 * count) / total;
    return bar;
  });
  return chart(`${row.a_wins} to ${row.b_wins}, ${row.ties + row.both_bad} undecided`, bars);
}

export async function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await (await call("/v1/votes/export")).blob());
  link.download = "votes.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}
