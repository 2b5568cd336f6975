"""Mixed traffic: several models in one load test, each with its own inputs, SLO and folder of results.

Contract: a mix names models and the weights of their arrival rates, `recommender:3,minilm:1`; without weights, each
model gets the rate of its SLO. Each model has its own schedule and its own limit on requests in flight, so a stalled
model does not cause the other's requests to be dropped.

Example:
    mix = Mix.parse("recommender:3,minilm:1", {"recommender": 100.0, "minilm": 40.0})
    mix.least_rate_rps                      # 160: a quarter of it is minilm's 40
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from deepseek.spec import InputError
from loadtests.results.run import Run, runs_folder
from loadtests.results.settings import LoadSettings

_PART = re.compile(r"(?P<model>[^:,\s]+)(\s*:\s*(?P<weight>\d+(\.\d+)?))?")


def models_of(text: str) -> list[str]:
    return [model for model, _ in _parsed(text)]


def _parsed(text: str) -> list[tuple[str, float | None]]:
    parts = [_PART.fullmatch(part.strip()) for part in text.split(",")]
    found = [(part["model"], float(part["weight"]) if part["weight"] else None) for part in parts if part]
    models = [model for model, _ in found]
    weights = [weight for _, weight in found]
    if len(found) < len(parts) or 0 in weights or len(models) < 2 or len(set(models)) < len(models):
        raise InputError(
            f"--mix {text!r}: name two or more models, each once, with weights above 0, such as "
            '"recommender:3,minilm:1", or all without weights'
        )
    if 0 < weights.count(None) < len(weights):
        raise InputError(f"--mix {text!r}: give every model a weight, or none (to use the rates of their SLOs)")
    return found


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Models and their shares of the load, which add up to 1."""

    text: str
    """From the command line, without spaces."""
    shares: dict[str, float]
    slo_rates_rps: dict[str, float | None]

    @classmethod
    def parse(cls, text: str, slo_rates_rps: Mapping[str, float | None]) -> "Mix":
        """Parses a mix from the command line; InputError if it is invalid."""
        weights = {}
        for model, weight in _parsed(text):
            rate_rps = slo_rates_rps[model]
            if weight is None and rate_rps is None:
                raise InputError(f"--mix {text!r}: {model} has no slo.rate_rps; give weights, such as {model}:1")
            weights[model] = weight or rate_rps or 0.0
        total = sum(weights.values())
        shares = {model: weight / total for model, weight in weights.items()}
        return cls(text="".join(text.split()), shares=shares, slo_rates_rps=dict(slo_rates_rps))

    @property
    def least_rate_rps(self) -> float:
        """The lowest rate of the whole mix at which every model gets at least its SLO's rate."""
        asked = [(rate or 0.0) / self.shares[model] for model, rate in self.slo_rates_rps.items()]
        if not max(asked):
            raise InputError(f"--mix {self.text}: no model has an slo.rate_rps; give --rate, --shape or --users")
        return max(asked)

    def parts(self, whole: LoadSettings, inputs: Mapping[str, str]) -> list[LoadSettings]:
        """The settings of each model, from those of the whole mix; `inputs` maps models to input files."""
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
        if users is None:
            return {}
        if users < len(self.shares):
            raise InputError(f"--users {users} for a mix of {len(self.shares)} models: each needs at least one")
        found = {model: max(1, int(users * share)) for model, share in self.shares.items()}
        while sum(found.values()) != users:  # the remainder goes to the models furthest from their shares
            step = 1 if sum(found.values()) < users else -1
            open_to = [model for model in found if found[model] + step >= 1]
            found[max(open_to, key=lambda model: step * (users * self.shares[model] - found[model]))] += step
        return found


def _rate(rate_rps: float) -> float:
    """Rounds to nine digits, so that the product equals an objective's rate in spite of floating-point error."""
    return float(f"{rate_rps:.9g}")


def _scaled(shape: str, share: float) -> str:
    """A shape with every rate multiplied by `share`, to three decimals."""

    def rate(text: str) -> str:
        return f"{float(text) * share:.3f}".rstrip("0").rstrip(".")

    segments = []
    for segment in shape.split(","):
        rates, _, seconds = segment.strip().rpartition("x")
        segments.append("-".join(map(rate, rates.split("-"))) + f"x{seconds}")
    return ", ".join(segments)


def runs_of(text: str, run: str | None = None) -> list[Run]:
    """The run of each model, of the latest such mix or the mix that includes the folder `run`."""
    models, wanted = models_of(text), "".join(text.split())
    folders = [Path(run).absolute()] if run else sorted(runs_folder(models[0]).glob("[0-9]*"), reverse=True)
    for folder in folders:  # build/<model>/loadtests/<time>
        build = folder.parent.parent.parent
        parts = [build / model / "loadtests" / folder.name for model in models]
        if all((part / "run.json").is_file() for part in parts):
            runs = [Run.load(part) for part in parts]
            if runs[0].settings.mix == wanted:
                return runs
    where = run or runs_folder(models[0])
    raise InputError(f"no load test of the mix {wanted} in {where}; make one with: make loadtest MIX={wanted}")
