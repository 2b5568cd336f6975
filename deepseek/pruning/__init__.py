"""Structured pruning: removes whole attention heads and channels, which leaves an ordinary, smaller module.

`deepseek prune` enters it through `prune_model`. May import `deepseek.config`, `deepseek.settings`, `deepseek.spec`,
`deepseek.checkpoints` and `deepseek.training`.
"""

from deepseek.pruning.prune import PruneConfig, PruneReport, load_pruned, prune_model, save_pruned, weights_digest

__all__ = ["PruneConfig", "PruneReport", "load_pruned", "prune_model", "save_pruned", "weights_digest"]
