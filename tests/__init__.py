"""The tests, and the programs that check a build."""
