"""Manifests as the cluster gets them: the folders in `kubernetes/`, and generated overlays."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

KUBERNETES = "1.37"  # the version of the schemas
utils.schema_contents = functools.cache(utils.schema_contents)  # the definitions alone have 1.8 MB
Object = dict[str, Any]
FOLDERS = ("base", "overlays/kserve", "loadtest", "loader")
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "keda": ("--autoscaler", "keda", "--registry", "registry.example.com/shop", "--image-tag", "1.4.0"),
    "fetched": ("--models-url", "https://models.example.com/shop/models.tar.gz", "--load-balancer"),
    "bare": ("--autoscaler", "none", "--no-monitoring"),
    "gpu": ("--triton-tag", "26.09"),  # for an engine that takes texts
}


@functools.cache
def build(folder: Path) -> tuple[Object, ...]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: apt-get install kubectl")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nothing deprecated
    return tuple(yaml.load_all(done.stdout, yaml.CSafeLoader))


def committed(name: str) -> tuple[Object, ...]:
    return build(Path("kubernetes") / name)


def check_schema(each: Object) -> None:
    kubernetes_validate.validate(each, KUBERNETES, strict=True)


def find(objects: tuple[Object, ...], kind: str, name: str = "triton") -> Object:
    (found,) = (each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def pods(objects: tuple[Object, ...]) -> Iterator[Object]:
    for each in objects:
        if each["kind"] in ("Deployment", "Job"):
            yield each["spec"]["template"]["spec"]
        elif each["kind"] == "Pod":
            yield each["spec"]
        elif each["kind"] == "InferenceService":
            yield each["spec"]["predictor"]


def pod_of(objects: tuple[Object, ...], name: str = "triton") -> Object:
    return find(objects, "Deployment", name)["spec"]["template"]["spec"]


def container_of(objects: tuple[Object, ...], name: str = "triton") -> Object:
    (found,) = (each for each in pod_of(objects, name)["containers"] if each["name"] == name)
    return found
