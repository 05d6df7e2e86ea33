"""The command `stgp`."""
