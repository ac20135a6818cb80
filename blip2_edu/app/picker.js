// The photo picker of the demo: gallery, drag and drop, file dialog, webcam.
// A file goes to Python in pieces, because the server closes a connection on a large message.

const PIECE = 2 ** 20; // bytes

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

async function sendFile(model, file) {
  const about = { id: Math.random().toString(36), name: file.name, size: file.size };
  if (file.size > model.get("max_bytes")) {
    model.send({ kind: "too large", ...about });
    return;
  }
  try {
    let start = 0;
    do {
      const piece = await file.slice(start, start + PIECE).arrayBuffer();
      model.send({ kind: "piece", ...about }, undefined, [piece]);
      start += PIECE;
    } while (start < file.size);
  } catch (error) {
    model.send({ kind: "unreadable", ...about }); // a folder, or a file that is gone
  }
}

function gallery(model) {
  const buttons = model.get("photos").map(({ name, thumbnail }) => {
    const picture = make("img", { src: thumbnail, alt: name });
    const button = make("button", { type: "button", title: name }, picture);
    button.onclick = () => model.send({ kind: "photo", name });
    return button;
  });
  return make("div", { className: "gallery" }, ...buttons);
}

function dropZone(model) {
  const input = make("input", { type: "file" });
  const zone = make("label", { className: "drop" }, "Drop a photo here, or click to choose one", input);
  input.onchange = () => {
    if (input.files.length) sendFile(model, input.files[0]);
    input.value = ""; // the same file may be chosen again
  };
  zone.ondragover = (event) => {
    event.preventDefault();
    zone.classList.add("over");
  };
  zone.ondragleave = () => zone.classList.remove("over");
  zone.ondrop = (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    if (event.dataTransfer.files.length) sendFile(model, event.dataTransfer.files[0]);
  };
  return zone;
}

function webcam(model) {
  const button = make("button", { type: "button", textContent: "Use the webcam" });
  const video = make("video", { autoplay: true, playsInline: true, hidden: true });
  let stream = null;
  const stop = () => {
    stream?.getTracks().forEach((track) => track.stop());
    stream = null;
    video.hidden = true;
    button.textContent = "Use the webcam";
  };
  button.onclick = async () => {
    if (!stream) {
      button.disabled = true; // until the browser has asked for permission
      try {
        stream = await navigator.mediaDevices.getUserMedia({ video: true });
        video.srcObject = stream;
        video.hidden = false;
        button.textContent = "Take the photo";
      } catch (error) {
        model.send({ kind: "no webcam", reason: error.message });
      }
      button.disabled = false;
      return;
    }
    if (!video.videoWidth) return; // there is no picture yet
    const canvas = make("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => sendFile(model, new File([blob], "webcam.jpg")), "image/jpeg", 0.9);
    stop();
  };
  if (!navigator.mediaDevices) {
    button.disabled = true; // browsers lend the webcam to https and localhost alone
    button.title = "This browser lends no webcam to this page.";
  }
  return { element: make("div", { className: "webcam" }, button, video), stop };
}

function render({ model, el }) {
  const camera = webcam(model);
  el.classList.add("blip2-picker");
  el.append(dropZone(model), camera.element, gallery(model));
  return camera.stop;
}

export default { render };
