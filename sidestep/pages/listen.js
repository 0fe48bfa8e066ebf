// One clip is heard at a time: what is switched to starts where the other one was. Nothing is fetched but the clip itself.

const values = JSON.parse(document.getElementById("values").textContent);
const element = (id) => document.getElementById(id);
const lines = [...document.querySelectorAll(".grid tbody tr")];
const cells = lines.map((line) => [...line.querySelectorAll("button")]);
const clips = cells.map((line) => line.map((cell) => ({ src: cell.dataset.src, volume: +cell.dataset.volume })));
const players = new Map();
const inOrder = () => values.prompts.map(() => values.rows.map((_, row) => row));
let order = inOrder();  // order[prompt][line]: the row that is heard there
let votes = new Map();  // prompt → row
let isBlind = false, at = [0, 0], player = null, level = 1, isMuted = false;

function letterOf(line) {
  const letter = String.fromCharCode(65 + (line % 26));
  return line < 26 ? letter : letterOf(Math.floor(line / 26) - 1) + letter;
}

// In a page from the disk a volume is all that may be changed, and it cannot be above 1: louder clips are made softer.
function adjust(one, volume) {
  one.volume = Math.min(1, level * volume);
  one.muted = isMuted;
}

function playerOf(clip) {
  if (players.has(clip.src)) return players.get(clip.src);
  const made = new Audio(clip.src);
  made.controls = true;
  adjust(made, clip.volume);
  made.addEventListener("volumechange", () => {
    if (made !== player || Math.abs(made.volume - Math.min(1, level * clip.volume)) + (made.muted !== isMuted) < 1e-3) return;
    [level, isMuted] = [Math.min(1, made.volume / clip.volume), made.muted];
    adjust(made, clip.volume);
  });
  for (const event of ["play", "pause", "ended", "error"]) made.addEventListener(event, show);
  players.set(clip.src, made);
  return made;
}

function start() {
  player.play().catch((error) => { if (error.name !== "AbortError" && !player.error) throw error; });
}

function go(line, prompt, plays = player !== null && !player.paused) {
  at = [line, prompt];
  const next = playerOf(clips[order[prompt][line]][prompt]);
  if (next !== player) {
    if (player) {
      next.currentTime = player.ended ? 0 : player.currentTime;
      player.pause();
    }
    adjust(next, clips[order[prompt][line]][prompt].volume);
    player = next;
    element("player").replaceChildren(player);
  }
  if (plays) start();
  show();
}

function show() {
  const [line, prompt] = at;
  cells.forEach((some, row) => some.forEach((cell, column) => {
    const here = row === line && column === prompt;
    const voted = votes.get(column) === order[column][row];
    cell.className = (here ? "here" : "") + (voted ? " voted" : "");
    cell.textContent = here && player && !player.paused ? "❚❚" : voted ? "★" : "▶";
    cell.setAttribute("aria-label", `${isBlind ? letterOf(row) : values.rows[row]}, prompt ${column + 1}${voted ? ", your vote" : ""}`);
    cell.tabIndex = here ? 0 : -1;
  }));
  element("playing").textContent = isBlind ? letterOf(line) : values.rows[line];
  const gone = player?.error ? " – it cannot be played: is its file still where it was?" : "";
  element("prompt").textContent = `prompt ${prompt + 1}: ${values.prompts[prompt]}${gone}`;
  element("vote").textContent = votes.get(prompt) === order[prompt][line] ? "Your vote" : "Vote for this one";
}

function togglePlay() {
  if (player.paused) start(); else player.pause();
}

function vote() {
  votes.set(at[1], order[at[1]][at[0]]);
  element("unveil").hidden = false;
  show();
}

function shuffled(count) {
  const found = Array.from({ length: count }, (_, n) => n);
  for (let n = count - 1; n > 0; n -= 1) {
    const other = Math.floor(Math.random() * (n + 1));
    [found[n], found[other]] = [found[other], found[n]];
  }
  return found;
}

function setBlind(wanted) {
  player.pause();
  isBlind = wanted;
  document.body.classList.toggle("blind", wanted);
  element("blind").textContent = wanted ? "Stop without unveiling" : "Listen blind";
  element("vote").hidden = !wanted;
  element("unveil").hidden = true;
  lines.forEach((line, n) => { line.querySelector(".letter").textContent = letterOf(n); });
  order = wanted ? values.prompts.map(() => shuffled(values.rows.length)) : inOrder();
}

element("blind").addEventListener("click", () => {
  votes = new Map();
  element("tally").hidden = true;
  setBlind(!isBlind);
  go(0, at[1], false);
});
element("vote").addEventListener("click", vote);
element("unveil").addEventListener("click", () => {
  const row = order[at[1]][at[0]];
  setBlind(false);
  const tally = values.rows.map((name, n) => [name, [...votes.values()].filter((voted) => voted === n).length]);
  element("tally").querySelector("ol").replaceChildren(...tally.filter(([, n]) => n).sort((a, b) => b[1] - a[1]).map(([name, n]) => {
    const item = document.createElement("li");
    item.textContent = `${name}: ${n} of ${votes.size} ${votes.size === 1 ? "vote" : "votes"}`;
    return item;
  }));
  element("tally").hidden = false;
  go(row, at[1], false);
});
cells.forEach((some, row) => some.forEach((cell, column) => cell.addEventListener("click", () => {
  const same = at[0] === row && at[1] === column;
  if (same) togglePlay(); else go(row, column, true);
  cell.focus();
})));

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const other = event.target.closest("input, select, textarea, summary, .copy audio, button:not(.grid button)");
  const move = MOVES[event.key];
  if (move && !other?.matches("input, select, textarea, .copy audio")) {
    const [line, prompt] = [(at[0] + move[0] + lines.length) % lines.length, (at[1] + move[1] + values.prompts.length) % values.prompts.length];
    go(line, prompt);
    if (event.target.closest(".grid")) cells[line][prompt].focus();
  } else if (event.key === " " && !other) {
    togglePlay();
  } else if (event.key.toLowerCase() === "v" && isBlind) {
    vote();
  } else {
    return;
  }
  event.preventDefault();
}, true);

for (const one of document.querySelectorAll(".copy audio")) one.volume = +one.dataset.volume;
go(Math.max(0, lines.findIndex((line) => line.classList.contains("recommended"))), 0, false);
