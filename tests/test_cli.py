"""The command line: right answers on stdout, one sentence and an exit code for every mistake."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from helpers import small_models, tiny
from helpers.samples import random_stage1
from PIL import Image
from torch.testing import assert_close

from blip2_edu import blip2, evaluation, language, training, vision
from blip2_edu.app import cli, doctor
from blip2_edu.app.cli import main
from blip2_edu.app.options import Stage1Options, Stage2Options
from blip2_edu.app.train import new_blip2, say
from blip2_edu.checkpoints import embedded, published
from blip2_edu.checkpoints.tensors import load_tensors
from blip2_edu.data import examples, features, sources
from blip2_edu.paths import CHECKPOINTS
from blip2_edu.stage1 import save_stage1

ROOT = Path(__file__).parents[1]
ESCAPE = "\x1b[31m"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny untrained BLIP-2, saved as `--model` wants it."""
    folder = tmp_path_factory.mktemp("model")
    small_models.blip2(folder).save_pretrained(folder / "checkpoint", torch.float32)
    return str(folder / "checkpoint")


@pytest.fixture
def photo(tmp_path) -> str:
    Image.linear_gradient("L").save(tmp_path / "photo.jpg")
    return str(tmp_path / "photo.jpg")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Nothing is read from or written to the course's own folders, nor looked up on the hub."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(features, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()  # forget what the preparations said
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def fails(capsys, *arguments: str, code: int = 1) -> str:
    """Run what must fail; returns the one sentence that it ends with."""
    found, out, err = run(capsys, *arguments)
    assert found == code, out + err
    lines = err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


# Start-up ----------------------------------------------------------------------------------------


def test_help_is_quick_because_nothing_heavy_is_imported():
    program = (
        "import sys; from blip2_edu.app import cli; code = cli.main(['train', 'stage2', '--help']);"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'matplotlib', 'numpy', 'PIL'};"
        "print(code, sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "--captions-per-image" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr


