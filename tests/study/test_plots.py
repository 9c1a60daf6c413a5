"""What figures share: legends that fit, colours that tell methods apart, and words for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from study import plots
from study.summary import BEST_TITLE, TITLES
from study.wording import drawn, name_of

LONG = [f"Paper's setting (system {n})" for n in range(9)]


@pytest.mark.parametrize("width", [3.5, 9.7])
def test_a_legend_of_many_long_names_stays_inside_the_figure(width: float) -> None:
    with plots.style():
        made, axes = plots.figure(width, 4.0)
        for title in LONG:
            axes[0, 0].plot([0, 1], [0, 1], label=title)
        plots.legend_below(made, *axes[0, 0].get_legend_handles_labels())
        made.draw_without_rendering()
        (legend,) = made.legends
        box = legend.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= made.bbox.width
        assert box.y0 >= 0


@pytest.mark.parametrize(
    "names",
    [
        [
            "teacher",
            "oracle",
            "autoencoder",
            "denoising",
            "tagging",
            "alignment",
            "paper",
            "best",
            "best2",
            "best3",
        ],
        ["teacher", "oracle", "autoencoder", *(f"system-recipe{n}" for n in range(7)), "best"],
    ],
)
def test_every_method_has_a_colour_of_its_own(names: list[str]) -> None:
    summary: Any = SimpleNamespace(best_who="best", methods={who: SimpleNamespace(who=who) for who in names})
    shades = [plots.colour(summary, method) for method in summary.methods.values()]
    assert len(set(shades)) == len(names)


@pytest.mark.parametrize(
    ("who", "title", "words"),
    [
        ("teacher", TITLES["teacher"], "the frozen teacher"),
        ("autoencoder", TITLES["autoencoder"], "the challenge's autoencoder"),
        ("retain-paper", f"{TITLES['paper']} (retain)", "the paper's setting (retain)"),
        ("adapt-lora", f"{TITLES['lora']} (adapt)", "LoRA (adapt)"),
        ("denoising", TITLES["denoising"], "denoising"),
        ("best", f"{BEST_TITLE} (identify)", "the best found setting (identify)"),
        ("best-retain", "Best of retain", "the best of retain"),
        ("best2", "Finalist 2", "finalist 2"),
    ],
)
def test_a_method_in_a_sentence(who: str, title: str, words: str) -> None:
    method: Any = SimpleNamespace(who=who, title=title)
    assert name_of(method) == words


@pytest.mark.parametrize(
    ("num_machines", "num_recordings", "words"),
    [
        (5, 200, "machines, each with its recordings, and seeds"),
        (5, 0, "machines and seeds"),
        (1, 14, "its 14 recordings and seeds"),
        (1, 0, "seeds alone"),
    ],
)
def test_what_an_interval_is_over(num_machines: int, num_recordings: int, words: str) -> None:
    score = SimpleNamespace(num_recordings=num_recordings)
    method = SimpleNamespace(scores={"": score})
    summary: Any = SimpleNamespace(methods={"teacher": method}, machines=tuple("abcde")[:num_machines])
    assert drawn(summary) == words
