"""A malicious pickle in the place of every file that is read: nothing in it runs."""

from __future__ import annotations

import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainables.cache import make_all
from trainables.checkpoint import load_checkpoint
from trainables.encoders.beats_checkpoint import open_checkpoint
from trainables.encoders.encoder import load_encoder
from trainables.encoders.tiny import WEIGHTS
from trainables.errors import UserError
from trainables.settings import EncoderConfig


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path / "it-ran")


def as_zip(canary: Canary, path: Path) -> Path:
    torch.save({"cfg": {"a": canary}, "model": canary}, path)
    return path


def as_plain(canary: Canary, path: Path) -> Path:
    path.write_bytes(pickle.dumps({"cfg": canary, "model": canary}))
    return path


def test_the_canary_would_sing(canary: Canary) -> None:
    pickle.loads(pickle.dumps(canary))
    assert canary.folder.exists()


@pytest.mark.parametrize("form", [as_zip, as_plain])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("beats", "beats.pt"),
        ("wav2vec2_base", "wav2vec.pth"),
        ("wav2vec2_base", "wav2vec.safetensors"),
        ("tiny", "tiny.safetensors"),
        ("ast", "model.safetensors"),
    ],
)
def test_no_encoder_runs_what_a_checkpoint_holds(
    form: Callable[[Canary, Path], Path], name: str, file: str, canary: Canary, tmp_path: Path
) -> None:
    path = form(canary, tmp_path / file)
    if name == "tiny":
        path.with_suffix(".json").write_text(WEIGHTS.with_suffix(".json").read_text())
    if name == "ast":
        hooks = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
        shape = {"model_type": "audio-spectrogram-transformer", **hooks}
        (tmp_path / "config.json").write_text(json.dumps(shape))
        (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(canary.folder)!r})\nclass Evil: pass\n")
        form(canary, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=str(path)):
        load_encoder(EncoderConfig(name=name, checkpoint=str(path)), tmp_path / "cache")
    assert not canary.folder.exists()


@pytest.mark.parametrize("form", [as_zip, as_plain])
def test_a_kept_copy_of_beats_is_read_without_unpickling(
    form: Callable[[Canary, Path], Path], canary: Canary, tmp_path: Path
) -> None:
    """Whoever can write into the cache can also write the checksum beside it."""
    source, cache = as_plain(canary, tmp_path / "beats.pt"), tmp_path / "cache"
    from trainables.files import content_digest

    kept = cache / f"beats-{content_digest(source)[:16]}-1.safetensors"
    cache.mkdir()
    form(canary, kept)
    sidecar = {"cfg": {}, "sha256": content_digest(kept)}
    kept.with_suffix(".json").write_text(json.dumps(sidecar))
    with pytest.raises(UserError, match=r"beats\.pt"):
        open_checkpoint(source, cache)
    assert not canary.folder.exists()


@pytest.mark.parametrize("form", [as_zip, as_plain])
def test_a_checkpoint_to_go_on_from_is_no_pickle(
    form: Callable[[Canary, Path], Path], canary: Canary, tmp_path: Path
) -> None:
    data = form(canary, tmp_path / "epoch-0001.safetensors").read_bytes()
    state = {"epoch": 1}
    checksum = zlib.crc32(json.dumps(state).encode(), zlib.crc32(data))
    (tmp_path / "epoch-0001.json").write_text(json.dumps({"crc32": checksum, **state}))
    with pytest.warns(UserWarning, match="damaged checkpoint passed over"):
        assert load_checkpoint(tmp_path) is None
    assert not canary.folder.exists()


def test_a_cache_file_of_python_objects_is_not_opened(canary: Canary, tmp_path: Path) -> None:
    path = tmp_path / "targets-0.npy"
    np.save(path, np.array([canary], dtype=object), allow_pickle=True)
    path.with_suffix(".crc").write_text(f"{zlib.crc32(path.read_bytes())}\n")
    with pytest.raises(ValueError, match="object"):
        make_all({path: lambda: (1, [np.zeros((1, 2))])})
    assert not canary.folder.exists()