def test_help_takes_less_than_a_second():
    """Of processor time: others may be busy on this machine."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "blip2_edu", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for name in ("caption", "ask", "match", "train", "evaluate", "weights", "doctor"):
        assert f"\n  {name} " in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "Missing command"),
        (["draw"], "No such command 'draw'"),
        (["caption", "--model"], "requires an argument"),
        (["caption", f"--{ESCAPE}"], "No such option"),
        (["caption", "--beams", "0"], "greater than or equal to 1"),
        (["caption", "--beams", "many"], "--beams"),
        (["caption", "--attention", "map.txt"], "should end in .png"),
        (["ask"], "Missing argument"),
        (["ask", "photo.jpg"], "Missing argument"),
        (["train"], "Missing command"),
        (["evaluate"], "--data"),
        (["evaluate", "--data", "scenes:1", "--json", "no/where.json"], "no folder"),
        (["evaluate", "--data", "scenes:1", "--rerank", "-1"], "--rerank"),
    ],
)
def test_misuse(capsys, arguments, words):
    sentence = fails(capsys, *arguments, code=2)
    assert words in sentence and "--help`." in sentence and "\x1b" not in sentence


STAGE1 = ["train", "stage1", "--data", "scenes:4", "--validation", "scenes:2:1", "--folder", "run"]
STAGE2 = ["train", "stage2", "--validation", "scenes:2:1", "--folder", "run"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([*STAGE1, "--objectives", "itc,rot"], "no objective rot"),
        ([*STAGE1, "--epochs", "nan"], "--epochs"),
        ([*STAGE1, "--spread", "inf"], "inf is no number"),
        ([*STAGE1, "--weight", "inf"], "inf is no number"),
        ([*STAGE1, "--seed", str(2**64)], "--seed"),
        (STAGE1[:-2], "--folder"),
        (STAGE2, "give --stage1 FOLDER, --without-stage1 or --start-from FOLDER"),
        ([*STAGE2, "--stage1", "x", "--without-stage1"], "give --stage1 FOLDER"),
        ([*STAGE2, "--stage1", "x", "--start-from", "y"], "give --stage1 FOLDER"),
        ([*STAGE2, "--without-stage1"], "--data with captions, --questions or both"),
        ([*STAGE1, "--start-from", "x", "--queries", "8"], "of --start-from decides --queries"),
        (
            [*STAGE2, "--start-from", "x", "--data", "y", "--language-model", "z"],
            "of --start-from decides --language-model",
        ),
        ([*STAGE1, "--start-from", "./x/../run"], "name another --folder"),
        ([*STAGE2, "--stage1", "RUN", "--data", "y"], "name another --folder"),
        (
            [*STAGE2[:-1], CHECKPOINTS / "mini", "--start-from", "mini", "--data", "y"],
            "name another --folder",
        ),
        (
            [*STAGE2, "--stage1", "x", "--data", "y", "--queries", "16"],
            "of --stage1 decides --queries",
        ),
    ],
)
def test_misuse_of_training(capsys, arguments, words):
    assert words in fails(capsys, *arguments, code=2)


# Caption, ask, match -----------------------------------------------------------------------------


def test_caption(capsys, model, photo):
    code, out, err = run(capsys, "caption", photo, photo, "--model", model, "--beams", "2")
    assert code == 0 and len(out.splitlines()) == 2
    assert all(line.startswith(f"{photo}: ") for line in out.splitlines())


def test_caption_draws_the_attention(capsys, model, photo, tmp_path):
    code, out, _ = run(capsys, "caption", photo, "--model", model, "--attention", "map.png")
    assert code == 0 and "map.png" in out
    assert Image.open(tmp_path / "map.png").size[0] > 300


def test_caption_without_images_takes_the_course_s_own(capsys, model, monkeypatch):
    seen = []

    def caption(self, images, **decoding):
        seen.extend(images)
        return ["a photo"] * len(images)

    monkeypatch.setattr(blip2.Blip2, "caption", caption)
    code, out, _ = run(capsys, "caption", "--model", model)
    assert code == 0 and len(out.splitlines()) == len(seen) >= 16
    assert any(line.endswith("astronaut.jpg: a photo") for line in out.splitlines())


def test_one_damaged_image_does_not_spoil_the_others(capsys, model, photo, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    found, out, err = run(capsys, "caption", "text.jpg", photo, "none.jpg", ".", "--model", model)
    assert found == 1
    assert [line.split(":")[0] for line in out.splitlines()] == [photo]
    assert [line.split()[0] for line in err.splitlines()] == ["text.jpg", "none.jpg", "."]


def test_control_characters_do_not_reach_the_terminal(capsys, model, photo, tmp_path):
    name = f"a{ESCAPE}b\nc [bold]d[-].jpg"
    Path(photo).rename(tmp_path / name)
    _, out, _ = run(capsys, "caption", name, "--model", model)
    assert out.startswith("a?[31mb c [bold]d[-].jpg: ") and "\x1b" not in out
    assert "\x1b" not in fails(capsys, "caption", f"none{ESCAPE}.jpg", "--model", model)


@pytest.mark.parametrize("way", ["itself", "another path", "link", "hard link", "letter case"])
def test_the_photo_is_not_drawn_over(capsys, model, photo, tmp_path, way):
    target = Path({"itself": "photo.jpg", "another path": "cache/../photo.jpg"}.get(way, "a.jpg"))
    (tmp_path / "cache").mkdir()
    if way == "link":
        target.symlink_to(photo)
    elif way == "hard link":
        os.link(photo, target)
    elif way == "letter case":
        target = Path("PHOTO.JPG")
    Image.linear_gradient("L").save("first.png")
    before = Path(photo).read_bytes()
    command = ["caption", "first.png", photo, "--model", model, "--attention", target]
    assert "is an image to caption" in fails(capsys, *command, code=2)
    assert Path(photo).read_bytes() == before


def test_attention_without_an_image_draws_over_no_photo(capsys, model, photo, monkeypatch):
    before = Path(photo).read_bytes()
    assert "name an image" in fails(capsys, "caption", "--attention", photo, code=2)
    assert Path(photo).read_bytes() == before
    course = next(cli.IMAGES.glob("*.jpg"))
    assert "name an image" in fails(capsys, "caption", "--attention", course, code=2)
    folder = Path(photo).parent / "images"
    folder.mkdir()
    Image.linear_gradient("L").save(folder / "one.jpg")
    monkeypatch.setattr(cli, "IMAGES", folder)
    for kind in ("png", "jpg", "pdf", "svg"):  # as `make demo` is called again
        for _ in range(2):
            command = ["caption", "--model", model, "--beams", "1", "--attention", f"map.{kind}"]
            code, _, err = run(capsys, *command)
            assert code == 0, err


def test_a_table_is_not_written_into_a_photo(capsys, photo, tmp_path):
    (tmp_path / "empty.jpg").touch()
    for name in (photo, "empty.jpg"):
        before = Path(name).read_bytes()
        assert "end in .csv" in fails(capsys, "caption", ".", "--csv", name, code=2)
        assert Path(name).read_bytes() == before


@pytest.mark.parametrize("name", ["checkpoint/config.json", "data.parquet", "list.json"])
def test_scores_are_not_written_into_what_is_read(capsys, tmp_path, name):
    for file, text in (
        ("checkpoint/config.json", "{}"),
        ("data.parquet", "PAR1"),
        ("list.json", "[1]"),
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    before = Path(name).read_bytes()
    command = ["evaluate", "--data", "data.parquet", "--model", "checkpoint", "--json", name]
    assert "holds no scores" in fails(capsys, *command, code=2)
    assert Path(name).read_bytes() == before


def test_letters_of_every_language_are_printed_as_they_are(capsys):
    name = "\u0645\u0647\u200c\u0647\u0627 \U0001f469\u200d\U0001f4bb 10\u202fkm \u3000\xad\xa0.jpg"
    say(name)
    assert capsys.readouterr().out == name + "\n"
    say("a\x1b\x00\x9b\u202e\u2066\u200f\u061c\udcffb\n\u2028\tc")
    assert capsys.readouterr().out == "a????????b   c\n"


def test_ask(capsys, model, photo):
    code, out, _ = run(capsys, "ask", photo, "who?", "what is {image}?", "--model", model)
    assert code == 0
    first, second = out.splitlines()
    assert first.startswith("who? ") and second.startswith("what is {image}? ")


def test_match_names_the_best_first(capsys, model, photo):
    texts = ["a dog", "the red car", "snow"]
    code, out, _ = run(capsys, "match", photo, *texts, "--model", model)
    lines = out.splitlines()
    assert code == 0 and sorted(line.split(maxsplit=2)[2] for line in lines[1:]) == sorted(texts)
    best = blip2.Blip2.from_pretrained(model).match(photo, texts).score.argmax()
    assert lines[1].endswith(texts[best])


def test_match_says_that_texts_are_cut(capsys, model, photo):
    long = "a dog " * 20
    code, out, err = run(capsys, "match", photo, long, "a dog", long + "cat", "--model", model)
    assert code == 0 and len(out.splitlines()) == 4
    assert err == "2 of 3 texts cut: only the first 32 tokens are read.\n"
    assert run(capsys, "match", photo, "a dog", "snow", "--model", model)[2] == ""


@pytest.mark.parametrize("command", [["ask", "none.jpg", "who?"], ["match", "none.jpg", "a dog"]])
def test_a_missing_image_is_found_before_the_model_is_loaded(capsys, monkeypatch, command):
    monkeypatch.setattr(cli, "load_model", lambda name: pytest.fail("loaded"))
    assert fails(capsys, *command) == "none.jpg does not exist; check the path."


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def cut_weights(folder: Path) -> None:
    file = folder / "stage2.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def other_sizes(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["bridge"]["qformer"]["num_queries"] += 1
    (folder / "config.json").write_text(json.dumps(values))


def no_weights(folder: Path) -> None:
    (folder / "stage2.safetensors").unlink()


@pytest.mark.parametrize("spoil", [broken_config, cut_weights, other_sizes, no_weights])
def test_a_damaged_model(capsys, model, photo, tmp_path, spoil):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in Path(model).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    spoil(folder)
    fails(capsys, "caption", photo, "--model", folder)


def test_no_such_model(capsys, photo):
    assert "nosuch/model" in fails(capsys, "caption", photo, "--model", "nosuch/model")
    assert "is a file" in fails(capsys, "caption", photo, "--model", photo)


def test_a_model_without_stage1_cannot_match(capsys, model, photo, tmp_path):
    loaded = blip2.Blip2.from_pretrained(model)
    loaded.stage1 = None
    loaded.save_pretrained(tmp_path / "writer")
    sentence = fails(capsys, "match", photo, "a dog", "--model", tmp_path / "writer")
    assert "no stage-1 heads" in sentence


def raise_(error: BaseException):
    def anything(*arguments, **settings):
        raise error

    return anything


def refused_memory() -> RuntimeError:
    """What PyTorch raises when no CPU memory is left: here for an exabyte."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    "error, code, words",
    [
        (KeyboardInterrupt(), 130, "Stopped."),
        (OSError(28, "No space left on device", "map.png"), 1, "map.png: No space left on device"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "doctor` tells"),
        (MemoryError(), 1, "memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "memory"),
        (refused_memory(), 1, "memory"),
    ],
)
def test_what_may_go_wrong_anywhere(capsys, photo, monkeypatch, error, code, words):
    monkeypatch.setattr(cli, "load_model", raise_(error))
    assert words in fails(capsys, "caption", photo, code=code)


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("shapes do not match")])
def test_a_mistake_of_ours_is_not_hidden(photo, monkeypatch, error):
    monkeypatch.setattr(cli, "load_model", raise_(error))
    with pytest.raises(type(error)):
        main(["caption", photo])


