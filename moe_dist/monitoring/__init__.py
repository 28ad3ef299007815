"""Step times, metrics, wandb and console output of a training run."""
