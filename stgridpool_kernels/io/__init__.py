"""Input and output of files: tokens, videos, the demo's encoder and its packaged tokens."""
