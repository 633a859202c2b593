// What the page does by itself: one camera for all 3D panels, the token that is chosen, and files that are dropped.
// Everything kept here belongs to this tab.
(function () {
  "use strict";
  const BLANK = {data: [], layout: {xaxis: {visible: false}, yaxis: {visible: false}}};
  const PANELS = ["mesh", "voxels", "reconstruction", "difference", "lattice"].map((name) => "panel-" + name);
  let home = null;          // the camera of the first figure
  let camera = null;        // of all panels
  let outline = null;       // the chosen token's wire box, {x, y, z}
  let facts = null;         // layout.py's store of that name
  let upAxis = null, lastFile = null, uploads = 0;
  let shown = null;         // key of the object on the page
  let leader = null;        // the panel that the others are about to follow
  let slow = false;         // whether they follow only when the leader rests: without a GPU, all at once would jerk
  let timer = null;

  const props = (id, values) => window.dash_clientside.set_props(id, values);
  const plot = (id) => document.querySelector("#" + id + " .js-plotly-plot");
  const isUpload = (key) => key !== null && key.startsWith("upload-");
  const isScene = (gd) => gd && gd._fullLayout && gd._fullLayout.scene;

  // --- panels ---

  function show(figure, id) {
    if (!figure) return window.dash_clientside.no_update;
    home = home || figure.layout.scene.camera;
    camera = camera || home;
    const layout = {...figure.layout, scene: {...figure.layout.scene, camera: camera}};
    const data = figure.data.map((trace) => (trace.name === "chosen" && outline ? {...trace, ...outline} : trace));
    link(id);
    if (id === "panel-lattice") link("layer");
    return {data: data, layout: layout};
  }

  // A new panel's events are there once plotly has drawn it.
  function link(id, tries = 100) {
    const gd = plot(id);
    if (!gd || !gd.on || !gd.data || !gd.data.length) {
      if (tries) setTimeout(() => link(id, tries - 1), 100);
      return;
    }
    if (gd.linked) return;
    gd.linked = true;
    gd.on("plotly_relayouting", (event) => follow(gd, event));
    gd.on("plotly_relayout", (event) => follow(gd, event));
    gd.on("plotly_afterplot", () => {  // a picture may have been on its way while another panel was turned
      turn([gd]);
      draw(gd);
    });
    if (id === "panel-lattice" || id === "layer") gd.on("plotly_click", choose);
  }

  function follow(gd, event) {
    const moved = event && event["scene.camera"];
    if (!moved || same(moved, camera)) return;
    camera = JSON.parse(JSON.stringify(moved));
    if (slow) {
      clearTimeout(timer);
      timer = setTimeout(turnOthers, 150);
    } else if (leader === null) {
      requestAnimationFrame(turnOthers);
    }
    leader = gd;
  }

  function turnOthers() {
    const started = performance.now();
    turn(PANELS.map(plot).filter((gd) => gd !== leader));
    leader = null;
    requestAnimationFrame(() => requestAnimationFrame(() => {
      slow = performance.now() - started > 150;
    }));
  }

  function turn(panels) {
    for (const gd of panels) {
      if (isScene(gd) && !same(gd._fullLayout.scene.camera, camera)) {
        window.Plotly.relayout(gd, {"scene.camera": JSON.parse(JSON.stringify(camera))});
      }
    }
  }

  function same(a, b) {
    return ["eye", "center", "up"].every((key) =>
      ["x", "y", "z"].every((axis) => Math.abs(a[key][axis] - b[key][axis]) < 1e-9));
  }

  // --- the chosen token ---

  // Of a click in the lattice or the layer; customdata is the token.
  function choose(event) {
    const point = event.points.find((each) => each.customdata);
    if (!point) return;
    const token = point.customdata[0];
    props("chosen", {data: token});
    props("layer-number", {value: token % facts.lattice[2]});
  }

  function mark(token, given) {
    if (token === null || token === undefined) return window.dash_clientside.no_update;
    const [, Y, Z] = given.lattice;
    const place = [Math.floor(token / (Y * Z)), Math.floor(token / Z) % Y, token % Z];
    const low = place.map((at, axis) => at * given.block[axis]);
    const high = place.map((at, axis) => (at + 1) * given.block[axis]);
    outline = {x: [], y: [], z: []};
    const corner = (bits) => [0, 1, 2].map((axis) => ((bits >> axis) & 1 ? high : low)[axis]);
    for (let a = 0; a < 8; a++) {
      for (let axis = 0; axis < 3; axis++) {
        const b = a | (1 << axis);
        if (b === a) continue;
        for (const point of [corner(a), corner(b), [null, null, null]]) {
          ["x", "y", "z"].forEach((name, number) => outline[name].push(point[number]));
        }
      }
    }
    PANELS.map(plot).forEach(draw);
    return token;
  }

  function draw(gd) {
    const trace = isScene(gd) && outline ? gd.data.findIndex((each) => each.name === "chosen") : -1;
    if (trace < 0 || String(gd.data[trace].x) === String(outline.x) && String(gd.data[trace].y) === String(outline.y)
        && String(gd.data[trace].z) === String(outline.z)) return;
    window.Plotly.restyle(gd, {x: [outline.x], y: [outline.y], z: [outline.z]}, [trace]);
  }

  // --- captions ---

  // One that is cut says the rest when the mouse is over it.
  document.addEventListener("mouseover", (event) => {
    const caption = event.target.closest && event.target.closest(".caption, .dash-dropdown-value");
    if (!caption) return;
    const cut = caption.scrollWidth > caption.clientWidth || caption.scrollHeight > caption.clientHeight;
    caption.title = cut ? caption.textContent : "";
  });

  // --- files ---

  function refuse(text) {
    props("message", {children: text});
  }

  // One file at a time; a visitor who brings more is told which one was taken.
  function take(files) {
    if (!files.length) return;
    const many = files.length > 1 ? `${files.length} files came at once: only ${files[0].name} was taken.` : "";
    upload(files[0], many);
  }

  async function upload(file, note = "") {
    const suffix = "." + file.name.split(".").pop().toLowerCase();
    if (!facts.suffixes.includes(suffix)) {
      return refuse(`${file.name}: is not one of ${facts.suffixes.join(" ")}. Convert it to one of them.`);
    }
    if (!file.size) return refuse(`${file.name}: the file is empty. Export it again.`);
    if (file.size > facts.max_bytes) {
      return refuse(`${file.name}: has ${(file.size / 2 ** 20).toFixed(0)} MiB, more than the ` +
                    `${facts.max_bytes / 2 ** 20} MiB that may be dropped here. Simplify the mesh.`);
    }
    const number = ++uploads;
    lastFile = file;
    refuse(note);
    document.body.classList.add("opening");
    let answer;
    try {
      const query = new URLSearchParams({name: file.name, up_axis: upAxis});
      const response = await fetch(facts.upload + "?" + query, {method: "POST", body: file, headers: {"X-Viewer": "1"}});
      answer = await response.json();
    } catch (error) {
      answer = {error: `${file.name}: the server did not take it. Is it still running?`};
    }
    if (number !== uploads) return;  // another file was dropped meanwhile
    document.body.classList.remove("opening");
    if (answer.error) return refuse(answer.error);
    props("figure-mesh", {data: answer.mesh});
    props("object", {data: answer.object});
    if (document.getElementById("pick")) props("pick", {value: null});
  }

  const input = document.createElement("input");
  input.type = "file";
  input.id = "file";
  input.hidden = true;
  input.addEventListener("change", () => {
    take(input.files);
    input.value = "";
  });
  document.body.appendChild(input);

  const inDrop = (event) => event.target.closest && event.target.closest("#drop");
  document.addEventListener("click", (event) => inDrop(event) && input.click());
  document.addEventListener("keydown", (event) => {
    if (inDrop(event) && (event.key === "Enter" || event.key === " ")) input.click();
  });
  const hasFile = (event) => event.dataTransfer && Array.from(event.dataTransfer.types).includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    document.body.classList.remove("dragging");
    take(event.dataTransfer.files);
  });

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    viewer: {
      show: show,
      showMesh(mesh, object) {
        if (!object) return [window.dash_clientside.no_update, "drop one to begin"];
        if (object.key !== shown && !isUpload(object.key)) {
          uploads++;  // an upload that is still on its way comes too late
          document.body.classList.remove("opening");
        }
        shown = object.key;
        if (!mesh || mesh.of !== object.key) return [BLANK, "is being opened …"];
        const name = isUpload(object.key) ? object.name + ": " : "";  // others are named in the list
        return [show(mesh.figure, "panel-mesh"), name + mesh.caption];
      },
      mark: mark,
      resetView(clicks) {
        if (clicks && home) {
          camera = home;
          turn(PANELS.map(plot));
        }
        return window.dash_clientside.no_update;
      },
      setAxes(axis, given) {
        const again = upAxis !== null && axis !== upAxis && lastFile !== null && isUpload(shown);
        upAxis = axis;
        facts = given;
        if (again) upload(lastFile);
        return axis;
      },
    },
  });
})();
