"""`stgp bench`: how fast the ops are on this machine, next to what they replace and to what its memory allows."""
