"""Warm worker slots: Ray Tune trials on Ray Train worker groups that live as long as the study.

    tune.Tuner(slot_class(settings, storage=folder), tune_config=tune.TuneConfig(reuse_actors=True, ...), ...)

Starting a worker group for each trial costs half a minute and hundreds of megabytes. A slot is one Tune actor with
one group of workers, both kept: Tune hands it trial after trial (``reset_config``) and it hands them to its workers
(``worker.py``) through a small actor (``control.py``). The Tune config of a trial is ``{"job": job}``.

Each epoch is a handshake, so a trial that is stopped early returns and nothing is killed. A trial that raises ends
with a result that says ``failed``. A worker that dies is restarted by Ray Train and its trial goes on from its
checkpoint, and so it does when an elastic group changes its size (``elastic.py``). Only when its workers cannot be
started (again) is a slot lost: ``SlotLost`` fails the Tune trial, with the reason in one line, and Tune starts another
slot. Neither torch nor a trial's code is imported here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from study.control import Control, Event, one_line
from study.worker import resident

if TYPE_CHECKING:
    from study.config import SlotsConfig

logger = logging.getLogger(__name__)

WAIT_S = 1.0  # how often a slot that waits for an epoch looks after its workers
STOP_S = 8.0  # how long cleanup waits for the workers; what is left dies with the slot's actor
ELASTIC_S = 20.0  # for the room of an elastic group, before another size is tried
STALL_S = 60.0  # to create worker processes once there is room for them
UP = "up"  # file in a slot's folder: its workers have had a job
HEAD = "node:__internal_head__"  # of which every head has 1, and no other node anything

TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # a dead worker is noticed at this pace
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process per group; checkpoints are written anyway
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class SlotLost(RuntimeError):
    """A slot's workers are gone for good, or never came. One line."""


