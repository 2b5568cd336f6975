"""sentence-transformers behind FastAPI: a uvicorn worker for each core, one thread each, without batching."""

import os

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

torch.set_num_threads(int(os.environ["THREADS"]))
model = SentenceTransformer(os.environ["CHECKPOINT"], device="cpu")
app = FastAPI()


class Texts(BaseModel):
    texts: list[str]


@app.post("/embed")
def embed(request: Texts):
    return {"embeddings": model.encode(request.texts, show_progress_bar=False).tolist()}
