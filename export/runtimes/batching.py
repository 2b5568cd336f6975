"""Runs predictors over more rows than the profile allows at once, by splitting and joining batches."""

from collections.abc import Iterator

from deepseek.spec import Axis, DeploymentSpec
from export.model_folder import Predict
from export.rows import Row, batches, filled, join


def within_batch(predict: Predict, batch: Axis) -> Predict:
    """The same function for any batch size: splits it into parts that fit the profile, and pads the last one."""

    def part(inputs: Row, at: int) -> Row:
        inputs = {name: array[at : at + batch.max] for name, array in inputs.items()}
        rows = len(next(iter(inputs.values())))
        return {name: array[:rows] for name, array in predict(filled(inputs, batch.min)).items()}

    def parts(inputs: Row) -> Row:
        size = len(next(iter(inputs.values())))
        return join([part(inputs, at) for at in range(0, size, batch.max)])

    return parts


def outputs_by_batch(spec: DeploymentSpec, predict: Predict, rows: list[Row]) -> Iterator[tuple[list[int], Row]]:
    """Yields outputs in batches of opt, with the indices of their rows, and keeps none in memory."""
    for places, inputs in batches(rows, spec.axes["batch"].opt):
        yield places, predict(filled(inputs, spec.axes["batch"].min))


def outputs_of(spec: DeploymentSpec, predict: Predict, rows: list[Row]) -> list[Row]:
    """Outputs row by row, run in batches of opt."""
    results: list[Row] = [{}] * len(rows)
    for places, outputs in outputs_by_batch(spec, predict, rows):
        for index, place in enumerate(places):
            results[place] = {name: array[index] for name, array in outputs.items()}
    return results
