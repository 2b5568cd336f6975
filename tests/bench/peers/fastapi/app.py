"""FastAPI without batching: `uvicorn app:app --workers <cores>`, one thread each."""

from typing import Any

from fastapi import FastAPI
from graph import Graph

graph = Graph()
app = FastAPI()


@app.post("/predict")
def predict(request: dict[str, Any]) -> dict[str, list[int | float]]:
    return graph.answers([request])[0]
