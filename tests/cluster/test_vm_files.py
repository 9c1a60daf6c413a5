"""The cluster launcher's files, without a cloud: every field against the schema of whoever reads it.

Ray's own schema for the whole file, botocore's model of RunInstances for AWS machines, the discovery document of
Compute Engine for Google's. Each check is also shown to find a wrong field, by its name.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

FILES = ("aws", "gcp", "onprem", "fake")
CLOUDS = ("aws", "gcp")
Config = dict[str, Any]


@pytest.fixture
def load(root: Path) -> Any:
    return lambda name: yaml.safe_load((root / "cluster" / f"{name}.yaml").read_text())


def check_launcher(config: Config) -> None:
    """As ``ray up`` does before it calls anybody, with unknown keys in places that Ray's schema leaves open."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    ready = config["provider"]["type"] == "fake_multinode"  # which Ray reads as it stands
    validate_config(config if ready else prepare_config(copy.deepcopy(config)))
    known = {
        "aws": {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group"},
        "gcp": {"type", "region", "availability_zone", "project_id", "cache_stopped_nodes", "use_internal_ips"},
        "local": {"type", "head_ip", "worker_ips", "external_head_ip", "external_worker_ips"},
        "fake_multinode": {
            "type", "gcs_address", "head_node_id", "launch_multiple", "use_node_id_as_ip", "disable_node_updaters",
            "disable_launch_config_check",
        },
    }  # fmt: skip
    unknown = config["provider"].keys() - known[config["provider"]["type"]]
    assert not unknown, f"provider: unknown {sorted(unknown)}"


def check_machines(config: Config) -> None:
    """What a cloud is asked for, against that cloud's own description of it."""
    check = {"aws": aws_problems, "gcp": gcp_problems}[config["provider"]["type"]]
    for name, node_type in config["available_node_types"].items():
        assert check(node_type["node_config"]) == "", name


def aws_problems(node_config: Config) -> str:
    from botocore.session import Session
    from botocore.validate import ParamValidator

    model = Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    return ParamValidator().validate(node_config | {"MinCount": 1, "MaxCount": 1}, model).generate_report()


def gcp_problems(node_config: Config) -> str:
    import googleapiclient

    file = Path(googleapiclient.__file__).parent / "discovery_cache/documents/compute.v1.json"
    schemas = json.loads(file.read_text())["schemas"]
    return "; ".join(discovery_problems(node_config, {"$ref": "Instance"}, schemas, ""))


def discovery_problems(value: Any, shape: Mapping[str, Any], schemas: Any, where: str) -> list[str]:
    """Unknown fields, wrong types and values outside an enumeration, of a value in Google's discovery language."""
    shape = schemas[shape["$ref"]] if "$ref" in shape else shape
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
    if not isinstance(value, kinds[shape["type"]]) and not (
        shape.get("format") == "int64" and isinstance(value, int)
    ):
        return [f"{where}: {value!r} is not of type {shape['type']}"]
    if "enum" in shape and value not in shape["enum"]:
        return [f"{where}: {value!r} is none of {', '.join(shape['enum'])}"]
    if isinstance(value, list):
        return [p for item in value for p in discovery_problems(item, shape["items"], schemas, where)]
    if not isinstance(value, dict):
        return []
    found = []
    for key, below in value.items():
        if key in shape.get("properties", {}):
            found += discovery_problems(below, shape["properties"][key], schemas, f"{where}.{key}")
        else:
            found.append(f"unknown field {where}.{key}")
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_launcher_takes_the_file(name: str, load: Any) -> None:
    check_launcher(load(name))


@pytest.mark.parametrize("name", CLOUDS)
def test_the_cloud_knows_every_field_of_its_machines(name: str, load: Any) -> None:
    check_machines(load(name))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("wrong", ["min_workers_", "initial_workers", "head_node_typ"])
def test_a_wrong_top_level_field_is_named(name: str, wrong: str, load: Any) -> None:
    with pytest.raises(Exception, match=wrong):
        check_launcher(load(name) | {wrong: 1})


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_field_of_the_provider_is_named(name: str, load: Any) -> None:
    config = load(name)
    config["provider"]["regoin"] = "eu-central-1"
    with pytest.raises(AssertionError, match="regoin"):
        check_launcher(config)


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("aws", {"InstanceTyp": "g6.2xlarge"}, "InstanceTyp"),
        ("aws", {"InstanceMarketOptions": {"MarketTyp": "spot"}}, "MarketTyp"),
        (
            "aws",
            {"BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": "100"}}]},
            "VolumeSize",
        ),
        ("gcp", {"machinetype": "g2-standard-8"}, "machinetype"),
        ("gcp", {"scheduling": {"provisioningModel": "CHEAP"}}, "provisioningModel: 'CHEAP' is none of"),
        (
            "gcp",
            {"disks": [{"boot": True, "initializeParams": {"diskSize": 100}}]},
            r"disks\.initializeParams\.diskSize",
        ),
    ],
)
def test_a_wrong_field_of_a_machine_is_named(name: str, wrong: Config, words: str, load: Any) -> None:
    config = load(name)
    config["available_node_types"]["gpu"]["node_config"] |= wrong
    with pytest.raises(AssertionError, match=words):
        check_machines(config)


