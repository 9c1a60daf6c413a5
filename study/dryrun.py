"""``--dry-run``: what a study would be and would need, with every check made and nothing started or written."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import search_spaces
from search_spaces import joint
from study import cluster
from study.command import Command
from study.limits import FROZEN
from study.preflight import preflight
from study.runs import count
from trainables.settings import to_dict

if TYPE_CHECKING:
    from study.config import StudyConfig

MOST_DRAWS = 2000  # random trials looked at for one of every branch


def dry_run(command: Command) -> int:
    """Print the resolved study, its resources, and one sampled trial per branch of the space.

    Raises:
        UserError: the study could not run.
    """
    config = command.config
    checked = preflight(config, command.storage, command.tracking_uri, dry_run=True)
    num_references, beside = len(config.evaluation.references), config.yardstick
    confirmed = config.confirm.seeds * (
        num_references + beside.confirm + config.num_finalists + len(config.confirm.recipes)
    )
    print(f"study {config.name} (dry run: nothing is started)")
    print(f"runs on    {place()}")
    print("\n".join(checked.lines))
    if config.system == FROZEN:
        return dry_probe(command, checked.notes)
    print(
        f"jobs       {config.search.trials} trials of up to {config.training.epochs} epochs, then up to {confirmed} "
        f"to confirm the best; {count(num_references, 'frozen reference')}"
        f"{' and the autoencoder of DCASE' if beside.search else ''}"
    )
    for note in checked.notes:
        print(f"note       {note}")
    print("\nmachines and clips")
    for line in checked.machines:
        print(f"  {line}")
    print("\nsettings")
    print(json.dumps(to_dict(config), indent=1))
    system = search_spaces.load(config.system)
    print("\npublished recipes")
    for name, params in system.RECIPES.items():
        mark = "tried first" if name in config.search.recipes else "not in search.recipes"
        print(f"  {name} ({mark}): {json.dumps(dict(params))}")
    print("\none sampled trial per branch")
    for label, params in sampled_branches(config, system):
        print(f"  {label}: {json.dumps(params)}")
    return 0


def place() -> str:
    """Which Ray a study that is started here uses."""
    if not cluster.attaches():
        return "a Ray of its own on this machine, ended with the study"
    if os.environ.get(cluster.JOB_CONFIG):
        return "the Ray cluster of this job"
    if address := os.environ.get("RAY_ADDRESS"):
        return f"the Ray cluster at RAY_ADDRESS = {address}"
    return "the Ray cluster that ray symmetric-run has started"


def dry_probe(command: Command, notes: Sequence[str]) -> int:
    """The rest of it for a probe: its layers and poolings, and its settings."""
    from study.preflight import encoder_layout
    from study.probe import readings_of

    config = command.config
    settings = readings_of(*encoder_layout(config.encoder, config.corpus))
    print(
        f"jobs       {len(settings)}, which train nothing: every layer and pooling of {config.encoder.name}"
    )
    for note in notes:
        print(f"note       {note}")
    print("\nsettings")
    print(json.dumps(to_dict(config), indent=1))
    print("\nlayers and poolings, each with every back end")
    for layer, pooling in settings:
        print(f"  layer {layer}, {pooling}")
    return 0


def sampled_branches(config: StudyConfig, system: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """One random trial for every choice of every ``*_kind``, labelled ``key=choice``, with what is fixed as it is."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    fixed, systems = config.search.fixed, search_spaces.systems_of(config.system)
    given = {
        name: value
        for key, value in fixed.items()
        for one in systems
        for name in (joint.named({joint.SYSTEM: one, key: value}) if len(systems) > 1 else (key,))
        if name != joint.SYSTEM
    }
    drawn = optuna.samplers.RandomSampler(seed=config.search.seed)
    with warnings.catch_warnings(action="ignore"):  # that fixing is experimental
        sampler = optuna.samplers.PartialFixedSampler(given, drawn)
    study = optuna.create_study(sampler=sampler)
    wanted = [
        (key, kind)
        for key, kinds in system.BRANCHES.items()
        for kind in kinds
        if fixed.get(key, kind) == kind
    ]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for _ in range(MOST_DRAWS):
        params = dict(system.space(study.ask()))
        for branch in wanted:
            if params.get(branch[0]) == branch[1]:
                found.setdefault(branch, params)
        if len(found) == len(wanted):
            break
    for key, kind in wanted:
        if (key, kind) in found:
            yield f"{key}={kind}", found[key, kind]
