"""What training and sampling both need: devices and processes, seeds, batches of the stream, checkpoints, sharding."""
