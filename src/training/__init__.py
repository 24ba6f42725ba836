"""What the training scripts share: launch, stream, seeds, optimiser, EMA, gate, checkpoints, run directory."""
