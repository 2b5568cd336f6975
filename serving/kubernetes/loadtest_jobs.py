"""A load test on the cluster: the Jobs of one model, through the gateway.

Contract: `write_loadtest` writes a folder for `kubectl apply -k`, with the model's `deploy.toml`, as many of its inputs
as fit into a ConfigMap, and the authority of the gateway's certificate.
"""

import argparse
import math
import os
from pathlib import Path

import numpy as np

from deepseek.spec import InputError
from deepseek.spec.files.folders import beside, write_whole
from serving.kubernetes.manifests import NAMESPACE, Overlay, image
from serving.repository.served_models import ServedModel

WORKER_RPS = 500  # requests/s that one worker process sends without delay
GATEWAY_URL = "gateway:8443"  # inside the namespace
CONFIG_MAP_BYTES = 900_000  # a ConfigMap holds 1 MiB, its other entries included; kubectl apply --server-side


def loadtest_kustomization(overlay: Overlay, model: ServedModel, base: str, url: str, *, own_authority: bool) -> str:
    """The kustomization of the Jobs, with the model's name, rate and files.

    `own_authority`: `ca.crt` signed the gateway's certificate, not an authority that every system trusts.
    """
    rate_rps = model.rate_rps or 1
    workers = max(2, math.ceil(rate_rps / WORKER_RPS))
    trust = "--ca-cert=/inputs/ca.crt" if own_authority else "--tls"
    files = "inputs.npz, ca.crt" if own_authority else "inputs.npz"
    egress = f"""\
  - target: {{kind: NetworkPolicy, name: loadtest}}
    patch: "- {{op: add, path: /spec/egress/-, value: {{ports: [{{port: {url.rpartition(":")[2]}}}]}}}}"
"""
    return f"""\
# Written by deepseek kubernetes: the load test of {model.name}, through the gateway.
# Use kubectl apply --server-side -k: otherwise kubectl copies the inputs to an annotation, which holds only 256 KiB.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: {NAMESPACE}
resources: [{base}/loadtest]
configMapGenerator:
  - name: loadtest
    namespace: {NAMESPACE}
    behavior: merge
    literals: [MODEL={model.name}, TARGET={model.target}, RATE={rate_rps:g}, WORKERS={workers}]
  - {{name: loadtest-model, namespace: {NAMESPACE}, behavior: replace, files: [deploy.toml]}}
  - {{name: loadtest-inputs, namespace: {NAMESPACE}, behavior: replace, files: [{files}]}}
generatorOptions: {{disableNameSuffixHash: true}}
images:
{image(overlay, "deepseek-loadtests")}
patches:
  - target: {{kind: Job}}
    patch: |
      - {{op: replace, path: /spec/template/spec/containers/0/volumeMounts/2/mountPath, value: /models/{model.name}}}
      - {{op: replace, path: /spec/template/spec/containers/0/args/0, value: "--url={url}"}}
      - {{op: replace, path: /spec/template/spec/containers/0/args/1, value: {trust}}}
  # {rate_rps:g} requests/s, {WORKER_RPS} per worker
  - target: {{kind: Job, name: loadtest-worker}}
    patch: |
      - {{op: replace, path: /spec/parallelism, value: {workers}}}
      - {{op: replace, path: /spec/completions, value: {workers}}}
{"" if url == GATEWAY_URL else egress}"""


def write_loadtest(folder: Path, overlay: Overlay, model: ServedModel, options: argparse.Namespace) -> str:
    """Writes a model's load test; if its `deploy.toml` or inputs are missing, returns a note for the user instead."""
    spec = (model.models or options.models) / model.name / "deploy.toml"
    inputs = options.build / model.name / "evaluation.npz"
    if not spec.is_file():
        return (
            f"{model.name}: no {spec}, so no alert watches its SLO, and it has no load test; name its folder (MODELS=)"
        )
    if not inputs.is_file():
        return f"{model.name}: no {inputs}, so it has no load test; build the model here, or name its folder (BUILD=)"
    authority, copy = options.gateway / "ca.crt", folder / "ca.crt"
    own_authority = not options.loadtest_tls and authority.is_file()
    base = os.path.relpath(options.base.resolve(), folder.resolve())
    text = loadtest_kustomization(overlay, model, base, options.loadtest_url, own_authority=own_authority)
    write_whole(folder / "kustomization.yaml", text)
    write_whole(folder / "deploy.toml", spec.read_text(encoding="utf-8"))
    copy.unlink(missing_ok=True)
    if own_authority:
        write_whole(copy, authority.read_text(encoding="utf-8"))
    _copy_inputs(inputs, folder / "inputs.npz")
    return ""


def _copy_inputs(source: Path, copy: Path) -> None:
    """Copies the inputs, or as many rows as fit into a ConfigMap; entries are `<row>/<input>`."""
    with np.load(source) as file, beside(copy) as draft:
        rows = sorted({name.partition("/")[0] for name in file.files})
        step = math.ceil(source.stat().st_size / CONFIG_MAP_BYTES)
        while True:
            chosen = set(rows[::step])
            np.savez_compressed(draft, **{name: file[name] for name in file.files if name.partition("/")[0] in chosen})
            if draft.stat().st_size <= CONFIG_MAP_BYTES:
                return
            if len(chosen) == 1:
                raise InputError(f"{source}: one row is larger than a ConfigMap can hold ({CONFIG_MAP_BYTES} bytes)")
            step *= 2
