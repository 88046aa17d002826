// One pair of videos at a time, driven together.
const stage = $("#clips .stage");
if (stage) {
  const clips = $$(".clip", stage), bar = $(".transport", stage), scrub = $("input[type=range]", bar);
  const play = $("[data-do=play]", bar), difference = $("input[type=checkbox]", bar), rate = $("select", bar);
  const signs = { play: "M3 1.5v13l11-6.5z", pause: "M3 1.5h3.5v13H3zM9.5 1.5H13v13H9.5z", back: "M12 2v12L5.5 8zM3 2h2v12H3z", next: "M4 2v12l6.5-6zM11 2h2v12h-2z" };
  const picture = name => `<svg viewBox="0 0 16 16" aria-hidden="true"><path d="${signs[name]}"/></svg>`;
  let clip = clips[0], videos = [], fps = 16, frames = 1, frame = 0, playing = false;

  const load = video => {
    if (!video.src.startsWith("data:")) return;
    const bytes = Uint8Array.from(atob(video.src.split(",")[1]), sign => sign.charCodeAt(0));
    video.controls = false;
    video.preload = "auto";
    video.muted = true;
    video.addEventListener("seeked", draw);
    video.addEventListener("loadeddata", draw);
    video.addEventListener("durationchange", count);
    video.addEventListener("error", () => {
      if (!video.hidden) video.after(el("div", { class: "absent" }, "this browser cannot play it"));
      video.hidden = true;
    });
    video.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  };
  const count = () => {
    const known = Number(clip.dataset.frames), length = Math.max(...videos.map(video => video.duration || 0));
    frames = Math.max(1, known || Math.round(length * fps));
    scrub.max = frames - 1;
    show();
  };
  const show = () => {
    scrub.value = frame;
    scrub.setAttribute("aria-valuetext", `frame ${frame + 1} of ${frames}`);
    $("output", bar).textContent = `${frame + 1} / ${frames}`;
  };
  const draw = () => {
    const canvas = $(".difference canvas", clip), [one, two] = videos;
    if (!canvas || !difference.checked || !one.videoWidth || !two?.videoWidth) return;
    canvas.width = one.videoWidth;
    canvas.height = one.videoHeight;
    const brush = canvas.getContext("2d");
    brush.drawImage(one, 0, 0, canvas.width, canvas.height);
    brush.globalCompositeOperation = "difference";
    brush.drawImage(two, 0, 0, canvas.width, canvas.height);
  };
  const seek = to => {
    frame = (to + frames) % frames;
    for (const video of videos) video.currentTime = (frame + .5) / fps;  // amid a frame, whatever the rounding
    show();
  };
  const setPlaying = async on => {
    playing = on && videos.length > 0;
    play.innerHTML = picture(playing ? "pause" : "play");
    play.setAttribute("aria-label", playing ? "Pause" : "Play");
    if (!playing) { videos.forEach(video => video.pause()); seek(frame); return; }
    for (const video of videos) video.playbackRate = Number(rate.value);
    try { await Promise.all(videos.map(video => video.play())); } catch (error) { if (error.name !== "AbortError") setPlaying(false); }
  };
  const follow = () => {
    if (playing) {
      const lead = videos[0];
      if (videos.some(video => video.ended)) { seek(0); setPlaying(true); }
      else {
        for (const video of videos.slice(1)) if (Math.abs(video.currentTime - lead.currentTime) > .75 / fps) video.currentTime = lead.currentTime;
        frame = Math.min(frames - 1, Math.floor(lead.currentTime * fps + .01));
        show();
        draw();
      }
    }
    requestAnimationFrame(follow);
  };
  const select = index => {
    videos.forEach(video => video.pause());
    clip = clips[index];
    clips.forEach(other => { other.hidden = other !== clip; });
    videos = $$("video", clip);
    fps = Number(clip.dataset.fps);
    frame = 0;
    setDifference();
    videos.forEach(load);
    count();
    bar.hidden = !videos.length;
    $(".pair", clip).after(bar);
    setPlaying(playing);
  };
  const setDifference = () => {
    const box = $(".difference", clip);
    difference.parentNode.hidden = !box;
    if (box) box.hidden = !difference.checked;
    draw();
  };

  stage.classList.add("driven");
  $(".choices").hidden = false;
  for (const name of ["back", "next"]) $(`[data-do=${name}]`, bar).innerHTML = picture(name);
  play.addEventListener("click", () => setPlaying(!playing));
  for (const [name, by] of [["back", -1], ["next", 1]]) {
    $(`[data-do=${name}]`, bar).addEventListener("click", () => { setPlaying(false); seek(frame + by); });
  }
  scrub.addEventListener("input", () => { const to = Number(scrub.value); setPlaying(false); seek(to); });
  rate.addEventListener("change", () => videos.forEach(video => { video.playbackRate = Number(rate.value); }));
  difference.addEventListener("change", setDifference);
  $(".choices").addEventListener("change", event => select(Number(event.target.value)));
  playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  select(Number($(".choices :checked").value));
  follow();
}
