"""The training recipe, on Hugging Face accelerate: for any module, any loss, any map-style dataset.

AdamW (0.9, 0.999) with weight decay 1e-4, linear warm-up over the first tenth of the steps, then ReduceLROnPlateau
(patience 3, factor 0.1) on the validation loss. Gradients are clipped at norm 1. Gradient accumulation, gradient
checkpointing, mixed precision and a running average of the weights are switches of `TrainingConfig`. At the end, the
model holds the weights with the best validation loss.

Contract: a run that is killed at any moment and started again with the same arguments resumes from its last checkpoint.
It ends with the weights of an uninterrupted run: bit for bit on a CPU, and on a GPU if its kernels are deterministic.
For this, an item of a dataset may depend only on its index and on the epoch; if the dataset has `set_epoch(epoch)`, it
is called. A checkpoint with other settings, other data or another number of processes raises InputError. A loss that
becomes NaN or explodes raises TrainingDiverged, which says at which step and what to change.

Under torchrun, or `deepseek launch-training`, the same call trains on several processes (`parallel`). May import
`deepseek.config`, `deepseek.checkpoints`, `deepseek.sizing`, `deepseek.spec` and `deepseek.svg_chart`.

| module | holds |
| `recipe`, `outcome`, `switches` | the training loop, its schedule, its results |
| `ways`, `pipeline` | rows, training state or layers divided over processes |
| `batch_size`, `memory` | `batch_size="auto"` |
| `meter`, `report` | curves, time spent waiting for data, exploding losses; the HTML report |
| `launch` | starts several processes; reports in one line if one of them dies |

Examples:
    def loss(model, batch):
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(model(inputs), labels)

    result = train_model(model, train_data, validation_data, loss, TrainingConfig(max_epochs=20),
                         checkpoints="build/mine/checkpoints", report="build/mine/training.html")
    print(result.best_loss, result.best_epoch, result.rows_per_s, result.data_share)
"""

from deepseek.training.outcome import Epoch, TrainingDiverged, TrainingResult
from deepseek.training.recipe import LossFunction, train_model

__all__ = ["Epoch", "LossFunction", "TrainingDiverged", "TrainingResult", "train_model"]