def test_without_the_libraries_a_sentence():
    """`-S` leaves the installed packages out, as a shell does where no environment is active."""
    command = [sys.executable, "-S", "-m", "blip2_edu", "doctor"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "No module named 'typer'" in done.stderr and "requirements.txt" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_stops_with_one_line(tmp_path):
    program = (
        # What a shell starts in the background ignores SIGINT, and its children inherit that.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT});"
        "import sys, time; from blip2_edu.app import cli; cli.load_model = lambda name: ("
        "print('ready', flush=True), time.sleep(60));"
        "sys.exit(cli.main(['caption', 'images/astronaut.jpg']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "Stopped.\n")


# Evaluate ----------------------------------------------------------------------------------------


def test_evaluate(capsys, model, tmp_path):
    arguments = ["--data", "scenes:6:1", "--blind", "scenes:6", "--model", model, "--limit", "4"]
    code, out, err = run(
        capsys, "evaluate", *arguments, "--rerank", "3", "--beams", "1", "--json", "scores.json"
    )
    assert code == 0, err
    written = json.loads((tmp_path / "scores.json").read_text())
    assert cli.holds_scores(tmp_path / "scores.json")  # so they may be written anew
    assert written["images"] == 4 and written["rerank"] == 3 and written["model"] == model
    wanted = {"TR@1", "IR@10 re-ranked", "BLEU-4", "CIDEr", "VQA", "images per second"}
    assert wanted | {"VQA blind, by question type"} <= set(written["scores"])
    for name, value in written["scores"].items():
        assert f"{value:.2f}" in next(x for x in out.splitlines() if x.startswith(f"{name}  "))


def test_evaluate_without_reranking(capsys, model, monkeypatch):
    monkeypatch.setattr(evaluation, "rerank", raise_(AssertionError()))
    arguments = ["--data", "scenes:3:1", "--model", model, "--rerank", "0", "--beams", "1"]
    code, out, _ = run(capsys, "evaluate", *arguments)
    assert code == 0 and "TR@1" in out and "re-ranked" not in out


@pytest.mark.parametrize("source", ["none.parquet", "scenes:many", "somebody/photos"])
def test_data_that_cannot_be_read(capsys, model, source):
    assert source in fails(capsys, "evaluate", "--data", source, "--model", model)


def test_evaluate_without_a_text(capsys, model, photo):
    Path("empty.csv").write_text("image,caption\nphoto.jpg,\n")
    sentence = fails(capsys, "evaluate", "--data", "empty.csv", "--model", model)
    assert sentence == "empty.csv has neither captions nor questions: all texts are empty."


def test_a_warning_is_one_line(photo, tmp_path):
    Path("two.csv").write_text("image,mask,caption\nphoto.jpg,photo.jpg,a dog\n")
    command = [sys.executable, "-m", "blip2_edu", "evaluate", "--blind", "two.csv"]
    command += ["--data", "two.csv", "--model", "none"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=offline)
    warning, mistake = done.stderr.splitlines()
    assert warning == "two.csv has several columns of images; image is taken, not mask."
    assert '"none"' in mistake and done.returncode == 1


# Train -------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Training on tiny models: a tiny encoder, language model and start of the Q-Former."""
    whole = small_models.blip2(tmp_path)
    encoder = whole.image_encoder
    for module in (vision, blip2):
        monkeypatch.setattr(module, "load_image_encoder", lambda name: encoder)
    for module in (language, blip2):
        monkeypatch.setattr(module, "load_language_model", lambda *names: whole.language_model)

    def start(size, num_queries, image_width):
        model = tiny.stage1(words=tiny.tokenizer(tmp_path))
        model.pretrained = {"qformer.norm.weight"}
        return model

    monkeypatch.setattr("blip2_edu.app.train.new_stage1", start)
    return whole


QUICK = ["--batch-size", "2", "--epochs", "1", "--evaluate-every", "1"]


def test_both_stages_one_after_the_other(capsys, small, tmp_path):
    code, out, err = run(capsys, *STAGE1, *QUICK)
    assert code == 0 and "The best model is in run." in out, err
    assert {"stage1.json", "stage1.safetensors", "tokenizer.json"} <= set(os.listdir("run"))

    assert "--resume" in fails(capsys, *STAGE1, *QUICK)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run(capsys, *STAGE1, *QUICK, "--resume")[0] == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before

    again = [*STAGE1[:-1], "again", "--start-from", "run", "--objectives", "itc", "--views", "1"]
    code, out, err = run(capsys, *again, *QUICK)
    assert code == 0 and "itc on 4 images" in out, err

    stage2 = [*STAGE2[:-1], "two", "--stage1", "run", "--data", "scenes:4"]
    stage2 += ["--questions", "scenes:4", "--questions-per-step", "2", "--ask-captions"]
    code, out, err = run(capsys, *stage2, *QUICK)
    assert code == 0 and "The best model is in two" in out, err
    assert "3 sources, 12 images" in out
    files = {"config.json", "stage1.safetensors", "stage2.safetensors", "metrics.jsonl"}
    assert files <= set(os.listdir("two"))
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").open()]
    assert {"CIDEr", "VQA"} <= set(lines[-1])

    again = [*STAGE2[:-1], "three", "--start-from", "two", "--data", "scenes:4"]
    code, out, err = run(capsys, *again, *QUICK, "--learning-rate", "0")
    assert code == 0, err
    for name in ("stage1.safetensors", "stage2.safetensors"):
        before, after = (load_tensors(tmp_path / folder / name)[0] for folder in ("two", "three"))
        assert_close(after, before, rtol=0, atol=0)
        if name.startswith("stage2"):
            assert f"{len(before)} tensors to go on" in out


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_another_language_model(capsys, tmp_path, kind):
    encoder = small_models.image_encoder(tmp_path / "encoder").name
    writer = small_models.save_language_model(kind, tmp_path / "language")
    reader = random_stage1(small_models.QFORMER, 0)
    reader.tokenizer = tiny.tokenizer(tmp_path)
    save_stage1(reader, tmp_path / "one")

    settings = {"stage1": tmp_path / "one", "encoder": encoder, "language_model": writer}
    model = new_blip2(Stage2Options(folder=tmp_path / "run", validation=[], **settings))
    model.save_pretrained(tmp_path / "two")
    again = blip2.Blip2.from_pretrained(tmp_path / "two")
    ends = again.language_model.end_token, model.language_model.end_token
    assert ends == (small_models.END,) * 2  # what it waits for is what it was taught

    if kind == "t5":
        command = [*STAGE2, "--start-from", "two", "--data", "scenes:4"]
        assert "takes --captions-per-image 1" in fails(capsys, *command, code=2)
        code, _, err = run(capsys, *command, *QUICK, "--captions-per-image", "1")
        assert code == 0, err


def test_without_stage1(capsys, small, tmp_path):
    command = [*STAGE2, "--without-stage1", "--data", "scenes:4"]
    code, _, err = run(capsys, *command, *QUICK)
    assert code == 0, err
    assert (tmp_path / "run" / "stage2.safetensors").exists()
    assert not (tmp_path / "run" / "stage1.safetensors").exists()


@pytest.mark.parametrize(
    "command, words",
    [
        ([*STAGE1, "--batch-size", "9"], "smaller --batch-size"),
        ([*STAGE1, *QUICK, "--resume"], "no run in run to resume"),
        ([*STAGE1, "--start-from", "none"], "none holds no readable stage1.json"),
        ([*STAGE2, "--stage1", "none", "--data", "scenes:4"], "none holds no readable stage1.json"),
    ],
)
def test_training_that_cannot_start(capsys, small, command, words):
    code, _, err = run(capsys, *command)
    assert code == 1 and words in err.splitlines()[-1] and "Traceback" not in err


def test_data_without_what_is_learned(capsys, small, monkeypatch):
    monkeypatch.setattr(
        examples,
        "load_examples",
        lambda *arguments: examples.Examples([{}] * 2, [[]] * 2, [[]] * 2),
    )
    assert fails(capsys, *STAGE1) == "scenes:4 has no captions."
    sentence = fails(capsys, *STAGE2, "--without-stage1", "--questions", "scenes:4")
    assert sentence == "scenes:4 has no questions."


def test_options_reach_the_configuration(capsys, small, monkeypatch, tmp_path):
    seen = {}

    def train(model, batches, validation, config, resume):
        seen.update(config=config, batches=batches, resume=resume)
        raise training.TrainingError("enough")

    monkeypatch.setattr(training, "train_stage1", train)
    options = {
        "epochs": 2.5,
        "learning_rate": 0.1,
        "learning_rate_new": 0.2,
        "weight_decay": 0.3,
        "warmup": 0.4,
        "gradient_accumulation": 5,
        "evaluate_every": 6,
        "seed": 7,
    }
    words = [w for name, x in options.items() for w in (f"--{name.replace('_', '-')}", str(x))]
    words += ["--batch-size", "3", "--weight", "0.7", "--keep-features", "9", "--tensorboard"]
    words += ["--itm-pairs", "2", "--objectives", "itm,itc", "--random-negatives", "8"]
    words += ["--itg-pairs", "1", "--spread", "0.5", "--average", "0.9"]
    run(capsys, *STAGE1, *words)
    options |= {"itm_pairs": 2, "objectives": "itm,itc", "random_negatives": 8}
    options |= {"itg_pairs": 1, "spread": 0.5, "average": 0.9}
    options |= {"batch_size": 3, "weight": [0.7], "keep_features": 9, "tensorboard": True}
    data = {"data": ["scenes:4"], "validation": ["scenes:2:1"]}
    assert seen["config"] == Stage1Options(Path("run"), **data, **options)
    (source,) = seen["batches"].sources
    assert (source.batch_size, source.keep_features) == (3, 9)
    assert seen["resume"] is False


def test_weights_share_a_batch(capsys, small, monkeypatch):
    seen = {}

    def train(model, batches, *others):
        seen["batches"] = batches
        raise training.TrainingError("enough")

    monkeypatch.setattr(training, "train_stage1", train)
    monkeypatch.setattr(training, "train_stage2", train)
    more = ["--data", "scenes:8:5", "--weight", "2", "--weight", "0.5"]
    run(capsys, *STAGE1, *more, "--batch-size", "6")
    assert [source.batch_size for source in seen["batches"].sources] == [4, 2]
    asked = ["--questions", "scenes:4:7", "--question-weight", "1", "--question-weight", "3"]
    others = ["--question-weight", "1", "--ask-captions", "--questions-per-step", "6"]
    words = [*STAGE2, "--without-stage1", "--data", "scenes:4", *more, *asked, *others]
    run(capsys, *words, "--batch-size", "6", "--share", "0.25")
    captions, questions = seen["batches"].sources
    assert [source.batch_size for source in captions.sources] == [4, 2]
    assert [source.batch_size for source in questions.sources] == [1, 3, 2]  # of 4, 4 and 8 images
    assert seen["batches"].share == 0.25
    assert "--weight is given 1 times for 2" in fails(
        capsys, *STAGE1, "--data", "scenes:8:5", "--weight", "2", code=2
    )
    assert "weight above 0" in fails(capsys, *STAGE1, "--weight", "0")


# Weights and doctor ------------------------------------------------------------------------------


def test_weights(capsys, monkeypatch, tmp_path):
    mini = tmp_path / "data" / "checkpoints" / "mini"
    mini.mkdir(parents=True)
    monkeypatch.setattr(published, "CHECKPOINTS", tmp_path / "data" / "checkpoints")
    code, out, _ = run(capsys, "weights")
    assert code == 1 and "PROBLEM  mini" in out  # a folder with nothing in it
    (mini / "config.json").write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    (mini / "SHA256SUMS").write_text(f"{digest}  config.json\n")
    code, out, _ = run(capsys, "weights")
    assert code == 0 and embedded.INSTALL in out
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["ok"] * 4
    absent = vars(embedded.EMBEDDED["minilm-l6"]) | {"package": "no_such_package"}
    monkeypatch.setitem(embedded.EMBEDDED, "minilm-l6", embedded.EmbeddedFile(**absent))
    code, out, _ = run(capsys, "weights")
    assert code == 1 and "PROBLEM  minilm-l6" in out


@pytest.mark.parametrize("code", [0, 1])
def test_doctor(capsys, monkeypatch, code):
    checks = [doctor.Check("Python", "3.11"), doctor.Check("mini", "gone", ok=code == 0)]
    monkeypatch.setattr(doctor, "report", lambda: checks)
    assert run(capsys, "doctor")[0] == code
