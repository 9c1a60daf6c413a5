"""Self-supervised audio encoders behind one interface.

An encoder is one module and one line below. The module offers ``load(config, cache_dir) -> Backbone``,
``weights_digest(config) -> str`` (identity of its weights by content) and ``export(config, path)``, which writes them
as a safetensors file that ``load`` takes as ``encoder.checkpoint``; see ``encoder.py`` for what a backbone is.
It is imported when it is asked for, so that what needs an extra costs nothing to those who do not use it.
"""

from collections.abc import Mapping
from types import MappingProxyType

ENCODERS: Mapping[str, str] = MappingProxyType(  # encoder.name -> module
    {
        "tiny": "trainables.encoders.tiny",
        "beats": "trainables.encoders.beats",
        "wav2vec2_base": "trainables.encoders.wav2vec",
        "wav2vec2_large": "trainables.encoders.wav2vec",
        "wav2vec2_large_lv60k": "trainables.encoders.wav2vec",
        "wav2vec2_xlsr53": "trainables.encoders.wav2vec",
        "wav2vec2_xlsr_300m": "trainables.encoders.wav2vec",
        "hubert_base": "trainables.encoders.wav2vec",
        "hubert_large": "trainables.encoders.wav2vec",
        "hubert_xlarge": "trainables.encoders.wav2vec",
        "wavlm_base": "trainables.encoders.wav2vec",
        "wavlm_base_plus": "trainables.encoders.wav2vec",
        "wavlm_large": "trainables.encoders.wav2vec",
        "ast": "trainables.encoders.hf",
        "data2vec_base": "trainables.encoders.hf",
        "data2vec_large": "trainables.encoders.hf",
    }
)
