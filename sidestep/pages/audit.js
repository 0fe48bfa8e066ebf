// Says where a song cannot be played, and filters the songs by the words typed.
for (const player of document.querySelectorAll("audio")) {
  player.addEventListener("error", () => { player.nextElementSibling.hidden = false; }, true);
}
const songs = [...document.querySelectorAll(".song")];
document.querySelector(".search").addEventListener("input", (event) => {
  const wanted = event.target.value.toLowerCase().split(/\s+/);
  for (const song of songs) song.hidden = !wanted.every((word) => song.textContent.toLowerCase().includes(word));
});
