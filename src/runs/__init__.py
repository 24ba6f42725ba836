"""Open what was trained: a run, a checkpoint, a final folder or an export; an autoencoder as a codec; a classifier."""
