"""The training recipe, on Hugging Face accelerate: for any module, any loss, any map-style dataset.

AdamW (0.9, 0.999) with weight decay 1e-4, linear warm-up over the first tenth of the steps, then ReduceLROnPlateau
(patience 3, factor 0.1) on the validation loss, gradients clipped at norm 1, gradient accumulation and checkpointing,
mixed precision where the device has it; on request a running average of the weights. Each is a switch of
`TrainingConfig`. The best weights by validation loss are what the model holds in the end.

Contract: a run that is killed at any moment, and started again with the same arguments, goes on from
its last checkpoint and ends with the weights of an unkilled run: bit for bit on a CPU, and on a GPU as
far as its kernels are deterministic. For that an item of a dataset may depend on its index, on the
epoch (`set_epoch(epoch)` is called on a dataset that has it) and on nothing else. A checkpoint of other
settings, other data or another number of processes is an InputError. A loss that turns NaN or explodes raises
TrainingDiverged, which says since when, and what to change.

Under torchrun, or `python -m deepseek.training.launch`, the same call trains over several processes (`parallel`).

| module | holds |
| `recipe`, `outcome`, `switches` | the loop, its schedule, what a run came to |
| `ways`, `pipeline` | rows, training state or layers divided over processes |
| `batch_size`, `memory` | `batch_size="auto"` |
| `meter`, `report` | curves, the data pipeline's share, explosions; the page that draws them |
| `launch` | several processes, and one line where one of them dies |

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