@pytest.mark.parametrize("name", CLOUDS)
def test_gpu_workers_start_at_zero_on_spot_machines_and_the_head_stays(name: str, load: Any) -> None:
    config = load(name)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0}, "nothing that needs a CPU may land on the head"
    assert types
    assert config["provider"]["cache_stopped_nodes"] is False
    assert 0 < config["idle_timeout_minutes"] <= 30
    for worker in types.values():
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= config["max_workers"]
        assert worker["resources"]["GPU"] >= 1
    spot = {
        "aws": lambda node: node.get("InstanceMarketOptions", {}).get("MarketType") == "spot",
        "gcp": lambda node: node.get("scheduling", {}).get("provisioningModel") == "SPOT",
    }[name]
    assert all(spot(worker["node_config"]) for worker in types.values())
    assert not spot(head["node_config"])


@pytest.mark.parametrize("name", ["aws", "gcp", "onprem"])
def test_every_node_has_the_token_and_the_dashboard_stays_on_loopback(name: str, load: Any) -> None:
    config = load(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in line for line in config["setup_commands"])
    assert any("RAY_AUTH_MODE=token' >> ~/.bashrc" in line for line in config["setup_commands"])
    starts = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 1
    assert "--dashboard-host=127.0.0.1" in starts[0]


@pytest.mark.parametrize("name", ["aws", "gcp", "onprem"])
def test_nodes_get_the_environment_of_the_lock(name: str, load: Any, root: Path) -> None:
    """The same command as on a laptop, on the same two files; nothing else names a version."""
    config = load(name)
    mounts = {k: v for k, v in config["file_mounts"].items() if "auth_token" not in k}
    assert set(mounts.values()) == {"Makefile", "requirements.lock"}
    assert all((root / local).is_file() for local in mounts.values())
    assert "cd ~/retain-study && make env" in config["setup_commands"]
    text = (root / "cluster" / f"{name}.yaml").read_text()
    assert not re.search(r"pip install|ray==|torch==", text)
    if name in CLOUDS:
        assert any("/shared" in line and "mount -t nfs" in line for line in config["setup_commands"])


@pytest.mark.parametrize("name", ["aws", "gcp", "onprem"])
def test_its_ray_commands_are_ones_that_ray_takes(name: str, load: Any) -> None:
    from ray.scripts.scripts import start

    options = {option for parameter in start.params for option in parameter.opts}
    config = load(name)
    for line in [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]:
        if "ray start" in line:
            used = re.findall(r"--[a-z-]+", line)
            assert used
            assert set(used) <= options, line
