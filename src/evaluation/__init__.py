"""How good images are: quality, reconstruction, likelihood, copies, sweeps."""