def ray_environment() -> dict[str, str]:
    """Environment variables to set before ``ray.init``. Slots on other machines set theirs themselves."""
    return TRAIN_ENVIRONMENT | {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard copies of our records
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial reports no objective
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def slot_resources(settings: SlotsConfig) -> dict[str, float]:
    """What one slot takes of a cluster at least, by Ray's names. The slot's own actors take no CPU."""
    per_worker = _per_worker(settings)
    return {name: amount * settings.least for name, amount in per_worker.items()}


def slot_class(settings: SlotsConfig, *, storage: str | Path) -> type[Slot]:
    """The Tune Trainable for slots of these settings.

    Args:
        settings: a trial without a finished epoch for ``epoch_timeout_s`` fails, and its workers are restarted.
        storage: folder for Ray Train's own files, reachable from all machines; nothing stays there.
    """
    return type("Slot", (Slot,), {"settings": settings, "storage": str(storage)})


def num_up(storage: Path) -> int:
    """How many slots have come up so far that have their folders in ``storage``."""
    return sum(1 for _ in storage.glob(f"*/{UP}"))


class Slot(tune.Trainable):
    """A Tune actor whose workers outlive its trials. Use ``slot_class``."""

    settings: SlotsConfig
    storage: str

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        # Tune wants something to reserve. A whole or partial CPU would keep a worker off a small machine. On the
        # head, because other nodes may be taken away: what Ray Train starts for this slot stays beside it.
        return tune.PlacementGroupFactory([{"memory": 1, HEAD: 0.0001}])

    def setup(self, config: dict[str, Any]) -> None:
        for name, value in TRAIN_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        settings = self.settings
        patience_s = (
            min(ELASTIC_S, settings.start_timeout_s) if settings.elastic else settings.start_timeout_s
        )
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(patience_s)
        _let_cleaner_find_cluster()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._control = (
            ray.remote(num_cpus=0)(Control).options(scheduling_strategy=here).remote(settings.max_restarts)
        )
        self._begin(config)
        self._run_name, self._end = f"slot-{uuid.uuid4().hex[:8]}", ""
        self._group = threading.Thread(target=self._keep_group, daemon=True, name="worker group")
        self._up = False
        self._group.start()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._require_group()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the trial's next epoch."""
        while True:
            event = ray.get(self._control.next.remote(self._epoch, WAIT_S))
            if event.get("phase") != "starting":
                self._tell_up()
            if event["kind"] == "record":
                return self._result(event)
            if event["kind"] == "failed":
                return self._failure(event["reason"], event["traceback"])
            self._require_group()
            if event["phase"] == "starting":
                if event["for_s"] > self.settings.start_timeout_s + STALL_S:
                    raise SlotLost(f"workers did not start within {event['for_s']:.0f} s: {self._asked()}")
            elif event["for_s"] > self.settings.epoch_timeout_s:
                for worker in ray.get(self._control.abandon.remote()):
                    ray.kill(ray.cloudpickle.loads(worker))
                return self._failure(f"no epoch finished within {self.settings.epoch_timeout_s:g} s", "")

    def cleanup(self) -> None:
        """Send the workers home and take the group down with all it holds."""
        try:
            ray.get(self._control.close.remote(), timeout=STOP_S)
        except Exception as error:
            logger.warning("could not close a slot in an orderly way: %s", error)
        self._group.join(STOP_S)
        if self._group.is_alive():  # a long epoch: Tune ends this actor, and what it has started ends with it
            return
        ray.kill(self._control)
        if "://" not in self.storage:
            shutil.rmtree(Path(self.storage) / self._run_name, ignore_errors=True)

    # Tune saves trials that it pauses. Ours keep their checkpoints themselves.

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        pass

    def _tell_up(self) -> None:
        """Leave word for the driver that the workers of this slot have a job, once (``num_up``)."""
        if not self._up and "://" not in self.storage:
            with contextlib.suppress(OSError):
                (Path(self.storage) / self._run_name).mkdir(parents=True, exist_ok=True)
                (Path(self.storage) / self._run_name / UP).touch()
        self._up = True

    def _begin(self, config: dict[str, Any]) -> None:
        self._job, self._epoch, self._num_workers = config["job"], 0, self.settings.least
        ray.get(self._control.submit.remote(self._job))

    def _result(self, event: Event) -> dict[str, Any]:
        record = event["record"]
        self._epoch, self._num_workers = record["epoch"], event["num_workers"]
        result = self._common() | {"done": record["done"], "failed": None, "record": record}
        if "official" in record["metrics"]:
            result["official"] = record["metrics"]["official"]
        return result | {"idle_s": event["idle_s"], "restarts": event["restarts"]}

    def _failure(self, reason: str, traceback: str) -> dict[str, Any]:
        return self._common() | {"done": True, "failed": reason, "traceback": traceback}

    def _common(self) -> dict[str, Any]:
        job = self._job
        return {
            "job_id": job["id"],
            "role": job["role"],
            "epoch": self._epoch,
            "num_workers": self._num_workers,
        }

    def _require_group(self) -> None:
        if not self._group.is_alive():
            raise SlotLost(self._end)

    def _keep_group(self) -> None:
        """Run the worker group to its end (a thread of its own, because Ray Train blocks)."""
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        class Trainer(DataParallelTrainer):
            def _create_default_callbacks(self) -> list[Any]:
                # Ray Train's data sets, of which there are none here, would cost each slot one more process.
                # Private to Ray Train; a version without this method only starts slower.
                found = super()._create_default_callbacks()
                return [c for c in found if type(c).__name__ != "DatasetsCallback"]

            def _initialize_and_run_controller(self, **parts: Any) -> Any:
                if settings.elastic:
                    from study.elastic import Elastic

                    parts["scaling_policy"] = Elastic(self.scaling_config, control)
                return super()._initialize_and_run_controller(**parts)

        control, settings, began = self._control, self.settings, time.monotonic()
        trainer = Trainer(
            resident,
            train_loop_config={
                "control": control,
                "gpus_per_worker": settings.gpus_per_worker,
                "system_metrics": settings.system_metrics,
            },
            scaling_config=ScalingConfig(
                num_workers=(settings.least, settings.workers) if settings.elastic else settings.workers,
                use_gpu=settings.gpus_per_worker > 0,
                resources_per_worker=_per_worker(settings),
            ),
            run_config=RunConfig(
                name=self._run_name,
                storage_path=self.storage,
                # Restarts are counted by trial (control.py): a slot lives through more of them than one
                # trial may. A group that cannot be started ends the slot, unless another size may be.
                failure_config=FailureConfig(
                    max_failures=-1, controller_failure_limit=-1 if settings.elastic else 0
                ),
                callbacks=[_obituaries(self._control)],
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            trainer.fit()
            self._end = "workers ended before their trial did"
        except Exception as error:
            cause = getattr(error, "controller_failure", error)
            self._end = f"workers could not be started within {settings.start_timeout_s:g} s: {self._asked()}"
            if type(cause).__name__ != "WorkerGroupStartupTimeoutError":
                self._end = f"workers lost after {time.monotonic() - began:.0f} s: {one_line(cause)}"

    def _asked(self) -> str:
        wanted = f"{self.settings.size} x {_spell(_per_worker(self.settings))}"
        has, free = _spell(ray.cluster_resources()), _spell(ray.available_resources())
        return f"asked for {wanted}; the cluster has {has}, free {free}"


def _obituaries(control: Any) -> Any:
    """A Ray Train callback that tells ``control`` of each group that ends with an error, and why."""
    from ray.train import UserCallback

    class Obituaries(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            reasons = [f"worker {rank}: {one_line(error)}" for rank, error in worker_exceptions.items()]
            control.died.remote("; ".join(reasons))

    return Obituaries()


def _let_cleaner_find_cluster() -> None:
    """Ray Train's clean-up process asks for an address, and gives up where two clusters run on one machine."""
    from ray.train.v2._internal import constants

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    constants.ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")


def _per_worker(settings: SlotsConfig) -> dict[str, float]:
    resources = {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker}
    return {name: amount for name, amount in resources.items() if amount}


def _spell(resources: dict[str, float]) -> str:
    shown = [f"{name} {amount:g}" for name, amount in sorted(resources.items()) if name in ("CPU", "GPU")]
    return "{" + ", ".join(shown) + "}"
