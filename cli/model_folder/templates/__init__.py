"""Model folders that `deepseek new` copies; each builds unchanged. They may import torch, as models do."""
