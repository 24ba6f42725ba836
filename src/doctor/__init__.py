"""The self-test of a machine, made of what training uses."""
