"""Files in and out: tokens, videos, the demo's encoder and its packaged tokens."""
