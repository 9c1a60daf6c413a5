"""``study/score.py`` on a study that has run: what a user's recordings get, and what is refused."""

from __future__ import annotations

import gc
import io
import json
import select
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from study import score
from study.config import StudyConfig
from trainables.data.corpus import Corpus, open_corpus
from trainables.settings import build

RATE_HZ = 16_000


@pytest.fixture(scope="module")
def corpus(tiny_study: Any) -> Corpus:
    """The study's own corpus: clips of one second."""
    config = build(StudyConfig, tiny_study.folder.study()["config"])
    return open_corpus(config.corpus, tiny_study.storage / "cache")


@pytest.fixture(scope="module")
def recordings(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of the saw as files: ``bank/`` normal, ``good.wav``, ``bad.wav``, and stranger ones."""
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "bank" / "deep").mkdir(parents=True)
    saw = {"role": "machine", "name": "saw"}
    bank = corpus.select(**saw, split="train", label="normal")
    good = corpus.select(**saw, split="test", label="normal", domain="source")[0]
    bad = corpus.select(**saw, split="test", label="anomaly", domain="source")[0]

    def write(name: str, *waves: np.ndarray, rate_hz: int = RATE_HZ) -> None:
        soundfile.write(folder / name, np.concatenate(waves), rate_hz, subtype="FLOAT")

    for number, index in enumerate(bank):
        write(f"bank/{'deep/' if number % 2 else ''}{number}.wav", 0.05 * corpus.waves_NT[index])
    normal, anomaly = 0.05 * corpus.waves_NT[good], 0.05 * corpus.waves_NT[bad]
    write("known.wav", 0.05 * corpus.waves_NT[bank[0]])
    write("good.wav", normal)
    write("bad.wav", anomaly)
    write("quiet.wav", 0.01 * anomaly)
    write("stereo.wav", np.stack([anomaly, normal], 1))
    write("long.wav", normal, anomaly, normal[: RATE_HZ // 2])
    write("short.wav", normal[:8000])
    write("silent.wav", normal, 0 * normal)
    return folder


def lines(out: str) -> dict[str, dict[str, Any]]:
    """What was said, by file name."""
    return {Path(line["path"]).name: line for line in map(json.loads, out.splitlines())}


@pytest.fixture
def say(tiny_study: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Scores some recordings: exit code, lines by file name, and standard error without progress."""
    monkeypatch.setattr(score, "FIRST_WORD_S", 1e9)

    def run(*arguments: object) -> tuple[int, dict[str, dict[str, Any]], str]:
        capsys.readouterr()
        code = score.main(["--study", "tiny", "--storage", str(tiny_study.storage), *map(str, arguments)])
        said = capsys.readouterr()
        return code, lines(said.out), said.err

    return run


@pytest.mark.slow
def test_recordings_are_scored_against_the_study_s_own_bank(
    say: Any, recordings: Path, corpus: Corpus
) -> None:
    names = ("known.wav", "good.wav", "bad.wav", "quiet.wav", "stereo.wav")
    code, found, err = say("--machine", "saw", *(recordings / name for name in names))
    assert (code, err) == (0, "")
    assert list(found) == list(names)
    bad = found["bad.wav"]
    assert bad["path"] == str(recordings / "bad.wav")
    assert bad["machine"] == "saw"
    assert bad["study"] == "tiny"
    assert bad["student"].startswith("c-")
    assert bad["backend"] == "knn1_domain_z"
    assert bad["bank_pieces"] == len(corpus.select(role="machine", name="saw", split="train", label="normal"))
    assert bad["pieces"] == [{"start_s": 0.0, "end_s": 1.0, "score": bad["score"]}]
    assert bad["false_alarm_rate"] == 0.1
    assert bad["anomalous"] is (bad["score"] > bad["threshold"])
    first = corpus.select(role="machine", name="saw", split="train", label="normal")[0]
    assert found["known.wav"]["nearest"] == corpus.clips[first].origin
    assert found["known.wav"]["distance"] == pytest.approx(0, abs=0.05)
    assert found["known.wav"]["anomalous"] is False
    assert found["known.wav"]["score"] < min(found[name]["score"] for name in ("good.wav", "bad.wav"))
    assert found["quiet.wav"]["score"] == pytest.approx(bad["score"], abs=0.01), "a level is no anomaly"
    assert found["stereo.wav"]["score"] == pytest.approx(bad["score"], abs=0.01), "the first channel counts"


@pytest.mark.slow
def test_a_score_is_that_of_the_confirmed_student(
    say: Any, recordings: Path, corpus: Corpus, tiny_study: Any
) -> None:
    """The same number by the project's own parts, put together here."""
    import torch

    from trainables.checkpoint import load_checkpoint
    from trainables.encoders.encoder import load_encoder
    from trainables.scoring.backends import score_all
    from trainables.settings import EncoderConfig

    _, found, _ = say("--machine", "saw", recordings / "bad.wav")
    line = found["bad.wav"]
    tensors, _ = load_checkpoint(tiny_study.folder.checkpoint_path(line["student"]))
    encoder = load_encoder(EncoderConfig()).eval()
    frozen = encoder.state_dict()
    trained = {
        k.removeprefix("model.encoder."): v for k, v in tensors.items() if k.startswith("model.encoder.")
    }
    assert any(not torch.equal(frozen[name], value) for name, value in trained.items())
    encoder.load_state_dict(trained)
    bank = corpus.select(role="machine", name="saw", split="train", label="normal")
    bad = corpus.select(role="machine", name="saw", split="test", label="anomaly", domain="source")[:1]
    with torch.no_grad():
        emb = [
            encoder.pool(encoder.tokens(encoder.features(torch.from_numpy(np.array(corpus.waves_NT[index])))))
            for index in (bank, bad)
        ]
    is_target = np.array([corpus.clips[i].domain == "target" for i in bank])
    expected = score_all(
        emb[0].numpy(), is_target, emb[1].numpy(), encoder.num_bands, names=[line["backend"]]
    )
    assert line["score"] == pytest.approx(float(expected[line["backend"]][0]), abs=0.02)


@pytest.mark.slow
def test_a_long_recording_is_scored_piece_by_piece(say: Any, recordings: Path) -> None:
    code, found, _ = say(
        "--machine", "saw", *(recordings / f"{name}.wav" for name in ("long", "good", "bad"))
    )
    assert code == 0
    long = found["long.wav"]
    assert [(p["start_s"], p["end_s"]) for p in long["pieces"]] == [(0.0, 1.0), (1.0, 2.0), (1.5, 2.5)]
    assert long["score"] == max(p["score"] for p in long["pieces"])
    for piece, name in zip(long["pieces"][:2], ("good.wav", "bad.wav"), strict=True):
        assert piece["score"] == pytest.approx(found[name]["score"], abs=0.01)


@pytest.mark.slow
def test_a_bank_of_one_s_own(say: Any, recordings: Path) -> None:
    code, found, err = say(recordings / "known.wav", recordings / "bad.wav", "--bank", recordings / "bank")
    assert (code, err) == (0, "")
    assert found["bad.wav"]["machine"] is None
    assert found["known.wav"]["score"] < found["bad.wav"]["threshold"]
    assert found["known.wav"]["nearest"] == f"{recordings}/bank/0.wav [0-1 s]"
    assert found["bad.wav"]["score"] > found["known.wav"]["score"]
    alone, few = recordings / "bank" / "0.wav", recordings / "bank" / "2.wav"
    code, found, err = say(recordings / "bad.wav", "--machine", "mill 3", "--bank", alone, "--bank", few)
    assert code == 0
    assert (found["bad.wav"]["machine"], found["bad.wav"]["bank_pieces"]) == ("mill 3", 2)
    assert err == "note: a bank of 2 pieces says little; give more normal recordings\n"


@pytest.mark.slow
def test_what_cannot_be_scored_is_said_and_the_others_go_on(say: Any, recordings: Path) -> None:
    (recordings / "text.wav").write_text("no sound")
    names = ("none.wav", "short.wav", "silent.wav", "text.wav", "good.wav")
    code, found, err = say("--machine", "saw", *(recordings / name for name in names))
    assert (code, err) == (1, "")
    wrong = {
        "none.wav": "no such file",
        "short.wav": "0.500 s long",
        "silent.wav": "silent",
        "text.wav": "not an audio",
    }
    for name, part in wrong.items():
        assert part in found[name]["error"]
        assert "score" not in found[name]
    assert "score" in found["good.wav"]


@pytest.mark.slow
def test_a_lower_rate_of_false_alarms_asks_for_more(say: Any, recordings: Path) -> None:
    thresholds = []
    for rate in (0.5, 0.1, 0.001):
        _, found, _ = say("--machine", "saw", recordings / "bad.wav", "--false-alarm-rate", rate)
        thresholds.append(found["bad.wav"]["threshold"])
    assert thresholds == sorted(set(thresholds))


@pytest.mark.slow
def test_a_machine_that_only_trains_has_a_bank_too(say: Any, recordings: Path) -> None:
    code, found, _ = say("--machine", "fan", recordings / "bad.wav")
    assert code == 0
    assert found["bad.wav"]["nearest"].startswith("fan/")


@pytest.mark.slow
def test_folders_patterns_and_lists(
    say: Any,
    recordings: Path,
    tmp_path: Path,
    tiny_study: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, found, _ = say("--machine", "saw", recordings / "bank")
    assert (code, len(found)) == (0, 11)
    _, found, _ = say("--machine", "saw", recordings / "[gb]*d.wav")
    assert list(found) == ["bad.wav", "good.wav"]
    (tmp_path / "empty").mkdir()
    listed = f"{recordings}/good.wav\n\n{tmp_path}/empty\n{recordings}/gone.wav\r\n{recordings}/bad.wav"
    monkeypatch.setattr(sys, "stdin", io.StringIO(listed))
    capsys.readouterr()
    code = score.main(["--study", "tiny", "--storage", str(tiny_study.storage), "--machine", "saw", "-"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 1
    assert [Path(line.get("path", "")).name for line in found] == ["good.wav", "", "gone.wav", "bad.wav"]
    assert ["a folder without" in line.get("error", "") for line in found] == [False, True, False, False]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert say("--machine", "saw", "-") == (0, {}, "note: the list on standard input was empty\n")


@pytest.mark.slow
def test_a_list_is_read_as_it_is_scored_and_memory_stays_flat(
    recordings: Path, tiny_study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, sizes = 0, {}

    class Out:
        def write(self, text: str) -> int:
            nonlocal said
            said += text == "\n"
            return len(text)

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return False

    def names() -> Any:
        for number in range(240):
            assert said == number, "it reads ahead, or holds lines back"
            if number in (40, 239):
                gc.collect()
                sizes[number] = tracemalloc.get_traced_memory()[0]
            yield f"{recordings}/good.wav\n"

    monkeypatch.setattr(sys, "stdin", names())
    monkeypatch.setattr(sys, "stdout", Out())
    tracemalloc.start()
    try:
        code = score.main(["--study", "tiny", "--storage", str(tiny_study.storage), "--machine", "saw", "-"])
    finally:
        tracemalloc.stop()
    assert (code, said) == (0, 240)
    assert sizes[239] - sizes[40] < 200_000, "bytes that 200 recordings of 32 kB left behind"


@pytest.mark.slow
def test_a_recording_at_another_rate_is_resampled(say: Any, recordings: Path, corpus: Corpus) -> None:
    from trainables.data.audio import resample

    bad = corpus.select(role="machine", name="saw", split="test", label="anomaly", domain="source")[0]
    wave_T = 0.05 * resample(np.array(corpus.waves_NT[bad]), RATE_HZ, 48_000)
    soundfile.write(recordings / "fast.wav", wave_T, 48_000, subtype="FLOAT")
    _, found, _ = say("--machine", "saw", recordings / "fast.wav", recordings / "bad.wav")
    assert found["fast.wav"]["score"] == pytest.approx(found["bad.wav"]["score"], abs=0.3)


@pytest.mark.slow
def test_what_cannot_work_is_refused_in_one_line(
    say: Any, recordings: Path, tiny_study: Any, tmp_path: Path
) -> None:
    good = recordings / "good.wav"
    (tmp_path / "empty").mkdir()
    refusals = [
        ((good,), ["--machine is missing; allowed are ", "saw", "--bank"]),
        ((good, "--machine", "mill"), ["--machine mill: not one of this study", "saw"]),
        (
            (good, "--machine", "saw", "--false-alarm-rate", "1"),
            ["--false-alarm-rate = 1: allowed is more than 0"],
        ),
        (
            (good, "--machine", "saw", "--false-alarm-rate", "much"),
            ["--false-alarm-rate: invalid float value"],
        ),
        ((tmp_path / "empty", "--machine", "saw"), ["empty: a folder without .wav or .flac"]),
        ((good, "--register"), ["good.wav: --register scores nothing"]),
        (
            ("--register", "--tracking-uri", f"sqlite:///{tmp_path}/other.db"),
            ["does not know the study tiny"],
        ),
        ((good, "--bank", recordings / "silent.wav"), ["--bank ", "silent.wav", "silent"]),
        ((good, "--bank", tmp_path / "empty"), ["empty: a folder without .wav or .flac"]),
        (("--bank", good), ["no recording to score"]),
        ((good, "--study", "tini"), ["--study tini: no such study", "there are tiny"]),
        ((good, "--storage", tmp_path), [f"no such study in {tmp_path}", "run study/run.py first"]),
        ((good, "--machines", "saw"), ["--machines"]),
    ]
    for arguments, parts in refusals:
        code, found, err = say(*arguments)
        assert (code, found, err.count("\n")) == (2, {}, 1), err
        for part in parts:
            assert part in err
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "study.json").write_text((tiny_study.folder.path / "study.json").read_text())
    code, _, err = say(good, "--bank", recordings / "bank", "--storage", tmp_path, "--study", "begun")
    assert code == 2
    assert "none of its students is confirmed; run its command again to finish it" in err


@pytest.mark.slow
def test_as_the_shell_sees_it(root: Path, recordings: Path, tiny_study: Any) -> None:
    words = [sys.executable, "study/score.py", "--study", "tiny", "--storage", str(tiny_study.storage)]
    words += [str(recordings / "good.wav"), "--bank", str(recordings / "bank")]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True, timeout=100)
    assert lines(done.stdout)["good.wav"]["bank_pieces"] == 11


@pytest.mark.slow
def test_each_line_is_there_before_the_next_recording_is_named(
    root: Path, recordings: Path, tiny_study: Any
) -> None:
    words = [sys.executable, "study/score.py", "--study", "tiny", "--storage", str(tiny_study.storage)]
    words += ["--machine", "saw", "-"]
    with subprocess.Popen(
        words, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            for name in ("good.wav", "gone.wav", "bad.wav"):
                print(recordings / name, file=process.stdin, flush=True)
                assert select.select([process.stdout], [], [], 150)[0], "nothing came"
                assert Path(json.loads(process.stdout.readline())["path"]).name == name
            process.stdin.close()
            process.stdin = None
            out, err = process.communicate(timeout=60)
            assert (out, process.returncode) == ("", 1)
            assert "error" not in err.replace("with errors", ""), err  # progress, where it takes long
        finally:
            process.kill()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(score.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "stdout", io.StringIO())

    def shown(stream: io.StringIO, total: int | None) -> str:
        nonlocal now
        now = 0.0
        monkeypatch.setattr(sys, "stderr", stream)
        progress = score.Progress(total)
        for number in range(100):
            now += 0.4
            progress.clear()
            progress.count(failed=number == 3)
        progress.clear()
        return stream.getvalue()

    assert shown(io.StringIO(), None) == "25 recordings, 1 with errors, 2.5 a second\n", "when it takes long"
    live = shown(Terminal(), 100)
    assert live.startswith("\r2 of 100 recordings, 2.5 a second\r\x1b[K\r4 of 100 recordings, 1 with errors")
    assert live.endswith("\r\x1b[K"), "it is taken away"
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert shown(Terminal(), 100) == "", "lines on the same terminal are progress enough"


def test_help_teaches_and_imports_nothing_heavy(root: Path) -> None:
    ask = (
        "import sys\nfrom study import score\ntry:\n    score.main(['--help'])\nexcept SystemExit as end:\n"
        "    heavy = {'torch', 'ray', 'numpy', 'optuna', 'mlflow'} & sys.modules.keys()\n"
        "    sys.exit(end.code or (str(heavy) if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", ask], cwd=root, capture_output=True, text=True, check=True)
    for part in ("--bank", "--machine", "--false-alarm-rate", "examples", "exit codes", "threshold"):
        assert part in done.stdout
