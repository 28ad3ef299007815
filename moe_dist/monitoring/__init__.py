"""What a user sees of a run while it trains: step times, metrics, wandb and the console."""
