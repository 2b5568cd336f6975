"""Mixed traffic: several models in one load test, each with its own inputs, SLO and folder of results.

Contract: a mix names models and the weights of their arrival rates, `recommender:3,minilm:1`; the weights are shares of
`--rate`, of every rate of `--shape`, or of `--users`. Without weights they are the rates that the models' SLOs name.
Without a rate the mix runs at the least one at which every model is asked as much as its SLO names. Each model has a
Poisson (or constant) schedule of its own; together they are one of the sum of the rates. Each has a pool of its own,
too, so that a model that stalls does not have the other's requests dropped.

Examples:
    mix = Mix.parse("recommender:3,minilm:1", {"recommender": 100.0, "minilm": 40.0})
    mix.least_rate_rps                      # 160: then minilm, a quarter of it, gets its 40
    mix.parts(settings, inputs)             # Settings of each model
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from deepseek.spec import InputError
from loadtests.results import Run, Settings, runs_folder

_PART = re.compile(r"(?P<model>[^:,\s]+)(\s*:\s*(?P<weight>\d+(\.\d+)?))?")


def models_of(text: str) -> list[str]:
    """The models that a mix names."""
    return [model for model, _ in _parsed(text)]


def _parsed(text: str) -> list[tuple[str, float | None]]:
    parts = [_PART.fullmatch(part.strip()) for part in text.split(",")]
    found = [(part["model"], float(part["weight"]) if part["weight"] else None) for part in parts if part]
    models = [model for model, _ in found]
    weights = [weight for _, weight in found]
    if len(found) < len(parts) or 0 in weights or len(models) < 2 or len(set(models)) < len(models):
        raise InputError(
            f"--mix {text!r}: it names two or more models, each once, with weights above 0, such as "
            '"recommender:3,minilm:1", or none of them with a weight'
        )
    if 0 < weights.count(None) < len(weights):
        raise InputError(f"--mix {text!r}: give every model a weight, or none (then the rates of their SLOs are it)")
    return found


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Models and their shares of the load, which add up to 1."""

    text: str
    """As it was asked for."""
    shares: dict[str, float]
    slo_rates_rps: dict[str, float | None]

    @classmethod
    def parse(cls, text: str, slo_rates_rps: Mapping[str, float | None]) -> Mix:
        """From what the command line says; InputError in one line where that makes no mix."""
        weights = {}
        for model, weight in _parsed(text):
            rate_rps = slo_rates_rps[model]
            if weight is None and rate_rps is None:
                raise InputError(f"--mix {text!r}: {model} has no slo.rate_rps to go by; give weights, as {model}:1")
            weights[model] = weight or rate_rps or 0.0
        total = sum(weights.values())
        shares = {model: weight / total for model, weight in weights.items()}
        return cls(text="".join(text.split()), shares=shares, slo_rates_rps=dict(slo_rates_rps))

    @property
    def least_rate_rps(self) -> float:
        """Of the whole mix, so that no model gets less than its SLO's rate."""
        asked = [(rate or 0.0) / self.shares[model] for model, rate in self.slo_rates_rps.items()]
        if not max(asked):
            raise InputError(
                f"--mix {self.text}: no model has an slo.rate_rps to go by; give --rate, --shape or --users"
            )
        return max(asked)

    def parts(self, whole: Settings, inputs: Mapping[str, str]) -> list[Settings]:
        """The settings of each model, from those of the whole mix; `inputs` are their files."""
        users = self._users(whole.users)
        return [
            replace(
                whole,
                model=model,
                inputs=inputs[model],
                rate_rps=None if whole.rate_rps is None else _rate(whole.rate_rps * share),
                shape=None if whole.shape is None else _scaled(whole.shape, share),
                users=users.get(model),
                seed=whole.seed + place,
                mix=self.text,
            )
            for place, (model, share) in enumerate(self.shares.items())
        ]

    def _users(self, users: int | None) -> dict[str, int]:
        """Whole users of each model, one at least."""
        if users is None:
            return {}
        if users < len(self.shares):
            raise InputError(f"--users {users} for a mix of {len(self.shares)} models: each needs one or more")
        found = {model: max(1, int(users * share)) for model, share in self.shares.items()}
        while sum(found.values()) != users:  # what rounding left goes to whoever is furthest from its share
            step = 1 if sum(found.values()) < users else -1
            open_to = [model for model in found if found[model] + step >= 1]
            found[max(open_to, key=lambda model: step * (users * self.shares[model] - found[model]))] += step
        return found


def _rate(rate_rps: float) -> float:
    """Without what a product of floats has behind its ninth digit: an objective's own rate is found again by it."""
    return float(f"{rate_rps:.9g}")


def _scaled(shape: str, share: float) -> str:
    """A shape with every rate times `share`, in thousandths."""

    def rate(text: str) -> str:
        return f"{float(text) * share:.3f}".rstrip("0").rstrip(".")

    segments = []
    for segment in shape.split(","):
        rates, _, seconds = segment.strip().rpartition("x")
        segments.append("-".join(map(rate, rates.split("-"))) + f"x{seconds}")
    return ", ".join(segments)


def runs_of(text: str, run: str | None = None) -> list[Run]:
    """The run of each model: of the latest such mix, or of the one that the folder `run` is a part of."""
    models, wanted = models_of(text), "".join(text.split())
    folders = [Path(run).absolute()] if run else sorted(runs_folder(models[0]).glob("[!.]*"), reverse=True)
    for folder in folders:  # build/<model>/loadtests/<time>
        build = folder.parent.parent.parent
        parts = [build / model / "loadtests" / folder.name for model in models]
        if all((part / "run.json").is_file() for part in parts):
            runs = [Run.load(part) for part in parts]
            if runs[0].settings.mix == wanted:
                return runs
    where = run or runs_folder(models[0])
    raise InputError(f"no load test of the mix {wanted} in {where}; make one with: make loadtest MIX={wanted}")
